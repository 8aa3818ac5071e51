"""What is learned, an objective at a time: against UniFashion's own code (goldens `blip2_cls`, `blip2_cir`), then part by part."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import goldens
from tests.parity import assert_parity, randomise
from tests.small_runs import MINI
from tests.test_qformer import blip2
from unifashion import diffusion, feed, losses, objectives
from unifashion.model import UniFashion
from unifashion.training import BatchRNG, seeded

pytestmark = pytest.mark.usefixtures("one_thread")

B = 5

# The official code


def test_cross_equals_the_official_code(monkeypatch):
    """Given its negatives. Its gradients are of a sum with BERT's own LM loss, which ours has not."""
    golden, model = official("blip2_cls", monkeypatch)
    inputs = golden.inputs
    batch = {
        "features": model.vit(inputs["image"]),
        "ids": inputs["text_ids"],
        "mask": inputs["text_mask"],
        "product": torch.arange(4),
    }
    parts = objectives.cross(model, batch, BatchRNG("cross", 0, 0, 4), 1.0)
    assert_parity(parts["ITC"], golden.outputs["loss_itc"])
    assert_parity(parts["ITM"], golden.outputs["loss_itm"])


def test_composed_equals_the_official_code_where_it_does_not_differ_on_purpose(monkeypatch):
    """
    Given its negatives, and put back for the comparison what the original does otherwise:

    - a second set of queries, `prompt_tokens`, reads the targets, and matches: ours are the one set, and Z_R (Eq. 10)
    - ITM's text is the target's caption, but of wrong queries the modification: ours is always the modification
    - captions are compared with the 32 queries of the fused pass, one way: ours with its [CLS], both ways
    """
    golden, model = official("blip2_cir", monkeypatch)
    inputs, out, qformer = golden.inputs, golden.outputs, model.qformer
    caption = inputs["target_caption_ids"], inputs["target_caption_mask"]
    read = qformer.forward

    def as_the_original(image=None, ids=None, mask=None, queries=None):
        prompt = model.prompt.expand(len(image), -1, -1) if image is not None else None
        if queries is not None:  # ITM
            ids = torch.cat([caption[0], caption[0], ids[8:]])
            mask = torch.cat([caption[1], caption[1], mask[8:]])
            return read(image, ids, mask, prompt)
        return read(image, ids, mask, prompt if ids is None else None)

    monkeypatch.setattr(qformer, "forward", as_the_original)
    reference, target = model.vit(inputs["image"]), model.vit(inputs["target"])
    batch = {
        "features": torch.stack([reference, target], 1),
        "ways": inputs["text_ids"][:, None].expand(-1, 4, -1),
        "ways_mask": inputs["text_mask"][:, None].expand(-1, 4, -1),
        "target_id": torch.arange(4),
    }
    parts = objectives.composed(model, batch, BatchRNG("cir", 0, 0, 4), 1.0, ("itg", "q2i", "caption"))
    assert parts.keys() == {"ITC", "ITM"}
    assert_parity(parts["ITC"], out["loss_itc"])
    assert_parity(parts["ITM"], out["loss_itm"])

    z_r, _ = read(qformer.ln_vision(reference), inputs["text_ids"], inputs["text_mask"])
    _, words = read(ids=caption[0], mask=caption[1])
    sim = losses.similarity(qformer.embed_image(z_r), qformer.embed_text(words)) / qformer.temp
    parts["TTC"] = F.cross_entropy(sim, torch.arange(4))
    assert_parity(parts["TTC"], out["loss_ttc"])

    # what these losses teach, too, is the original's
    sum(parts.values()).backward()
    for name, p in {
        "ln_vision.weight": qformer.ln_vision.weight,
        "query_tokens": qformer.query_tokens,
        "prompt_tokens": model.prompt,
        "temp": qformer.temp,
        "itm_head.weight": qformer.itm_head.weight,
        "vision_proj.weight": qformer.vision_proj.weight,
        "text_proj.bias": qformer.text_proj.bias,
        "Qformer.bert.embeddings.word_embeddings.weight": qformer.word_embeddings.weight,
        "Qformer.bert.encoder.layer.0.crossattention.self.key.weight": qformer.layers[0].cross.k.weight,
    }.items():
        torch.testing.assert_close(p.grad, out[f"grad.{name}"], rtol=1e-7, atol=1e-9)


