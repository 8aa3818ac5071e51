"""ITG, Eq. 6, from the samples of `samples.Answers` to the number: what is predicted, from what, and what counts."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.faults import plant
from tests.parity import randomise
from tests.rooms import SMALL
from unifashion import feed, lora, losses, model, objectives
from unifashion.llama import LlamaConfig
from unifashion.model import UniFashion
from unifashion.preprocess import qformer_image
from unifashion.samples import Answers
from unifashion.tokenizers import INSTRUCTIONS, SentencePiece, prompt
from weights.load import FOLDERS

CFG = replace(
    SMALL, llama=LlamaConfig(1024, dim=32, depth=2, heads=4, mlp_dim=48, context=128), max_caption=24
)
TEXTS = ("red dress", "a blue shirt with white dots and long sleeves", "green jacket")


@pytest.fixture(scope="module")
def words() -> SentencePiece:
    return SentencePiece(FOLDERS["tiny"] / "llama_tokenizer.model")


@pytest.fixture
def writer() -> UniFashion:
    return randomise(UniFashion(CFG, draws=False, writes=True), 0).float()


class Shop:
    """A data set with one of TEXTS to each picture."""

    def __init__(self, texts: tuple[str, ...] = TEXTS) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> dict:
        return {"image": Image.new("RGB", (30, 40), (80 * i, 90, 200)), "text": self.texts[i]}


# what is computed of the logits


def test_itg_is_the_mean_of_a_captions_tokens_and_then_of_the_captions():
    logits, ids = torch.randn(3, 6, 11, dtype=torch.float64), torch.randint(11, (3, 6))
    spans = [(1, 2), (2, 6), (0, 3)]  # of 1, 4 and 3 tokens
    answer = torch.zeros(3, 6, dtype=torch.bool)
    means = []
    for row, (first, end) in enumerate(spans):
        answer[row, first:end] = True
        p = [logits[row, i].softmax(0)[ids[row, i]] for i in range(first, end)]
        means.append(sum(-x.log() for x in p) / (end - first))
    torch.testing.assert_close(losses.itg(logits, ids, answer), sum(means) / 3, atol=1e-12, rtol=0)
    one = (
        torch.stack(means).mul(torch.tensor([1, 4, 3])).sum() / 8
    )  # a mean over all tokens is another number
    assert (losses.itg(logits, ids, answer) - one).abs() > 1e-3


def test_only_the_captions_own_tokens_count():
    logits, ids = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    answer = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    before = losses.itg(logits, ids, answer)
    for column in range(5):
        for row in range(2):
            changed, other = logits.clone(), ids.clone()
            changed[row, column] = torch.randn(11)
            other[row, column] = (ids[row, column] + 1) % 11
            assert torch.equal(losses.itg(changed, ids, answer), before) != answer[row, column]
            assert torch.equal(losses.itg(logits, other, answer), before) != answer[row, column]


# what the samples say


@pytest.mark.parametrize("style", INSTRUCTIONS)
def test_a_sample_is_the_template_of_its_style_the_answer_and_its_end(style, words):
    samples = Answers({style: Shop()}, CFG, words)
    before, after = prompt(words, style)
    for i, text in enumerate(TEXTS):
        s = samples[i]
        assert s["before"].tolist() == before
        own = s["after"][s["answer"]].tolist()
        assert own[-1] == words.eos and words.decode(own) == text and words.eos not in own[:-1]
        assert s["after"][: len(after)].tolist() == after and not s["answer"][: len(after)].any()
        assert s["answer"].int().diff().clamp(min=0).sum() == 1  # in one piece
        assert (s["after"][len(after) + len(own) :] == words.eos).all()
        assert torch.equal(s["picture"], qformer_image(Shop()[i]["image"], 28))


def test_each_data_set_is_answered_in_its_own_style(words):
    styles = list(INSTRUCTIONS)
    samples = Answers({style: Shop(TEXTS[: i + 1]) for i, style in enumerate(styles)}, CFG, words)
    assert len(samples) == 6
    for i, style in enumerate([styles[0], *[styles[1]] * 2, *[styles[2]] * 3]):
        after = prompt(words, style)[1]
        start = int(samples[i]["answer"].int().argmax())
        assert samples[i]["after"][:start].tolist() == after
        assert INSTRUCTIONS[style] in words.decode(after).replace("  ", " ")
    assert {len(samples[i]["after"]) for i in range(6)} == {
        samples.answer.room
    }  # so that batches can be mixed


def test_a_caption_that_is_cut_has_no_end(words):
    long = ", ".join(["a red dress with white dots"] * 9)
    for text, room in ((long, CFG.max_caption), (long, 1)):
        samples = Answers({"fashion200k": Shop((text,))}, replace(CFG, max_caption=room), words)
        own = samples[0]["after"][samples[0]["answer"]].tolist()
        assert len(own) == room and words.eos not in own
    exact = words.encode("red dress", bos=False)
    for room, end in ((len(exact), False), (len(exact) + 1, True)):
        samples = Answers({"fashion200k": Shop(("red dress",))}, replace(CFG, max_caption=room), words)
        own = samples[0]["after"][samples[0]["answer"]].tolist()
        assert own == exact + [words.eos] * end


def test_a_batch_is_as_wide_as_its_longest_answer_in_steps_of_eight(words):
    samples = Answers({style: Shop() for style in INSTRUCTIONS}, CFG, words)
    every = [samples[i] for i in range(len(samples))]
    widths = set()
    for rows in ([0], [1], [8], [0, 4], list(range(9))):
        whole = torch.utils.data.default_collate([every[i] for i in rows])
        cut = feed.shorten(whole)
        longest = max(int(every[i]["answer"].nonzero().max()) + 1 for i in rows)
        width = cut["after"].shape[1]
        assert cut["answer"].shape[1] == width and longest <= width < longest + 8
        assert width % 8 == 0 or width == samples.answer.room
        assert torch.equal(cut["answer"].sum(1), whole["answer"].sum(1))  # no answer loses anything
        assert torch.equal(cut["after"], whole["after"][:, :width]) and cut["picture"] is whole["picture"]
        widths.add(width)
    assert len(widths) > 1
    full = {"after": torch.zeros(1, 16), "answer": torch.ones(1, 16, dtype=torch.bool)}
    assert feed.shorten(full)["after"].shape[1] == 16


def test_what_the_qformer_reads_is_as_wide_as_the_longest_text_of_all_processes(monkeypatch):
    def padded(*lengths: int) -> dict[str, Tensor]:
        mask = torch.arange(64) < torch.tensor(lengths)[:, None]
        return {"ids": torch.arange(64).expand(len(lengths), -1), "mask": mask, "index": torch.arange(2)}

    for lengths, width in (((2, 3), 8), ((8, 2), 8), ((2, 9), 16), ((64, 2), 64)):
        whole = padded(*lengths)
        cut = feed.shorten(whole)
        for name in ("ids", "mask"):
            assert torch.equal(cut[name], whole[name][:, :width])
        assert torch.equal(cut["mask"].sum(1), torch.tensor(lengths)) and cut["index"] is whole["index"]
    ways = padded(2, 9)
    cut = feed.shorten(
        {"ways": ways["ids"][None], "ways_mask": ways["mask"][None], "caption_ids": ways["ids"][:1],
         "caption_mask": ways["mask"][:1]}
    )  # fmt: skip
    assert cut["ways"].shape == cut["ways_mask"].shape == (1, 2, 16)
    assert cut["caption_ids"].shape == cut["caption_mask"].shape == (1, 8)
    monkeypatch.setattr(
        feed.parallel, "max_over_processes", lambda n: max(n, 20)
    )  # another process has a text of 20
    assert feed.shorten(padded(2, 3))["ids"].shape[1] == 24


def test_shortened_cached_or_whole_the_loss_is_the_same(words, writer):
    samples = Answers({style: Shop() for style in INSTRUCTIONS}, CFG, words)
    order = [[0, 5], [7, 2], [5, 8]]
    encode = lambda batch: objectives.encode_z(writer, batch)  # noqa: E731
    whole = [encode(torch.utils.data.default_collate([samples[i] for i in rows])) for rows in order]
    expected = [loss(writer, batch) for batch in whole]
    for cache in (None, {}):
        got = list(feed.batches(samples, iter(order), encode, cache))
        assert any(batch["after"].shape[1] < samples.answer.room for batch in got)
        torch.testing.assert_close([loss(writer, b) for b in got], expected, atol=2e-3, rtol=0)
        if cache is None:  # no rounding of Z
            torch.testing.assert_close([loss(writer, b) for b in got], expected, atol=1e-5, rtol=0)


# what is predicted from what


def shifted(writer: UniFashion, batch: dict[str, Tensor]) -> float:
    """How far `predict_words` is from the LLM asked for one token after the other, each after all that precede it."""
    z, before, ids = batch["z"], batch["before"][0], batch["after"]
    one_by_one = [
        writer.llama.logits(writer.llama(writer.soft_prompt(z, before, ids[:, :i]))[:, -1])
        for i in range(ids.shape[1])
    ]
    return (writer.predict_words(z, before, ids) - torch.stack(one_by_one, 1)).abs().max().item()


@pytest.mark.parametrize(
    "fault",
    [None, "hidden[:, -after.shape[1] :]", "hidden[:, -after.shape[1] - 2 : -2]"],
    ids=["right", "its own", "two before"],
)
@torch.no_grad()
def test_a_token_is_predicted_from_those_before_it(fault, words, writer, monkeypatch):
    if fault:
        plant(monkeypatch, model, "UniFashion.predict_words", "hidden[:, -after.shape[1] - 1 : -1]", fault)
    assert (shifted(writer, sample(words, writer)) < 1e-4) == (fault is None)


@pytest.mark.parametrize("fault", [None, "hidden[:, -after.shape[1] :]"], ids=["right", "shifted"])
def test_what_was_learned_by_itg_is_written(fault, words, monkeypatch):
    """Caught even where loss and logits are wrong together: a caption learned by heart comes back, and then its end."""
    if fault:
        plant(monkeypatch, model, "UniFashion.predict_words", "hidden[:, -after.shape[1] - 1 : -1]", fault)
    torch.manual_seed(0)
    writer = UniFashion(CFG, draws=False, writes=True)
    batch = sample(words, writer)
    batch["z"] = torch.randn(batch["z"].shape)
    learn = [*writer.text_adapter.parameters(), *writer.llama.parameters()]
    optimizer = torch.optim.Adam(learn, lr=1e-2)
    for _ in range(60):
        value = objectives.caption(writer, batch, None, 0.0)["ITG"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value < 0.1
    after = torch.tensor(prompt(words, "fashion200k")[1])
    ids = writer.write(batch["z"], batch["before"][0], after.expand(len(TEXTS), -1), 20, words.eos)
    written = [words.decode(row[: row.index(words.eos)]) if words.eos in row else "" for row in ids.tolist()]
    assert (written == list(TEXTS)) == (fault is None)


@torch.no_grad()
def test_the_loss_depends_on_z_the_template_and_the_answer_and_on_no_padding(words, writer):
    batch = sample(words, writer)
    before = loss(writer, batch)
    assert (loss(writer, batch | {"z": batch["z"].flip(0)}) - before).abs() > 1e-3
    assert (loss(writer, batch | {"before": batch["before"] + 1}) - before).abs() > 1e-3
    column = torch.arange(batch["after"].shape[1])
    start = batch["answer"].int().argmax(1)[:, None]
    end = start + batch["answer"].sum(1)[:, None]
    for name, where in {
        "template": column < start,
        "answer": batch["answer"],
        "padding": column >= end,
    }.items():
        assert where.any(), name
        changed = torch.where(where, (batch["after"] + 7) % 1000, batch["after"])
        difference = (loss(writer, batch | {"after": changed}) - before).abs()
        assert (difference < 1e-5) == (name == "padding"), name


@torch.no_grad()
def test_before_it_has_learned_lora_is_nothing(words, writer):
    batch = sample(words, writer)
    base = writer.predict_words(batch["z"], batch["before"][0], batch["after"])
    lora.inject(writer.llama, lora.LoRAConfig(rank=4, alpha=8.0, dropout=0.2))
    writer.train()
    assert torch.equal(writer.predict_words(batch["z"], batch["before"][0], batch["after"]), base)
    writer.llama.layers[0].mlp.up.lora_b.fill_(0.1)
    assert not torch.equal(writer.predict_words(batch["z"], batch["before"][0], batch["after"]), base)


# helpers


def sample(words: SentencePiece, writer: UniFashion) -> dict[str, Tensor]:
    """All of the shop as one batch, as `objectives.caption` gets it."""
    samples = Answers({"fashion200k": Shop()}, CFG, words)
    assert samples.answer.room == len(prompt(words, "fashion200k")[1]) + CFG.max_caption
    batch = torch.utils.data.default_collate([samples[i] for i in range(len(samples))])
    return objectives.encode_z(writer.eval(), feed.shorten(batch))


@torch.no_grad()
def loss(writer: UniFashion, batch: dict[str, Tensor]) -> Tensor:
    return objectives.caption(writer, batch, None, 0.0)["ITG"]
