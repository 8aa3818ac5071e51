"""From data sets to tensors, sample by sample, on the world that tests train in."""

import pytest
import torch

from tests.small_runs import MINI
from unifashion import UserError
from unifashion.data.fashioniq import joined
from unifashion.data.readers import DATA_SETS
from unifashion.preprocess import qformer_image
from unifashion.samples import (
    COMPOSED,
    CONDITIONS,
    PERSONS,
    TEXTS,
    Answers,
    Pairs,
    Scenes,
    Triplets,
    names,
    open_data,
    products,
)
from unifashion.tokenizers import INSTRUCTIONS, blip_caption, prompt
from unifashion.tryon import unet_picture
from weights.load import llm_tokenizer, tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


def opened(place, kinds: tuple[str, ...]) -> dict:
    return open_data([f"toy={place / 'toy'}"], kinds)


def test_toy_stands_for_one_data_set_of_each_layout_and_no_other_is_opened(place):
    assert list(opened(place, TEXTS)) == list(INSTRUCTIONS) == list(TEXTS)
    assert list(opened(place, COMPOSED)) == ["fashioniq"]
    assert list(opened(place, PERSONS)) == ["mgd"]  # of whose persons vitonhd are the same
    assert {*TEXTS, *COMPOSED, *PERSONS} == DATA_SETS.keys()
    for kinds in (TEXTS, COMPOSED, PERSONS):
        data = opened(place, kinds)
        assert all(len(part) == len(part.products) > 0 for part in data.values())
        assert len(products(data)) == len(names(data)) == sum(map(len, data.values()))
    apart = [f"{name}={place / 'toy' / name.removesuffix('-cap')}" for name in TEXTS]
    assert list(open_data(apart[1:], TEXTS)) == list(TEXTS)[1:]
    assert open_data(apart, COMPOSED) == {}  # pairs only
    assert list(open_data([f"vitonhd={place / 'toy/vitonhd'}"], PERSONS)) == ["vitonhd"]


def test_a_data_set_that_is_named_twice_or_that_nobody_knows_is_refused(place):
    apart = f"fashion200k={place / 'toy/fashion200k'}"
    for twice in ([apart, apart], [f"toy={place / 'toy'}", apart], [apart, f"toy={place / 'toy'}"]):
        with pytest.raises(UserError, match="^--data names fashion200k twice"):
            open_data(twice, TEXTS)
    with pytest.raises(UserError, match="^unknown data set 'farfetch': it is one of toy, fashion200k, "):
        open_data(["farfetch"], TEXTS)


def test_a_pair_is_a_picture_and_its_text(place):
    data, words = opened(place, TEXTS), tokenizer("tiny", place / "weights")
    pairs, drawn = Pairs(data, MINI, words), Pairs(data, MINI, words, draws=True)
    part = data["fashion200k"]
    assert len(pairs) == len(names(data))
    for i in (0, 1, len(part) - 1):
        item, sample = part[i], drawn[i]
        ids, mask = words.encode([blip_caption(item["text"])], MINI.qformer.max_text)
        assert torch.equal(sample["ids"], ids[0]) and torch.equal(sample["mask"], mask[0])
        assert torch.equal(sample["picture"], qformer_image(item["image"], 28))
        assert torch.equal(sample["x0"], unet_picture(item["image"], MINI))
        assert pairs[i].keys() == sample.keys() - {"x0"}
    named = {}
    for i in range(len(part)):  # views of one product belong together, and no others
        named.setdefault(part.products[i], set()).add(int(pairs[i]["product"]))
    assert all(len(hashes) == 1 for hashes in named.values())
    assert len(set.union(*named.values())) == len(named)


def test_every_sample_is_asked_for_in_its_own_style_and_answers_with_its_own_text(place):
    words, data = llm_tokenizer("tiny", place / "weights"), opened(place, TEXTS)
    samples = Answers(data, MINI, words)
    assert len(samples) == len(names(data))
    first, picked = 0, {}
    for style, part in data.items():
        for i in (0, len(part) - 1):
            sample = samples[first + i]
            start = int(sample["answer"].int().argmax())
            assert sample["after"][:start].tolist() == prompt(words, style)[1]
            own = sample["after"][sample["answer"]].tolist()
            whole = words.encode(part[i]["text"], bos=False)
            assert own == [*whole, words.eos][: MINI.max_caption]
            picked[style] = start
        first += len(part)
    assert len(set(picked.values())) == 3  # templates of three lengths


