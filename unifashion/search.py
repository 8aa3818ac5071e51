"""Search: what the Q-Former says of pictures and texts, as unit vectors, and the scores between them.

    picture            (b,3,224,224) --> Z_I (b,32,768) --vision_proj, L2--> (b,32,256)     `image_embeddings`
    text               (b,t)         --> its [CLS]      --text_proj, L2-->   (b,256)        `text_embeddings`
    picture and text   Eq. 9         --> its [CLS]      --text_proj, L2-->   (b,256)        `composed_embeddings`, e_cls

All pictures are read with the same query tokens, be they a reference, a target or of a catalogue. (The official code trains
a second set for targets, and reads its gallery with the first.) Scores have a row for each query and a column for each
candidate. They are computed in float32 at least, whatever autocast says, and a block of candidates at a time, so that
nothing but the candidates and the scores themselves grows with their number.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

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


def composed_embeddings(model: UniFashion, pictures: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Eq. 9: reference pictures, each with what is to be changed -> e_cls, unit vectors (b,256)."""
    _, text = model.qformer(model.see(pictures), ids, mask)
    return model.qformer.embed_text(text)


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
