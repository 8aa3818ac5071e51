"""Search: what the Q-Former says of pictures and texts, as unit vectors, and the scores between them.

    picture            (b,3,224,224) --> Z_I (b,32,768) --vision_proj, L2--> (b,32,256)     `image_embeddings`
    text               (b,t)         --> its [CLS]      --text_proj, L2-->   (b,256)        `text_embeddings`
    picture and text   Eq. 9         --> its [CLS]      --text_proj, L2-->   (b,256)        `composed_embeddings`, e_cls

All pictures are read with the same query tokens, be they a reference, a target or of a catalogue. (The official code trains
a second set for targets, and reads its gallery with the first.) Scores have a row for each query and a column for each
candidate. They are computed in float32 at least, whatever autocast says, and a block of candidates at a time, so that
nothing but the candidates and the scores themselves grows with their number.

A catalogue keeps its vectors in float16, and `best` finds its first for one query: those of float64, in the time of one
product in float16.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from unifashion import UserError
from unifashion.model import UniFashion

BLOCK = 2**26  # numbers that are compared at a time: 256 MB


def qformer_hash(model: UniFashion) -> str:
    """sha256 of the Q-Former's names, shapes and values, in bfloat16: whatever dtype the model runs in, the same."""
    h = hashlib.sha256()
    for name, tensor in sorted(model.qformer.state_dict().items()):
        values = tensor.cpu().bfloat16().contiguous().view(torch.int16).numpy()
        h.update(f"{name} {tuple(tensor.shape)}".encode() + values.tobytes())
    return h.hexdigest()


def image_embeddings(model: UniFashion, pictures: Tensor) -> Tensor:
    """pictures (b,3,224,224), from `preprocess.qformer_image` -> unit vectors (b,32,256)."""
    z, _ = model.qformer(model.see(pictures))
    return model.qformer.embed_image(z)


def text_embeddings(model: UniFashion, ids: Tensor, mask: Tensor) -> Tensor:
    """ids (b,t) and mask (b,t), from `WordPiece.encode` of `tokenizers.blip_caption`'s texts -> unit vectors (b,256)."""
    _, text = model.qformer(ids=ids, mask=mask)
    return model.qformer.embed_text(text)