def test_a_triplet_is_two_pictures_four_ways_to_say_what_differs_and_the_targets_caption(place):
    data = opened(place, COMPOSED)
    words, llm_words = tokenizer("tiny", place / "weights"), llm_tokenizer("tiny", place / "weights")
    triplets, part = Triplets(data, MINI, words, llm_words), data["fashioniq"]
    assert len(triplets) == len(part) and triplets.targets() == part.products
    for i in (0, len(part) // 2, len(part) - 1):
        item, sample = part[i], triplets[i]
        for k, name in enumerate(("reference", "target")):
            assert torch.equal(sample["pictures"][k], qformer_image(item[name], 28))
        assert torch.equal(sample["x0"], unet_picture(item["target"], MINI))
        texts = [blip_caption(joined(item["captions"], way)) for way in range(4)]
        ids, mask = words.encode(texts, MINI.qformer.max_text)
        assert torch.equal(sample["ways"], ids) and torch.equal(sample["ways_mask"], mask)
        assert len(set(texts)) == 4 and texts[0].startswith(texts[2]) and texts[1].startswith(texts[3])
        ids, _ = words.encode([blip_caption(item["caption"])], MINI.qformer.max_text)
        assert torch.equal(sample["caption_ids"], ids[0])
        own = sample["after"][sample["answer"]].tolist()
        assert own == [*llm_words.encode(item["caption"], bos=False), llm_words.eos][: MINI.max_caption]
        start = int(sample["answer"].int().argmax())
        assert sample["after"][:start].tolist() == prompt(llm_words, "fashioniq-cap")[1]
    ids = {name: set() for name in part.products}
    for i, name in enumerate(part.products):
        ids[name].add(int(triplets[i]["target_id"]))
    assert all(len(x) == 1 for x in ids.values()) and len(set.union(*ids.values())) == len(ids)


def test_what_an_objective_leaves_out_is_not_made(place):
    data, words = opened(place, COMPOSED), tokenizer("tiny", place / "weights")
    llm_words = llm_tokenizer("tiny", place / "weights")
    always = {"pictures", "ways", "ways_mask", "target_id"}
    parts = {"q2i": {"x0"}, "caption": {"caption_ids", "caption_mask"}, "itg": {"before", "after", "answer"}}
    for left in ((), ("q2i",), ("itg",), ("caption",), ("itg", "q2i", "caption")):
        made = Triplets(data, MINI, words, None if "itg" in left else llm_words, left)[0]
        assert made.keys() == always.union(*(keys for name, keys in parts.items() if name not in left))


def test_triplets_whose_target_has_no_caption_are_left_out_unless_no_part_reads_one(place, capsys):
    data, words = opened(place, COMPOSED), tokenizer("tiny", place / "weights")
    llm_words = llm_tokenizer("tiny", place / "weights")
    part = data["fashioniq"]
    part.captioned = part.captioned[::3]
    with pytest.raises(
        UserError, match="32 of 48 samples are missing or broken.*: their targets have no caption"
    ):
        Triplets(data, MINI, words, llm_words)
    assert Triplets(data, MINI, words, llm_words, (), True).targets() == part.products[::3]
    assert (
        f"{len(part) - len(part.captioned)} of {len(part)} triplets are left out" in capsys.readouterr().err
    )
    assert len(Triplets(data, MINI, words, None, ("itg", "caption"))) == len(part)
    part.captioned = []
    with pytest.raises(
        UserError, match="no target of fashioniq has a caption: make them with infer.py caption"
    ):
        Triplets(data, MINI, words, llm_words)


def test_a_scene_has_every_condition_that_its_data_set_has(place):
    words = tokenizer("tiny", place / "weights")
    drawn = Scenes(opened(place, PERSONS), MINI, words)[0]
    bare = Scenes(open_data([f"vitonhd={place / 'toy/vitonhd'}"], PERSONS), MINI, words)[0]
    assert drawn["odds"].tolist() == pytest.approx(list(CONDITIONS.values())) and drawn["odds"].sum() == 1
    assert bare["odds"].tolist() == [1.0, 0.0, 0.0, 0.0]  # no sketch, no text: always the cloth
    assert drawn.keys() == bare.keys()
    for name in ("person", "agnostic", "keep", "pose"):
        assert torch.equal(drawn[name], bare[name])
    assert torch.equal(drawn["hints"][0], bare["hints"][0]) and torch.equal(
        bare["hints"][1], bare["hints"][0]
    )
    assert (drawn["hints"][1] - drawn["hints"][0]).abs().mean() > 0.1  # a sketch is bright on black
    assert drawn["mask"].sum() > 4 and not torch.equal(drawn["ids"], bare["ids"])