def test_captions_are_compared_with_the_cls_of_the_fused_pass_both_ways():
    model, batch = randomise(UniFashion(MINI), 0), composed_batch()
    parts = objectives.composed(model, batch, BatchRNG("cir", 0, 0, B), 0.0, ("itg", "q2i"))
    way = BatchRNG("cir", 0, 0, B).categorical(torch.ones(B, 4))
    ids, mask = batch["ways"][range(B), way], batch["ways_mask"][range(B), way]
    _, text = model.qformer(model.qformer.ln_vision(batch["features"][:, 0]), ids, mask)
    _, words = model.qformer(ids=batch["caption_ids"], mask=batch["caption_mask"])
    sim = model.qformer.embed_text(words) @ model.qformer.embed_text(text).T / model.qformer.temp
    target = torch.arange(B)
    assert_parity(parts["ITC caption"], F.cross_entropy(sim, target) + F.cross_entropy(sim.T, target), 1e-7)


# Negatives


def test_hard_negatives_are_alike_and_never_belong_together():
    sim = torch.eye(6)
    sim[0, 3] = sim[3, 0] = 0.9
    same = torch.eye(6, dtype=torch.bool)
    same[1, 2] = same[2, 1] = True
    sim[1, 2] = sim[2, 1] = 0.99
    for seed in range(50):
        text, image = losses.hard_negatives(sim, torch.tensor(0.05), same, seeded(seed))
        for chosen in (text, image):
            assert not same[torch.arange(6), chosen].any()
            assert chosen[0] == 3 and chosen[3] == 0


def test_hard_negatives_survive_a_batch_that_all_belongs_together():
    same = torch.ones(4, 4, dtype=torch.bool)
    text, _ = losses.hard_negatives(torch.eye(4), torch.tensor(0.07), same, seeded(0))
    assert (text != torch.arange(4)).all()


def test_where_a_run_has_diverged_negatives_are_drawn_all_the_same():
    """A loss that is nan is told where the losses are shown, some steps later, and not here."""
    same = torch.eye(4, dtype=torch.bool)
    for broken in (float("nan"), float("inf")):
        for chosen in losses.hard_negatives(torch.full((4, 4), broken), torch.tensor(0.07), same, seeded(0)):
            assert (chosen != torch.arange(4)).all()


def test_the_reference_itself_is_a_candidate_beside_the_targets_for_its_own_query_alone():
    sim, same = torch.zeros(4, 4), torch.eye(4, dtype=torch.bool)
    sim_extra = torch.tensor([1.0, -1.0, 0.0, 1.0])  # much more alike, much less, as the others
    drawn = [losses.hard_negatives(sim, torch.tensor(0.05), same, seeded(i), sim_extra) for i in range(300)]
    texts, images = (torch.stack(x) for x in zip(*drawn, strict=True))
    assert (images[:, [0, 3]] == 4).all() and (images[:, 1] < 4).all()
    share = (images[:, 2] == 4).float().mean().item()
    assert share == pytest.approx(1 / 4, abs=0.08)  # of three targets and itself
    assert texts.max() < 4  # of wrong texts for an image there are no more than before
    alone = losses.hard_negatives(sim, torch.tensor(0.05), torch.ones_like(same), seeded(0), sim_extra)[1]
    assert (alone == 4).all()  # all targets are the same: the reference is what is left


def test_itm_is_low_only_when_matches_and_mismatches_are_told_apart():
    yes, no = torch.tensor([[-5.0, 5.0]]), torch.tensor([[5.0, -5.0]])
    right = losses.itm(yes.repeat(3, 1), no.repeat(6, 1))
    assert right < 1e-3
    assert losses.itm(no.repeat(3, 1), yes.repeat(6, 1)) > 5


def test_itm_of_pairs_reads_matches_then_wrong_texts_then_wrong_images():
    model, batch = randomise(UniFashion(MINI), 0), pairs_batch()
    batch["product"] = torch.tensor([0, 1, 2, 3, 3])
    passes = passed(model)
    objectives.cross(model, batch, BatchRNG("align", 0, 0, B), 1.0)
    image, text, _, queries = passes[-1]
    assert queries is None
    shown, said = which(image, model.qformer.ln_vision(batch["features"])), which(text, batch["ids"])
    assert shown[: 2 * B] == [*range(B)] * 2 and said[:B] == said[2 * B :] == [*range(B)]
    product = batch["product"].tolist()
    assert all(product[i] != product[j] for i, j in zip(shown[B:], said[B:], strict=True))


