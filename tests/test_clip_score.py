"""CLIP-S against torchmetrics 1.9.0's numbers (clipscore.json), and whole pictures and texts against a loop."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from eval.metrics import clip_score
from eval.metrics.clip_score import clip_s, cosines, pair_scores
from tests.faults import plant
from tests.goldens import GOLDEN
from tests.merges import VOCAB_SIZE, write_merges
from tests.parity import randomise
from unifashion import UserError, preprocess
from unifashion.clip import CLIP, CLIPConfig, ImageConfig, TextConfig
from unifashion.preprocess import CLIP_MEAN, CLIP_STD, clip_image
from unifashion.tokenizers import CLIPTokenizer

GOLD = json.loads((GOLDEN / "clipscore.json").read_text())
CFG = CLIPConfig(
    ImageConfig(image_size=28, patch_size=7, dim=32, depth=2, heads=4, mlp_dim=56),
    TextConfig(vocab_size=VOCAB_SIZE, max_positions=12, dim=24, depth=2, heads=3, mlp_dim=40),
    embed_dim=16,
)
TEXTS = ["a red dress", "a long black shirt", "red " * 40, "", "café"]

# the numbers


def test_the_papers_convention_equals_the_golden():
    a, b = golden_pairs()
    scores = 100 * cosines(a, b)
    assert scores.numpy() == pytest.approx(GOLD["per_pair_100cos"], abs=2e-5)  # float32's last digit
    assert clip_s(scores) == pytest.approx(GOLD["torchmetrics_mean_then_clip"], abs=2e-5)
    # what it is not
    assert scores.clamp(min=0).mean().item() == pytest.approx(GOLD["per_pair_clip_then_mean"], abs=2e-5)


@pytest.mark.parametrize(
    ("target", "old", "new"),
    [
        ("clip_s", "max(scores.double().mean().item(), 0.0)", "scores.clamp(min=0).double().mean().item()"),
        ("cosines", "F.normalize(texts.to(wide), dim=-1)", "texts.to(wide)"),
    ],
)
def test_a_wrong_line_is_noticed(target: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, clip_score, target, old, new)
    monkeypatch.setitem(globals(), target, getattr(clip_score, target))
    with pytest.raises(AssertionError):
        test_the_papers_convention_equals_the_golden()


def test_a_mean_below_zero_is_zero():
    assert clip_s(torch.tensor([-30.0, 10.0])) == 0 and clip_s(torch.tensor([30.0, -10.0])) == 10


def test_half_precision_is_compared_in_single():
    a, b = (x.bfloat16() for x in golden_pairs())
    assert cosines(a, b).dtype == torch.float32
    assert cosines(a, b) == pytest.approx(cosines(a.double(), b.double()).numpy(), abs=1e-6)


# pictures and texts


@pytest.mark.parametrize(("batch", "workers"), [(2, 0), (64, 0), (2, 1)])
def test_pairs_score_as_one_by_one_and_in_their_order(batch: int, workers: int, folder: Path):
    model, tokenizer = tiny(folder)
    pictures = [folder / f"{i}.png" for i in range(5)]
    scores = pair_scores(model, tokenizer, pictures, TEXTS, batch, workers, quiet=True)
    assert scores.shape == (5,) and scores.device.type == "cpu" and not scores.requires_grad
    assert scores.std() > 1  # they could have shown another order
    for i, text in enumerate(TEXTS):
        pixels = clip_image(Image.open(pictures[i]), 28)[None].double()
        a, b = model.encode_image(pixels), model.encode_text(tokenizer.encode([text], 12))
        assert scores[i].item() == pytest.approx(100 * torch.cosine_similarity(a, b).item(), abs=1e-9)


def test_pictures_in_memory_score_as_those_on_disk(folder: Path):
    model, tokenizer = tiny(folder)
    paths = [folder / f"{i}.png" for i in range(5)]
    opened = [Image.open(path) for path in paths]
    ours, theirs = (pair_scores(model, tokenizer, x, TEXTS, quiet=True) for x in (opened, paths))
    assert torch.equal(ours, theirs)


def test_a_picture_that_cannot_be_read_is_named(folder: Path):
    model, tokenizer = tiny(folder)
    (folder / "3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="3.png: not an image"):
        pair_scores(model, tokenizer, [folder / f"{i}.png" for i in range(5)], TEXTS, quiet=True)


def test_different_counts_and_none_are_refused(folder: Path):
    model, tokenizer = tiny(folder)
    for pictures, texts in (([folder / "0.png"], TEXTS), ([], [])):
        with pytest.raises(ValueError, match="wanted as many of both"):
            pair_scores(model, tokenizer, pictures, texts, quiet=True)


# what the image tower reads


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (224, 224), (768, 1024), (100, 150), (224, 226)])
def test_a_picture_is_prepared_as_by_transformers(size: tuple[int, int]):
    image = noise(size)
    theirs = CLIPImageProcessor()(image, return_tensors="pt")["pixel_values"][0]
    assert (clip_image(image) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(31, 97), (97, 31), (227, 224), (225, 400), (1000, 333)])
def test_a_picture_is_prepared_as_by_openai(size: tuple[int, int]):
    """torchvision's Resize, CenterCrop, ToTensor, Normalize: they round an odd rest to the even side, transformers down."""
    image = noise(size)
    short = min(size)
    whole = [224 if side == short else int(224 * side / short) for side in size]
    left, top = (int(round((side - 224) / 2.0)) for side in whole)
    cut = image.resize(whole, Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    levels = clip_image(image) * CLIP_STD + CLIP_MEAN
    assert torch.equal((levels * 255).round().byte(), torch.from_numpy(np.array(cut)).permute(2, 0, 1))


def test_a_hair_thin_strip_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preprocess, "MAX_PIXELS", 224 * 500)
    assert clip_image(noise((10, 20))).shape == (3, 224, 224)
    with pytest.raises(UserError, match="a picture of 10x30 pixels is too long and thin"):
        clip_image(noise((10, 30)))


# helpers


def golden_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """The recipe in the file."""
    random = np.random.RandomState(3)
    a = random.randn(5, 8)
    b = a + 0.8 * random.randn(5, 8)
    b[4] = -a[4]
    return torch.from_numpy(a).float(), torch.from_numpy(b).float()


def tiny(folder: Path) -> tuple[CLIP, CLIPTokenizer]:
    return randomise(CLIP(CFG), seed=0), CLIPTokenizer(folder / "merges.txt", VOCAB_SIZE)


def noise(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(5):
        noise((40 + i, 60 - 7 * i)).save(tmp_path / f"{i}.png")
    write_merges(tmp_path / "merges.txt")
    return tmp_path
