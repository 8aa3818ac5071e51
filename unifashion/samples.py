"""From data sets to what the objectives learn from: pictures, texts and scenes as tensors, sample by sample.

Pairs      a picture and its text                                   cross, generate
Answers    a picture, and its text as an answer to an instruction   caption
Triplets   reference, modification text, target and its caption     composed
Scenes     a person, what is kept of it, cloth and sketch           tryon
"""

import sys
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from unifashion import UserError
from unifashion.config import UniFashionConfig
from unifashion.data.fashioniq import WAYS, joined
from unifashion.data.readers import DATA_SETS, in_toy
from unifashion.feed import check_share
from unifashion.parallel import rank
from unifashion.preprocess import qformer_image
from unifashion.tokenizers import SentencePiece, WordPiece, answer_ids, blip_caption, prompt
from unifashion.training import name_and_path, toy_folder
from unifashion.tryon import garment_tensors, person_tensors, unet_picture

# What the Q-Former and the garment encoder may be given, and how often, where a data set has sketches and texts.
CONDITIONS = {"cloth": 0.3, "cloth+text": 0.1, "sketch+text": 0.5, "sketch": 0.1}

TEXTS = ("fashion200k", "fashiongen", "fashioniq-cap")  # pictures with texts; the name is the texts' style
COMPOSED = ("fashioniq",)
PERSONS = ("vitonhd", "mgd")
# Of each kind the one that has all, where another is of the same pictures.
NOT_IN_TOY = ("vitonhd",)


def open_data(names: list[str], kinds: tuple[str, ...], allow_missing: bool = False) -> dict[str, Dataset]:
    """
    --data NAME[=PATH] ... -> {name: its training split}, those of `kinds`; toy stands for all of them but NOT_IN_TOY.

    Raises UserError for an unknown name, one that is there twice, a data set that is damaged, and for more than 1 % of
    pictures that are not there, unless `allow_missing`.
    """
    folders: dict[str, Path] = {}
    for name, path in (name_and_path(n, ("toy", *DATA_SETS)) for n in names):
        found = {name: path}
        if name == "toy":
            world = toy_folder(path)
            found = {part: in_toy(world, part) for part in kinds if part not in NOT_IN_TOY}
        for part, folder in found.items():
            if part in folders:
                raise UserError(f"--data names {part} twice" + " (toy stands for it, too)" * ("toy" in names))
            if part in kinds:
                folders[part] = folder
    parts = {part: DATA_SETS[part](folder, "train") for part, folder in folders.items()}
    for part, data in parts.items():
        if gone := data.missing():
            told = f"{folders[part]} lacks {gone[0]}: {data.SOURCE}"
            named = len(data) + len(getattr(data, "uncaptioned", ()))  # these are no samples, but would be
            check_share(len(gone), named, told, allow_missing)
            if rank() == 0:
                print(f"{part}: {len(gone)} of {named} samples are left out, {told}", file=sys.stderr)
    return parts


def products(data: dict[str, Dataset]) -> list[str]:
    """Of each sample the product that it shows: what is held out is held out whole."""
    return [name for part in data.values() for name in part.products]


def names(data: dict[str, Dataset]) -> list[str]:
    """Of each sample a name to tell a person."""
    return [f"{style}: {name}" for style, part in data.items() for name in part.products]


def hashed(name: str) -> Tensor:
    return torch.tensor(zlib.crc32(name.encode()))


class Pairs(Dataset):
    """Pictures and their texts. `product` tells which pairs belong together; x0 is there for what draws."""

    def __init__(
        self, data: dict[str, Dataset], cfg: UniFashionConfig, words: WordPiece, draws: bool = False
    ) -> None:
        self.data, self.cfg, self.words, self.draws = ConcatDataset(data.values()), cfg, words, draws

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = self.data[i]
        ids, mask = self.words.encode([blip_caption(item["text"])], self.cfg.qformer.max_text)
        tensors = {
            "picture": qformer_image(item["image"], self.cfg.vit.image_size[0]),
            "ids": ids[0],
            "mask": mask[0],
            "product": hashed(item["product"]),
        }
        return tensors | ({"x0": unet_picture(item["image"], self.cfg)} if self.draws else {})


class Answer:
    """A text as the LLM learns to give it: after the instruction of its style (`tokenizers.prompt`)."""

    def __init__(self, cfg: UniFashionConfig, words: SentencePiece, styles: list[str]) -> None:
        self.words, self.most = words, cfg.max_caption
        self.before = torch.tensor(prompt(words, styles[0])[0])  # of all styles the same
        self.after = {style: prompt(words, style)[1] for style in styles}
        self.room = max(map(len, self.after.values())) + cfg.max_caption

    def __call__(self, text: str, style: str) -> dict[str, Tensor]:
        """before (p,), the template left of the soft prompt; after (room,), the rest of it, the answer, its end, padding;
        answer (room,) bool, True on the answer and its end."""
        after = self.after[style]
        answer = answer_ids(self.words, text, self.most)
        ids = torch.full((self.room,), self.words.eos)
        ids[: len(after) + len(answer)] = torch.tensor(after + answer)
        column = torch.arange(self.room)
        return {
            "before": self.before,
            "after": ids,
            "answer": (column >= len(after)) & (column < len(after) + len(answer)),
        }