def test_texts_that_are_the_same_are_never_each_others_negatives():
    model, batch = randomise(UniFashion(MINI), 0), pairs_batch()
    batch["ids"][4] = batch["ids"][0]
    passes = passed(model)
    for step in range(20):
        objectives.cross(model, batch, BatchRNG("align", 0, step, B), 0.0)
        image, text, *_ = passes[-1]
        shown, said = which(image, model.qformer.ln_vision(batch["features"])), which(text, batch["ids"])
        wrong = [{i % 4, j % 4} for i, j in zip(shown[B:], said[B:], strict=True)]  # 4 is 0
        assert all(len(pair) == 2 for pair in wrong)


def test_itm_of_composed_reads_targets_wrong_targets_and_wrong_queries():
    """A query is (reference, text), of which Z_R and the text go together; the reference itself may be the wrong target."""
    model, batch = randomise(UniFashion(MINI), 0), composed_batch()
    batch["target_id"] = torch.tensor([0, 1, 2, 3, 3])
    batch["features"][4, 1] = batch["features"][3, 1]
    qformer, passes, seen = model.qformer, passed(model), set()
    reference, target = (qformer.ln_vision(x) for x in batch["features"].unbind(1))
    for step in range(30):
        passes.clear()
        rng = BatchRNG("cir", 0, step, B)
        way = BatchRNG("cir", 0, step, B).categorical(torch.ones(B, 4))
        objectives.composed(model, batch, rng, 0.0, ("itg", "q2i", "caption"))
        ids, mask = batch["ways"][range(B), way], batch["ways_mask"][range(B), way]
        assert torch.equal(passes[0][0], reference) and torch.equal(passes[0][1], ids)  # Eq. 9
        z_r, _ = model.qformer(reference, ids, mask)
        image, text, shown_mask, queries = passes[-2]  # the last is ours
        candidates = torch.cat([target, reference])
        shown, said, asked = which(image, candidates), which(text, ids), which(queries, z_r)
        assert torch.equal(shown_mask, mask[said])
        first = {3: 3, 4: 3}  # two targets are one picture
        assert shown[:B] == [first.get(i, i) for i in range(B)] == shown[2 * B :]
        assert said == asked and said[: 2 * B] == [*range(B)] * 2
        for i, j in enumerate(shown[B : 2 * B]):  # a wrong target: another one, or the query's own reference
            assert j == B + i or (j < B and first.get(j, j) != first.get(i, i)), (i, j)
            seen.add("reference" if j >= B else "target")
        for i, j in enumerate(said[2 * B :]):
            assert first.get(i, i) != first.get(j, j), (i, j)
    assert seen == {"reference", "target"}


def test_shuffled_references_are_seen_by_itm():
    """Trained on four triplets until it knows them; with Z_R of another's reference it does not."""
    model = randomise(UniFashion(MINI, draws=False), 0).float()
    model.qformer.temp.data.fill_(0.07)
    batch = {k: v.float() if v.is_floating_point() else v for k, v in composed_batch(4).items()}
    batch["ways"][:] = batch["ways"][0, 0].clone()  # one text for all: only the reference tells
    batch["ways_mask"][:] = True
    reference, target = batch["features"].unbind(1)
    shuffled = batch | {"features": torch.stack([reference.roll(1, 0), target], 1)}
    optimizer = torch.optim.Adam(model.qformer.parameters(), lr=1e-3)

    def itm(batch: dict[str, Tensor], step: int) -> Tensor:
        rng = BatchRNG("cir", 0, step, 4)
        return objectives.composed(model, batch, rng, 0.0, ("itg", "q2i", "caption"))["ITM"]

    for step in range(80):
        optimizer.zero_grad()
        itm(batch, step).backward()
        optimizer.step()
    with torch.no_grad():
        right, wrong = (sum(itm(x, step) for step in range(8)) / 8 for x in (batch, shuffled))
    assert right < 0.1 and wrong > 1


