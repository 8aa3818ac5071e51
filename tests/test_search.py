"""Embeddings and scores against UniFashion's own code (goldens `blip2_cls`, `blip2_cir`), and what a catalogue asks of them."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import goldens
from tests.faults import plant
from tests.parity import assert_parity, randomise
from tests.rooms import SMALL
from tests.test_qformer import blip2
from unifashion import losses, search
from unifashion.model import UniFashion
from unifashion.search import (
    composed_embeddings,
    composed_scores,
    image_embeddings,
    image_to_image,
    text_embeddings,
    text_to_image,
    text_to_text,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# The official code


def test_search_by_text_equals_the_official_code():
    golden, model = official("blip2_cls")
    images = image_embeddings(model, golden.inputs["image"])
    text = text_embeddings(model, golden.inputs["text_ids"], golden.inputs["text_mask"])
    scores = text_to_image(text, images)
    # Its names are swapped: what `inference` calls sim_i2t, and returns first, has a row for each text.
    assert_parity(scores, golden.outputs["infer_1"])
    assert_parity(scores.T, golden.outputs["infer_2"])


def test_composed_search_equals_the_official_code():
    golden, model = official("blip2_cir")
    images = image_embeddings(model, golden.inputs["target"])
    # As its gallery, not as its training, which reads targets with `prompt_tokens`: ours has no second set.
    assert_parity(images, golden.outputs["gallery_feats"])
    captions = text_embeddings(model, *text_of(golden, "target_caption"))
    assert_parity(captions, golden.outputs["caption_feats"])
    e_cls = composed_embeddings(model, model.see(golden.inputs["image"]), *text_of(golden, "text"))
    assert_parity(composed_scores(e_cls, images), golden.outputs["score_image"])
    assert_parity(composed_scores(e_cls, images, captions), golden.outputs["score_all"])
    alone = golden.outputs["score_all"] - golden.outputs["score_image"]
    assert_parity(text_to_text(e_cls, captions), alone)
    assert_parity(
        composed_scores(e_cls, images, captions, w=0.3), golden.outputs["score_image"] + 0.3 * alone
    )


def test_the_official_codes_training_compares_captions_otherwise():
    """In training it compares a caption with the 32 queries of the fused pass, in inference, as we do, with its [CLS]."""
    golden, model = official("blip2_cir")
    captions = text_embeddings(model, *text_of(golden, "target_caption"))
    z, _ = model.qformer(model.see(golden.inputs["image"]), *text_of(golden, "text"))
    theirs = text_to_image(captions, model.qformer.embed_image(z)).T
    assert_parity(theirs / model.qformer.temp, golden.outputs["sim_t2t"])
    e_cls = composed_embeddings(model, model.see(golden.inputs["image"]), *text_of(golden, "text"))
    assert (text_to_text(e_cls, captions) - theirs).abs().min() > 1e-3


FAULTS = {
    "mean for max": ("text_to_image", "amax(-1)", "mean(-1)"),
    "no captions": ("composed_scores", "+ w * text", "+ 0 * text"),
    "captions alone": ("composed_scores", "scores = text_to_image(e_cls, images)", "scores = 0 * text_to_image(e_cls, images)"),
    "the last token for [CLS]": ("composed_embeddings", "ids, mask)\n    return model.qformer.embed_text(text)", "ids, mask)\n    return model.qformer.embed_text(text.flip(1))"),
    "the end of a caption for [CLS]": ("text_embeddings", "mask=mask)\n    return model.qformer.embed_text(text)", "mask=mask)\n    return model.qformer.embed_text(text.flip(1))"),
    "not normalised": ("image_embeddings", "model.qformer.embed_image(z)", "model.qformer.vision_proj(z)"),
    "the texts' projection": ("image_embeddings", "model.qformer.embed_image(z)", "torch.nn.functional.normalize(model.qformer.text_proj(z), dim=-1)"),
    "the text without the picture": ("composed_embeddings", "model.qformer(features, ids, mask)", "model.qformer(ids=ids, mask=mask)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_parity_notices(fault, monkeypatch):
    target, old, new = FAULTS[fault]
    plant(monkeypatch, search, target, old, new)
    monkeypatch.setitem(globals(), target, getattr(search, target))
    with pytest.raises(AssertionError, match="max difference"):
        test_search_by_text_equals_the_official_code()
        test_composed_search_equals_the_official_code()


# What the scores are


def test_late_interaction_is_the_notes():
    gold = json.loads((goldens.GOLDEN / "recall.json").read_text())["late_interaction"]
    wanted = torch.tensor(gold["sim"], dtype=torch.float64)
    rng = random_before_late_interaction()
    text, images = (
        F.normalize(torch.from_numpy(rng.standard_normal(shape)), dim=-1) for shape in ((5, 8), (6, 4, 8))
    )
    assert_parity(text_to_image(text, images), wanted)


def test_scores_of_texts_are_what_the_losses_compare():
    text, images = unit(5, 16), unit(7, 4, 16)
    assert torch.allclose(text_to_image(text, images), losses.similarity(images, text).T, atol=1e-6, rtol=0)


def test_pictures_are_compared_query_by_query():
    pictures, images = unit(3, 4, 16), unit(5, 4, 16)
    scores = image_to_image(pictures, images)
    for i, a in enumerate(pictures):
        for j, b in enumerate(images):
            assert scores[i, j].item() == pytest.approx(
                sum(float(x @ y) for x, y in zip(a, b, strict=True)) / 4, abs=1e-6
            )
    assert torch.allclose(image_to_image(images, images).diagonal(), torch.ones(5), atol=1e-6)
    turned = image_to_image(images, images.flip(1)).diagonal()  # the same vectors, each against another
    assert (turned < 0.9).all()


@pytest.mark.parametrize("block", [1, 40, 1000])
def test_blocks_change_nothing(block, monkeypatch):
    text, pictures, images, captions = unit(3, 16), unit(3, 4, 16), unit(11, 4, 16), unit(11, 16)
    compare = {
        text_to_image: (text, images),
        image_to_image: (pictures, images),
        text_to_text: (text, captions),
        composed_scores: (text, images, captions),
    }
    whole = [score(*given) for score, given in compare.items()]
    monkeypatch.setattr(search, "BLOCK", block)
    for score, given, wanted in zip(compare, compare.values(), whole, strict=True):
        assert torch.allclose(score(*given), wanted, atol=1e-6, rtol=0)
    assert text_to_image(text, images[:0]).shape == (3, 0)
    assert text_to_image(text[:0], images).shape == (0, 11)


def test_a_large_catalogue_is_compared_a_block_at_a_time(monkeypatch):
    """So large that all comparisons at once would be 200 times the block, which they never are."""
    monkeypatch.setattr(search, "BLOCK", 2**16)
    made, einsum = [], torch.einsum
    monkeypatch.setattr(torch, "einsum", lambda *a: made.append(einsum(*a)) or made[-1])
    text_to_image(unit(50, 8), unit(8000, 32, 8))
    assert (
        max(block.numel() for block in made) <= 2**16 and sum(block.numel() for block in made) > 190 * 2**16
    )


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_scores_are_float32_under_autocast_and_from_half_precision(stored):
    text, images, captions = unit(4, 64), unit(9, 8, 64).to(stored), unit(9, 64).to(stored)
    with torch.autocast("cpu", torch.bfloat16):
        scores = composed_scores(text.to(stored), images, captions)
        pairs = image_to_image(images, images)
    assert scores.dtype == pairs.dtype == torch.float32
    wide = composed_scores(text.to(stored).double(), images.double(), captions.double())
    assert torch.allclose(scores.double(), wide, atol=1e-6)
    assert torch.allclose(pairs.double(), image_to_image(images.double(), images.double()), atol=1e-6)


def test_embeddings_are_unit_vectors_of_float32_whatever_the_model_runs_in():
    model = randomise(UniFashion(SMALL, draws=False), 0).to(torch.bfloat16)
    pictures, ids = torch.randn(2, 3, 28, 28), torch.randint(5, 200, (2, 12))
    mask = torch.arange(12) < torch.tensor([[12], [7]])
    z_i, z_c = image_embeddings(model, pictures), text_embeddings(model, ids, mask)
    e_cls = composed_embeddings(model, model.see(pictures), ids, mask)
    assert z_i.shape == (2, 3, 8) and z_c.shape == e_cls.shape == (2, 8)
    for made in (z_i, z_c, e_cls):
        assert made.dtype == torch.float32
        assert torch.allclose(made.norm(dim=-1), torch.tensor(1.0), atol=1e-5)


def test_a_composed_query_hears_picture_and_text():
    model = randomise(UniFashion(SMALL, draws=False), 0)
    pictures, ids = torch.randn(2, 3, 28, 28), torch.randint(5, 200, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.bool)
    e_cls = composed_embeddings(model, model.see(pictures), ids, mask)
    assert (composed_embeddings(model, model.see(pictures.flip(0)), ids, mask) - e_cls).abs().max() > 1e-3
    assert (composed_embeddings(model, model.see(pictures), ids.flip(0), mask) - e_cls).abs().max() > 1e-3


# Helpers


def official(case: str) -> tuple[goldens.Golden, UniFashion]:
    """UniFashion's own weights, read by the production tables, in our model."""
    golden, parts = blip2(case)
    model = UniFashion(SMALL, draws=False)  # of which nothing is left: the goldens' pictures are not square
    model.vit, model.qformer = parts["vit"], parts["qformer"]
    return golden, model.eval()


def text_of(golden: goldens.Golden, name: str) -> tuple[Tensor, Tensor]:
    return golden.inputs[f"{name}_ids"], golden.inputs[f"{name}_mask"]


def unit(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def random_before_late_interaction() -> np.random.RandomState:
    """The random numbers as they are after those of the other cases of recall.json."""
    rng = np.random.RandomState(7)
    for shape in ((60, 16), (180, 16), *3 * [(10, 10)], (40, 200)):
        rng.standard_normal(shape)
    return rng
