"""Pictures and texts of an evaluation -> embeddings, a batch at a time, with a progress bar."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unifashion import UserError
from unifashion.model import UniFashion
from unifashion.preprocess import qformer_image
from unifashion.search import composed_embeddings, image_embeddings, text_embeddings
from unifashion.tokenizers import WordPiece, blip_caption


@torch.no_grad()
def embed_pictures(
    model: UniFashion, open_: Callable[[int], Image.Image], n: int, batch: int, name: str, quiet: bool
) -> Tensor:
    """n pictures, opened a batch at a time -> (n,32,256), on the model's device."""
    made = []
    for piece in batches(n, batch, name, quiet):
        made.append(image_embeddings(model, read_pictures(model, open_, piece)))
    return checked(torch.cat(made))


@torch.no_grad()
def embed_texts(model: UniFashion, words: WordPiece, texts: list[str], batch: int) -> Tensor:
    """-> (n,256), on the model's device."""
    made = []
    for piece in batches(len(texts), batch, "texts", quiet=True):
        made.append(text_embeddings(model, *read_texts(model, words, [texts[i] for i in piece])))
    return checked(torch.cat(made))


@torch.no_grad()
def embed_composed(
    model: UniFashion, words: WordPiece, see: Callable[[range], Tensor], ways: Sequence[list[str]], batch: int,
    name: str, quiet: bool,
) -> list[Tensor]:  # fmt: skip
    """
    For each of `ways`, texts of all references, e_cls (b,256) of every reference with its text. `see` looks at a batch of
    references, by their numbers -> features (b,257,1408): once for all ways, since the ViT is most of the work.
    """
    made: list[list[Tensor]] = [[] for _ in ways]
    for piece in batches(len(ways[0]), batch, name, quiet):
        features = see(piece)
        for of, texts in zip(made, ways, strict=True):
            read = read_texts(model, words, [texts[i] for i in piece])
            of.append(composed_embeddings(model, features, *read))
    return [checked(torch.cat(of)) for of in made]


def read_pictures(model: UniFashion, open_: Callable[[int], Image.Image], piece: Sequence[int]) -> Tensor:
    side = model.cfg.vit.image_size[0]
    return torch.stack([qformer_image(open_(i), side) for i in piece]).to(model.device)


def read_texts(model: UniFashion, words: WordPiece, texts: list[str]) -> tuple[Tensor, Tensor]:
    ids, mask = words.encode([blip_caption(text) for text in texts], model.cfg.qformer.max_text)
    return ids.to(model.device), mask.to(model.device)


def cut_texts(words: WordPiece, texts: list[str], most: int) -> int:
    """How many of the texts the model does not read to their end."""
    whole = [blip_caption(text, max_words=len(text)) for text in texts]
    return sum(words.is_cut(w, most) or blip_caption(w) != w for w in whole)


def batches(n: int, size: int, name: str, quiet: bool) -> list[range]:
    """range(n) in pieces of `size`, with a progress bar."""
    pieces = [range(start, min(start + size, n)) for start in range(0, n, size)]
    return tqdm(pieces, desc=name, disable=quiet)


def checked(embeddings: Tensor) -> Tensor:
    if not embeddings.isfinite().all():
        raise UserError("the numbers overflow: a file of weights is damaged")
    return embeddings