@pytest.mark.parametrize("task", ["cross", "composed"])
def test_negatives_are_as_hard_as_is_asked_and_the_temperature_keeps_its_bounds(task, monkeypatch):
    model, seen = randomise(UniFashion(MINI), 0), []
    model.qformer.temp.data.fill_(0.07)
    batch = pairs_batch() if task == "cross" else composed_batch()
    real = losses.hard_negatives

    def noted(sim, temp, same, generator, *own):
        seen.append([x.detach().abs().max() for x in (sim, *own)])
        return real(sim, temp, same, generator, *own)

    def value(hardness: float) -> None:
        rng = BatchRNG(task, 0, 0, B)
        if task == "cross":
            objectives.cross(model, batch, rng, hardness)
        else:
            objectives.composed(model, batch, rng, hardness, ("itg", "q2i", "caption"))

    monkeypatch.setattr(losses, "hard_negatives", noted)
    for hardness in (0.0, 0.5, 1.0):
        value(hardness)
    measured = torch.tensor(seen)
    assert measured.shape[1] == (1 if task == "cross" else 2)
    for column in measured.T:
        torch.testing.assert_close(column / column[-1], torch.tensor([0.0, 0.5, 1.0]).to(column))
    for wild, kept in ((9.0, 0.5), (-1.0, 0.001)):
        model.qformer.temp.data.fill_(wild)
        value(1.0)
        assert model.qformer.temp.item() == pytest.approx(kept)


# What each loss teaches