class Answers(Dataset):
    """Pictures, and their texts as answers to the instruction of their style: the name of the data set they are from."""

    def __init__(self, data: dict[str, Dataset], cfg: UniFashionConfig, words: SentencePiece) -> None:
        self.data, self.cfg = ConcatDataset(data.values()), cfg
        self.style = [style for style, part in data.items() for _ in range(len(part))]
        self.answer = Answer(cfg, words, list(data))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = self.data[i]
        picture = qformer_image(item["image"], self.cfg.vit.image_size[0])
        return {"picture": picture, **self.answer(item["text"], self.style[i])}


class Triplets(Dataset):
    """
    Reference and target, the modification text joined in its four ways, and the target's caption, which the objective reads
    (`llm_words` None: only as the Q-Former does) unless it is left `without` both "itg" and "caption".
    """

    def __init__(
        self,
        data: dict[str, Dataset],
        cfg: UniFashionConfig,
        words: WordPiece,
        llm_words: SentencePiece | None,
        without: tuple[str, ...] = (),
        allow_missing: bool = False,
    ) -> None:
        self.cfg, self.words, self.without = cfg, words, without
        wants = not {"itg", "caption"} <= set(without)
        chosen = {name: part.captioned if wants else range(len(part)) for name, part in data.items()}
        self.rows = [(part, i) for name, part in data.items() for i in chosen[name]]
        if not self.rows:
            raise UserError(
                f"no target of {', '.join(data)} has a caption: make them with infer.py caption --style fashioniq-cap "
                "--image PATH/images --out PATH/captions.jsonl, or leave them out (--without itg,caption)"
            )
        every = sum(map(len, data.values()))
        if silent := every - len(self.rows):  # Table 5's rows are to be of the same triplets
            check_share(
                silent, every, "their targets have no caption, which infer.py caption writes", allow_missing
            )
            if rank() == 0:
                print(
                    f"{silent} of {every} triplets are left out: no caption of their targets", file=sys.stderr
                )
        self.answer = Answer(cfg, llm_words, ["fashioniq-cap"]) if "itg" not in without else None

    def __len__(self) -> int:
        return len(self.rows)

    def targets(self) -> list[str]:
        return [part.products[i] for part, i in self.rows]

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        part, row = self.rows[i]
        item, most = part[row], self.cfg.qformer.max_text
        size = self.cfg.vit.image_size[0]
        texts = [blip_caption(joined(item["captions"], way)) for way in range(WAYS)]
        ways, ways_mask = self.words.encode(texts, most)
        tensors = {
            "pictures": torch.stack([qformer_image(item[k], size) for k in ("reference", "target")]),
            "ways": ways,
            "ways_mask": ways_mask,
            "target_id": hashed(item["target_id"]),
        }
        if "caption" not in self.without:
            ids, mask = self.words.encode([blip_caption(item["caption"])], most)
            tensors |= {"caption_ids": ids[0], "caption_mask": mask[0]}
        if self.answer is not None:
            tensors |= self.answer(item["caption"], "fashioniq-cap")
        if "q2i" not in self.without:
            tensors["x0"] = unet_picture(item["target"], self.cfg)
        return tensors


class Scenes(Dataset):
    """A person, what is kept of it, and every condition."""

    def __init__(self, data: dict[str, Dataset], cfg: UniFashionConfig, words: WordPiece) -> None:
        self.data, self.cfg, self.words = ConcatDataset(data.values()), cfg, words

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = self.data[i]
        sketched = "sketch" in item
        cloth = garment_tensors(item["cloth"], False, self.cfg)
        sketch = garment_tensors(item["sketch"].convert("RGB"), True, self.cfg) if sketched else cloth
        ids, mask = self.words.encode([blip_caption(item.get("text", ""))], self.cfg.qformer.max_text)
        odds = list(CONDITIONS.values()) if sketched else [1.0, 0.0, 0.0, 0.0]
        return {
            "person": unet_picture(item["person"], self.cfg),
            **person_tensors(item["person"], item["mask"], item["pose"], self.cfg),
            "hints": torch.stack([cloth["hint"], sketch["hint"]]),
            "pictures": torch.stack([cloth["picture"], sketch["picture"]]),
            "ids": ids[0],
            "mask": mask[0],
            "odds": torch.tensor(odds),
        }
