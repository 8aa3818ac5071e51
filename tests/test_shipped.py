"""The one file of learned weights that is shipped: all tasks run from it, and what it learned shows in its losses."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from unifashion import feed, objectives
from unifashion.config import TINY
from unifashion.data import toy
from unifashion.model import UniFashion
from unifashion.samples import Triplets, open_data
from unifashion.seen import is_record
from unifashion.training import BatchRNG
from weights.load import FOLDERS, load_unifashion, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = {
    "qformer", "text_adapter", "llama", "image_adapter", "style_adapter", "null_context", "unet", "garment",
}  # fmt: skip


@pytest.fixture(scope="module")
def shipped() -> UniFashion:
    return load_unifashion("tiny", None, torch.device("cpu"))


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory, shipped: UniFashion) -> list[dict[str, torch.Tensor]]:
    """Four batches of composed queries of a world that training never drew."""
    world = tmp_path_factory.mktemp("shipped") / "toy"
    toy.ensure(world, train=160, val=2, test=2, seed=11, workers=1, quiet=True)
    data = open_data([f"toy={world}"], ("fashioniq",))
    without = ("itg", "q2i", "caption")
    samples = Triplets(data, TINY, tokenizer("tiny", None), None, without)
    order = feed.batch_order(len(samples), 16, 0, 0, 4)
    encode = partial(objectives.encode_composed, shipped)
    return list(feed.stream(samples, order, encode, torch.device("cpu"), None, 0))


def test_one_file_holds_what_every_task_learned():
    names = load_file(FOLDERS["tiny"] / "model.safetensors")
    assert {name.split(".")[0] for name in names if not is_record(name)} == PARTS


@pytest.mark.slow
@pytest.mark.parametrize("what", ["reference", "text"])
def test_a_query_with_a_part_of_another_matches_its_target_less(shipped, queries, what):
    losses = {"own": [], "of another": []}
    for step, batch in enumerate(queries):
        features = batch["features"].clone()
        features[:, 0] = features[:, 0].roll(1, 0)
        others = {"ways": batch["ways"].roll(1, 0), "ways_mask": batch["ways_mask"].roll(1, 0)}
        changed = {**batch, "features": features} if what == "reference" else {**batch, **others}
        for name, asked in (("own", batch), ("of another", changed)):
            rng = BatchRNG("test", 0, step, len(features))
            with torch.no_grad():
                parts = objectives.composed(shipped, asked, rng, 1.0, ("itg", "q2i", "caption"))
            losses[name].append(parts["ITM"])
    own, of_another = (float(torch.stack(of).mean()) for of in losses.values())
    assert own < 0.45  # whoever only knows that a third are right has 0.64
    assert of_another > 2 * own