LOSSES = {
    "ITC of pairs": ("cross", "ITC"),
    "ITM of pairs": ("cross", "ITM"),
    "ITG": ("caption", "ITG"),
    "q2I": ("generate", "q2I"),
    "ITC of composed": ("composed", "ITC"),
    "ITC of composed and captions": ("composed", "ITC caption"),
    "ITM of composed": ("composed", "ITM"),
    "ITG of composed": ("composed", "ITG"),
    "q2I of composed": ("composed", "q2I"),
    "q2I of try-on": ("tryon", "q2I"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_alone_reaches_queries_and_ln_vision(name):
    task, part = LOSSES[name]
    torch.manual_seed(0)
    model = randomise(UniFashion(MINI, writes=True), 0)
    model.qformer.temp.data.fill_(0.07)
    batch = everything() if task in ("composed", "tryon") else single(everything())
    parts = getattr(objectives, task)(model, batch, BatchRNG(task, 0, 0, B), 1.0)
    wanted = {t[1] for t in LOSSES.values() if t[0] == task}
    assert parts.keys() == wanted
    parts[part].backward()
    q = model.qformer
    graded = {k for k, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 1e-9}
    assert {"qformer.query_tokens", "qformer.ln_vision.weight", "qformer.layers.0.cross.k.weight"} <= graded
    heads = {"vision_proj", "text_proj", "itm_head", "temp"}
    reached = {k.split(".")[1] for k in graded if k.startswith("qformer.")} & heads
    assert reached == {
        "ITC": {"vision_proj", "text_proj", "temp"},
        "ITC caption": {"text_proj", "temp"},
        "ITM": {"itm_head"},
    }.get(part, set())
    assert ("qformer.word_embeddings.weight" in graded) == (task not in ("caption", "generate"))
    assert {k.split(".")[0] for k in graded if not k.startswith("qformer.")} == {
        "ITG": {"text_adapter", "llama"},
        "q2I": {"image_adapter", "style_adapter", "unet", "null_context"},
    }.get(part, set()) - ({"null_context"} if task == "composed" else set()) | (
        {"garment"} if task == "tryon" else set()
    )
    assert q.query_tokens.grad.isfinite().all()


def test_a_frozen_qformer_is_read_once_and_learns_nothing():
    model = randomise(UniFashion(MINI, writes=True), 0)
    batch = single(everything())
    kept = batch | {"z": objectives.z_i(model, batch).detach()}
    del kept["features"]
    for task in ("caption", "generate"):
        value = [getattr(objectives, task)(model, x, BatchRNG(task, 0, 0, B), 0.0) for x in (batch, kept)]
        assert value[0].keys() == value[1].keys()
        for name in value[0]:
            torch.testing.assert_close(value[0][name], value[1][name], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("without", "left"),
    [
        ((), {"ITC", "ITC caption", "ITM", "ITG", "q2I"}),
        (("q2i",), {"ITC", "ITC caption", "ITM", "ITG"}),
        (("q2i", "caption"), {"ITC", "ITM", "ITG"}),
        (("itg", "q2i", "caption"), {"ITC", "ITM"}),
        (("itg",), {"ITC", "ITC caption", "ITM", "q2I"}),
    ],
)
def test_parts_of_composed_are_left_out_and_change_no_other(without, left):
    """The rows of Table 5: what is left out needs neither its half of the model nor its part of the batch."""
    whole = randomise(UniFashion(MINI, writes=True), 0)
    batch = everything()
    expected = objectives.composed(whole, batch, BatchRNG("cir", 0, 0, B), 1.0)
    if "q2i" in without:
        del whole.unet, whole.vae
        batch = {k: v for k, v in batch.items() if k not in ("mean", "logvar")}
    if "itg" in without:
        del whole.llama
        batch = {k: v for k, v in batch.items() if k not in ("before", "after", "answer")}
    if "caption" in without:
        batch = {k: v for k, v in batch.items() if k not in ("caption_ids", "caption_mask")}
    parts = objectives.composed(whole, batch, BatchRNG("cir", 0, 0, B), 1.0, without)
    assert parts.keys() == left
    for name in left:
        assert torch.equal(parts[name], expected[name])


def test_what_is_read_and_drawn_of_composed_is_z_r(monkeypatch):
    """Eq. 11 and 12: the prompt and the context are of the queries that read reference and text, the answers the target's."""
    model, batch = randomise(UniFashion(MINI, writes=True), 0), everything()
    rng = BatchRNG("cir", 0, 0, B)
    way = BatchRNG("cir", 0, 0, B).categorical(torch.ones(B, 4))
    ids, mask = batch["ways"][range(B), way], batch["ways_mask"][range(B), way]
    z_r, _ = model.qformer(model.qformer.ln_vision(batch["features"][:, 0]), ids, mask)
    read, drawn = [], []
    words, noise = model.predict_words, model.predict_noise
    monkeypatch.setattr(model, "predict_words", lambda *a: (read.append(a), words(*a))[1])
    monkeypatch.setattr(model, "predict_noise", lambda *a: (drawn.append(a), noise(*a))[1])
    parts = objectives.composed(model, batch, rng, 1.0)
    [(z, before, after)], [(_, _, scene, context, hint, keep_hint)] = read, drawn
    assert (
        torch.equal(z, z_r) and torch.equal(after, batch["after"]) and torch.equal(before, batch["before"][0])
    )
    itg = losses.itg(words(z_r, before, after), after, batch["answer"])
    assert torch.equal(parts["ITG"], itg)
    assert torch.equal(context, model.image_adapter(z_r))  # never the null context: nothing is dropped
    assert torch.equal(scene, model.blank_scene(B)) and hint is None and keep_hint is None


def test_the_four_ways_of_joining_captions_are_drawn_evenly():
    """And of each sample ids and mask are of the same way."""
    n = 2000
    model, batch = randomise(UniFashion(MINI, draws=False), 0), composed_batch(2)
    model.vit = None
    batch = {k: v[:1].expand(n, *v.shape[1:]) for k, v in batch.items()}
    batch["ways"] = torch.arange(4)[None, :, None].expand(n, -1, 6) + 5
    batch["ways_mask"] = torch.arange(6) < torch.arange(4)[None, :, None].expand(n, -1, 1) + 2
    seen = passed(model, stop=True)
    with pytest.raises(StopIteration):
        objectives.composed(model, batch, BatchRNG("cir", 0, 0, n), 0.0, ("itg", "q2i", "caption"))
    _, ids, mask, _ = seen[0]
    way = ids[:, 0] - 5
    assert (ids == ids[:, :1]).all() and torch.equal(mask.sum(1), way + 2)
    share = torch.bincount(way, minlength=4) / n
    assert (share - 1 / 4).abs().max() < 0.03


# q2I


@pytest.mark.parametrize("task", ["generate", "tryon", "composed"])
def test_q2i_learns_the_noise_that_was_added_and_drops_as_often_as_it_says(task, monkeypatch):
    """x_t is the latent of the picture, noised as t says with the noise that is asked for; the rates are the table's."""
    n, (y, x), q = 2000, (2, 2), MINI.qformer
    model = UniFashion(MINI)
    torch.nn.init.normal_(model.null_context)
    asked, given = [], []
    monkeypatch.setattr(model, "predict_noise", lambda *a: (asked.append(a), torch.zeros(n, 4, y, x))[1])
    monkeypatch.setattr(model, "q2i", lambda *a: (given.append(a), torch.zeros(()))[1])
    monkeypatch.setattr(model, "blank_scene", lambda b: torch.zeros(b, 9, y, x))
    z = torch.randn(n, q.queries, q.dim)
    monkeypatch.setattr(objectives, "z_of_condition", lambda *_: z)
    batch = {"mean": torch.randn(n, 4, y, x), "logvar": torch.full((n, 4, y, x), -30.0), "z": z}
    batch |= {name: torch.ones(n, c, y, x) for name, c in (("agnostic", 4), ("keep", 1), ("pose", 4))}
    batch |= {"hints": torch.randn(n, 2, 4, y, x), "odds": torch.ones(n, 4)}

    def go() -> None:
        rng = BatchRNG(task, 0, 0, n)
        if task == "composed":  # Eq. 12, after the rest
            objectives._q2i(model, batch, model.image_adapter(z), rng)
        else:
            getattr(objectives, task)(model, batch, rng, 0.0)

    go()
    noised, t, scene, context, _, keep_hint = asked[0]
    rates = {"generate": {"context": 0.2}, "composed": {"context": 0.0}}.get(task, objectives.DROP)
    if task == "tryon":
        assert 1 - keep_hint.mean().item() == pytest.approx(rates["hint"], abs=0.03)
        gone = (scene[:, 5:] == 0).all((1, 2, 3))
        assert gone.float().mean().item() == pytest.approx(rates["pose"], abs=0.03)
        assert (scene[:, :5] == 1).all()
    else:
        assert keep_hint is None
    null = (context == model.null_context).all((1, 2)).float().mean().item()
    assert null == pytest.approx(rates["context"], abs=0.04)
    _, noise, t_of_loss = given[0]
    assert torch.equal(t, t_of_loss) and t.min() < 20 and t.max() > 979 and abs(t.float().mean() - 499.5) < 30
    signal = diffusion.alphas_cumprod(torch.device("cpu"))[t].sqrt()[:, None, None, None]
    expected = signal * batch["mean"] * MINI.vae.scale + (1 - signal**2).sqrt() * noise
    torch.testing.assert_close(noised, expected.float(), atol=1e-5, rtol=0)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    batch["logvar"] = torch.full((n, 4, y, x), 2 * math.log(5.0))
    batch["mean"] = torch.zeros(n, 4, y, x)
    go()
    drawn = asked[1][0] - (1 - signal**2).sqrt() * given[1][1]  # what is left is a draw of the VAE's own
    spread = (drawn / signal)[t < 300].std().item()
    assert spread == pytest.approx(5 * MINI.vae.scale, rel=0.05)


@pytest.mark.parametrize("dropped", [None, *objectives.DROP])
def test_what_is_dropped_for_certain_cannot_change_the_loss_and_what_never_is_does(dropped, monkeypatch):
    for name in objectives.DROP:
        monkeypatch.setitem(objectives.DROP, name, float(name == dropped))
    model, batch, other = randomise(UniFashion(MINI), 0), everything(), everything(1)
    before = tryon(model, batch)
    for name, key in {"context": "features", "pose": "pose", "hint": "hints"}.items():
        after = tryon(model, batch | {key: other[key]})
        assert torch.equal(before, after) == (name == dropped), name


@pytest.mark.parametrize("chosen", range(4))
def test_context_and_hint_are_of_the_one_condition_that_was_drawn(chosen, monkeypatch):
    """cloth, cloth and text, sketch and text, sketch: nothing of the others reaches the loss."""
    monkeypatch.setattr(objectives, "DROP", dict.fromkeys(objectives.DROP, 0.0))
    model, batch, other = randomise(UniFashion(MINI), 0), everything(), everything(1)
    batch["odds"] = torch.eye(4)[chosen].expand(B, 4)
    before = tryon(model, batch)
    is_sketch, uses_text = chosen >= 2, chosen in (1, 2)
    for key in ("features", "hints"):
        for i in (0, 1):
            changed = batch[key].clone()
            changed[:, i] = other[key][:, i]
            same = torch.equal(before, tryon(model, batch | {key: changed}))
            assert same == (i != is_sketch), (key, i)
    text = tryon(model, batch | {"ids": other["ids"]})
    assert (before - text).abs() > 1e-9 if uses_text else torch.equal(before, text)


def test_z_of_a_condition_sees_its_text_and_without_one_is_z_of_the_picture():
    model, batch = randomise(UniFashion(MINI), 0), everything()
    is_sketch = torch.tensor([0, 1, 0, 1, 0])
    uses_text = torch.tensor([False, False, True, True, True])
    z = objectives.z_of_condition(model, batch, is_sketch, uses_text)
    for i in range(B):
        seen = model.qformer.ln_vision(batch["features"][i : i + 1, int(is_sketch[i])])
        text = (batch["ids"][i : i + 1], batch["mask"][i : i + 1]) if uses_text[i] else ()
        torch.testing.assert_close(z[i : i + 1], model.qformer(seen, *text)[0], atol=1e-12, rtol=0)


def test_conditions_are_drawn_as_often_as_their_odds_say():
    odds = torch.tensor([[0.3, 0.1, 0.5, 0.1]]).expand(3000, 4).clone()
    odds[2000:] = torch.tensor([1.0, 0.0, 0.0, 0.0])  # without sketch or text
    chosen = BatchRNG("tryon", 0, 0, 3000).categorical(odds)
    share = torch.bincount(chosen[:2000], minlength=4) / 2000
    assert (share - odds[0]).abs().max() < 0.03 and (chosen[2000:] == 0).all()


def test_a_dropped_context_is_the_null_vector_for_that_sample_only():
    model = UniFashion(MINI)
    torch.nn.init.normal_(model.null_context)
    context = torch.randn(3, 4, MINI.unet.context_dim)
    dropped = model.drop_context(context, torch.tensor([True, False, True]))
    assert torch.equal(dropped[0], context[0]) and torch.equal(dropped[2], context[2])
    assert torch.equal(dropped[1], model.null_context[0].expand(4, -1))


# The frozen half


def test_what_the_frozen_networks_say_goes_to_its_place():
    """Reference before target, cloth before sketch; pieces of the VAE's batch are the whole; texts are passed on."""
    model = randomise(UniFashion(MINI), 0)
    y, x = MINI.picture
    generator = torch.Generator().manual_seed(0)
    made = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    texts = {"ids": torch.arange(34), "index": torch.arange(34), "target_id": torch.arange(34)}
    pictures, drawn = made(34, 2, 3, 28, 28), made(34, 3, y, x)
    with torch.no_grad():
        mean, logvar = model.vae.moments(drawn)
        both = [model.vit(pictures[:, i]) for i in (0, 1)]
    composed = objectives.encode_composed(model, {"pictures": pictures, "x0": drawn, **texts})
    assert composed.keys() == {"features", "mean", "logvar", *texts}
    for i in (0, 1):
        torch.testing.assert_close(composed["features"][:, i], both[i], atol=1e-12, rtol=0)
    torch.testing.assert_close(composed["mean"], mean, atol=1e-12, rtol=0)
    torch.testing.assert_close(composed["logvar"], logvar, atol=1e-12, rtol=0)
    assert objectives.encode_composed(model, {"pictures": pictures}).keys() == {"features"}  # without q2i

    few = {"person": drawn[:2], "agnostic": drawn[2:4], "pose": drawn[4:6], "pictures": pictures[:2]}
    few |= {"hints": torch.stack([drawn[6:8], drawn[8:10]], 1), "keep": made(2, 1, 4, 4), "odds": made(2, 4)}
    scene = objectives.encode_tryon(model, few)
    with torch.no_grad():
        for name, i in (("agnostic", 2), ("pose", 4)):
            torch.testing.assert_close(scene[name], model.vae.encode(drawn[i : i + 2]), atol=1e-12, rtol=0)
        for j, i in ((0, 6), (1, 8)):
            torch.testing.assert_close(
                scene["hints"][:, j], model.vae.encode(drawn[i : i + 2]), atol=1e-12, rtol=0
            )
            torch.testing.assert_close(scene["features"][:, j], both[j][:2], atol=1e-12, rtol=0)
    torch.testing.assert_close(scene["mean"], mean[:2], atol=1e-12, rtol=0)
    assert torch.equal(scene["keep"], few["keep"]) and torch.equal(scene["odds"], few["odds"])

    pair = {"picture": pictures[:2, 0], "x0": drawn[:2], "ids": texts["ids"][:2]}
    torch.testing.assert_close(
        objectives.encode_picture(model, pair)["features"], both[0][:2], atol=1e-12, rtol=0
    )
    seen = objectives.encode_generate(model, pair)
    z = objectives.z_i(model, {"features": both[0][:2]}).detach()
    torch.testing.assert_close(seen["z"], z, atol=1e-12, rtol=0)
    torch.testing.assert_close(seen["mean"], mean[:2], atol=1e-12, rtol=0)
    assert objectives.encode_z(model, pair).keys() == {"z", "ids"}
    assert not any(v.requires_grad for batch in (composed, scene, seen) for v in batch.values())


def test_padding_of_texts_changes_no_loss():
    """What lets `feed.shorten` cut it: whatever stands behind a text, and however much."""
    model, batch = randomise(UniFashion(MINI, writes=True), 0), everything()
    padded = dict(batch)
    for ids, mask in feed.TEXT_MASKS.items():
        padded[ids] = F.pad(batch[ids], (0, 5), value=7)
        padded[mask] = F.pad(batch[mask], (0, 5), value=False)
    for loss, of in ((objectives.cross, single), (objectives.composed, dict), (objectives.tryon, dict)):
        a, b = (loss(model, of(x), BatchRNG("padding", 0, 0, B), 1.0) for x in (batch, padded))
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-10, rtol=0)


# Helpers


def official(case: str, monkeypatch: pytest.MonkeyPatch) -> tuple[goldens.Golden, SimpleNamespace]:
    """The original's weights, read by the production tables, in our Q-Former; the original's negatives are drawn."""
    golden, parts = blip2(case)
    drawn = golden.outputs["neg_text_idx"], golden.outputs["neg_image_idx"]
    monkeypatch.setattr(losses, "hard_negatives", lambda *_: drawn)
    prompt = parts["prompt_tokens"].weight if "prompt_tokens" in parts else None
    return golden, SimpleNamespace(vit=parts["vit"], qformer=parts["qformer"], prompt=prompt)


def pairs_batch(b: int = B) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(0)
    return {
        "features": torch.randn(b, 5, MINI.vit.dim, generator=made, dtype=torch.float64),
        "ids": torch.randint(5, 200, (b, 6), generator=made),
        "mask": torch.arange(6) < torch.randint(2, 7, (b, 1), generator=made),
        "product": torch.arange(b),
    }


def composed_batch(b: int = B) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(1)
    return {
        "features": torch.randn(b, 2, 5, MINI.vit.dim, generator=made, dtype=torch.float64),
        "ways": torch.randint(5, 200, (b, 4, 6), generator=made),
        "ways_mask": torch.arange(6) < torch.randint(2, 7, (b, 4, 1), generator=made),
        "caption_ids": torch.randint(5, 200, (b, 6), generator=made),
        "caption_mask": torch.arange(6) < torch.randint(2, 7, (b, 1), generator=made),
        "target_id": torch.arange(b),
    }


def everything(seed: int = 0) -> dict[str, Tensor]:
    """All that any objective reads, for one batch."""
    made, (y, x) = torch.Generator().manual_seed(seed), MINI.latent
    shapes = {name: (4, y, x) for name in ("mean", "logvar", "agnostic", "pose")}
    shapes |= {"keep": (1, y, x), "hints": (2, 4, y, x), "features": (2, 5, MINI.vit.dim)}
    batch = {k: torch.randn(B, *shape, generator=made, dtype=torch.float64) for k, shape in shapes.items()}
    batch |= {
        "ids": torch.randint(5, 200, (B, 6), generator=made),
        "mask": torch.ones(B, 6, dtype=torch.bool),
    }
    batch |= {
        "before": torch.arange(3).expand(B, -1),
        "after": torch.randint(3, 1000, (B, 9), generator=made),
    }
    batch |= {"answer": torch.arange(9) > torch.tensor([[2], [3], [4], [5], [6]]), "odds": torch.ones(B, 4)}
    return composed_batch() | batch | {"product": torch.arange(B)}


def single(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """With one picture a sample."""
    return batch | {"features": batch["features"][:, 0]}


def tryon(model: UniFashion, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return objectives.tryon(model, batch, BatchRNG("tryon", 0, 0, B), 0.0)["q2I"]


def passed(model: UniFashion, stop: bool = False) -> list[tuple]:
    """What is passed to the Q-Former from here on: image, ids, mask and queries of each pass."""
    passes, read = [], model.qformer.forward

    def noted(image=None, ids=None, mask=None, queries=None):
        passes.append((image, ids, mask, queries))
        if stop:
            raise StopIteration
        return read(image, ids, mask, queries)

    model.qformer.forward = noted
    return passes


def which(rows: Tensor, candidates: Tensor) -> list[int]:
    """Of each row the first of the candidates that it is."""
    same = ((rows[:, None] - candidates[None]).abs().flatten(2) < 1e-12).all(-1)
    assert same.any(1).all()
    return same.int().argmax(1).tolist()