def composed_embeddings(model: UniFashion, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Eq. 9: features (b,257,1408) of reference pictures, from `model.see`, each with what is to be changed -> e_cls, unit vectors (b,256)."""
    _, text = model.qformer(features, ids, mask)
    return model.qformer.embed_text(text)


@torch.no_grad()
def query_embedding(model: UniFashion, picture: Tensor | None, text: tuple[Tensor, Tensor] | None) -> Tensor:
    """
    What is looked for, for `best`: a picture (3,224,224), prepared as the catalogue's -> (q,d); a text, ids and mask (1,t) -> (d,); both -> e_cls (d,).

    Raises UserError for numbers that are not finite.
    """
    if picture is not None:
        picture = picture[None].to(model.device)
    ids, mask = (x.to(model.device) for x in text) if text else (None, None)
    if text is None:
        query = image_embeddings(model, picture)
    elif picture is None:
        query = text_embeddings(model, ids, mask)
    else:
        query = composed_embeddings(model, model.see(picture), ids, mask)
    if not query.isfinite().all():
        raise UserError("the numbers overflow: a file of weights is damaged")
    return query[0]


def text_to_image(text: Tensor, images: Tensor) -> Tensor:
    """text (b,d), or e_cls, against images (n,q,d) -> (b,n): the best of the queries, as `losses.similarity` has it."""
    return _in_blocks(text, images, images.shape[1], lambda x, y: torch.einsum("bd,nqd->bnq", x, y).amax(-1))


def image_to_image(pictures: Tensor, images: Tensor) -> Tensor:
    """pictures (b,q,d) against images (n,q,d) -> (b,n): the mean over the queries, each against its like."""
    return _in_blocks(pictures, images, 1, lambda x, y: torch.einsum("bqd,nqd->bn", x, y) / x.shape[1])


def text_to_text(text: Tensor, captions: Tensor) -> Tensor:
    """text (b,d), or e_cls, against captions (n,d) -> (b,n)."""
    return _in_blocks(text, captions, 1, lambda x, y: x @ y.T)


def composed_scores(e_cls: Tensor, images: Tensor, captions: Tensor | None = None, w: float = 1.0) -> Tensor:
    """
    max_q(e_cls . Z_T) + w (e_cls . Z_C)

    e_cls (b,d), from `composed_embeddings`; of the n candidates images (n,q,d) and, if they have them, captions (n,d) -> (b,n)
    """
    scores = text_to_image(e_cls, images)
    return scores if captions is None else scores + w * text_to_text(e_cls, captions)


def best(
    query: Tensor,
    images: Tensor,
    top: int,
    captions: Tensor | None = None,
    w: float = 1.0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """
    The first of a catalogue for one query, exactly: by their scores in float64, ties by index.

    query     (d,) of a text, or e_cls, as `composed_scores`; or (q,d) of a picture, as `image_to_image`
    images    (n,q,d) and, for e_cls, captions (n,d): unit vectors as they are stored, which may lie in a file (mmap)
    device    where all candidates are compared
    -> scores (k,) float64, from the best down, and indices (k,) int64; k is the lesser of top and n

    Of vectors in float16 and a query that has been rounded to it, products and their sums are exact in float64: then no order
    of summation, and so no block, no device and no library, decides a rank.

    Two passes. The first compares all roughly, in the stored precision: its time is that of one matrix-vector product, its
    memory a block and a number for each candidate. The second compares in float64 those that may be among the first: whose
    rough score is no further below the k-th best than both may be wrong.
    """
    k = min(top, len(images))
    if k < 1:
        return torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    # A GPU may add float16 up in float16, and has the time to do better.
    rough_dtype = images.dtype if torch.device(device).type == "cpu" else torch.float32
    rounded = query.cpu().to(images.dtype)
    rough = _rough(rounded.to(device, rough_dtype), images, captions, w)
    off = (1 + abs(w) * (captions is not None)) * _rough_error(query.cpu().double(), rounded)
    near = (rough >= rough.topk(k).values[-1] - 2 * off).nonzero()[:, 0]
    exact = torch.cat([_exact(query.cpu().double(), images, captions, w, some) for some in near.split(512)])
    if not (exact - rough[near]).abs().max() <= off:
        raise RuntimeError("the product in half precision is off by more than it may: no unit vectors?")
    order = exact.argsort(descending=True, stable=True)[:k]
    return exact[order], near[order]


def _rough(query: Tensor, images: Tensor, captions: Tensor | None, w: float) -> Tensor:
    """Scores of all candidates (n,), float32 on the CPU, of a product in the query's dtype."""
    n, q, d = images.shape
    scores = torch.empty(n)
    size = max(1, BLOCK // (q * d))
    for start in range(0, n, size):
        block = images[start : start + size].to(query)
        if query.ndim == 2:
            found = torch.mv(block.flatten(1), query.flatten()).float() / q
        else:
            found = torch.mv(block.flatten(0, 1), query).float().view(-1, q).amax(1)
            if captions is not None:
                found += w * torch.mv(captions[start : start + size].to(query), query).float()
        scores[start : start + size] = found
    return scores


def _rough_error(query: Tensor, rounded: Tensor) -> float:
    """How far `_rough` may be from the truth, of one product: what rounding took from the query, sums in float32, and their
    rounding. Of unit vectors, the sum of a query's and a candidate's products is no more than the query's length."""
    length, lost = (x.norm(dim=-1).mean().item() for x in (query, query - rounded))
    unit = 1 + 2**-9  # stored vectors are rounded, too
    return unit * (lost + length * (query.numel() * 2**-24 + torch.finfo(rounded.dtype).eps / 2)) + 2**-20


def _exact(query: Tensor, images: Tensor, captions: Tensor | None, w: float, some: Tensor) -> Tensor:
    """Scores of `some` of the candidates in float64."""
    products = (images[some].double() * query).sum(-1)
    if query.ndim == 2:
        return products.mean(-1)
    scores = products.amax(1)
    return scores if captions is None else scores + w * (captions[some].double() * query).sum(-1)


def _in_blocks(
    queries: Tensor, candidates: Tensor, width: int, compare: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """compare(queries (b,...), so many candidates (m,...)) -> (b,m), side by side; `width`: numbers it makes for a score."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    size = max(1, BLOCK // max(1, len(queries) * width, candidates[:1].numel()))
    scores = torch.empty(len(queries), len(candidates), dtype=wide, device=queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        queries = queries.to(wide)
        for start in range(0, len(candidates), size):
            block = candidates[start : start + size].to(queries)
            scores[:, start : start + size] = compare(queries, block)
    return scores
