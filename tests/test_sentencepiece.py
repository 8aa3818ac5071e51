"""SentencePiece against the original Llama tokenizer (tokenizer_llama.json) and transformers; the chat template.

Llama's own tokenizer.model is not in the repository: tests that need it take it from $UNIFASHION_SAMPLES. The others
train a small one with Llama's settings.
"""

import io
import json
import os
import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import LlamaTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from tests.faults import plant
from tests.goldens import GOLDEN
from unifashion import UserError, tokenizers
from unifashion.tokenizers import INSTRUCTIONS, SentencePiece

GOLD = json.loads((GOLDEN / "tokenizer_llama.json").read_text())
TEXTS = {case["text"]: case for case in GOLD["cases"]}
LLAMA = Path(os.environ.get("UNIFASHION_SAMPLES", "/nonexistent")) / "tokenizers" / "llama_tokenizer.model"
SPECIALS = ["<s>", "</s>", "<unk>"]

needs_llama = pytest.mark.skipif(
    not LLAMA.is_file(), reason="needs Llama's tokenizer.model: set UNIFASHION_SAMPLES"
)
each_case = pytest.mark.parametrize("case", GOLD["cases"], ids=lambda case: ascii(case["text"][:24]))


@needs_llama
@each_case
def test_ids_equal_the_original(case, llama):
    assert llama.encode(case["text"]) == case["hf_nonlegacy"]
    assert llama.encode(case["text"], legacy=True) == case["hf_legacy"]
    if not is_special(case["text"]):
        assert llama.encode(case["text"], bos=False) == case["sp_ids"]


@needs_llama
@each_case
def test_decoded_texts_equal_the_original(case, llama):
    assert llama.decode(case["sp_ids"]) == case["sp_decoded"]
    # transformers 4.36 takes a dummy prefix away and then lets SentencePiece take away another.
    assert llama.decode(case["hf_legacy"]).removeprefix(" ") == case["hf_legacy_decoded"]


@needs_llama
def test_the_ids_of_the_special_tokens_equal_the_original(llama):
    assert len(llama) == GOLD["vocab_size"]
    assert (llama.bos, llama.eos, llama.unk) == (GOLD["bos"], GOLD["eos"], GOLD["unk"])


@needs_llama
@each_case
def test_without_prefix_a_text_is_what_it_is_after_a_special_token(case, llama):
    assert llama.encode(case["text"], bos=False, prefix=False) == llama.encode("</s>" + case["text"])[2:]


@needs_llama
@pytest.mark.parametrize("case", GOLD["llava_prompts"], ids=lambda case: ascii(case["prompt"][:24]))
@pytest.mark.parametrize("legacy", [False, True])
def test_llavas_prompts_are_texts_of_their_own_between_images(case, legacy, llama):
    ids = [llama.bos]
    for index, text in enumerate(case["prompt"].split("<image>")):
        ids += [-200] * (index > 0) + llama.encode(text, bos=False, legacy=legacy)
    assert ids == case["ids_legacy" if legacy else "ids_nonlegacy"]


@needs_llama
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("prefix = legacy", "prefix = not legacy"),
        ("prefix = legacy", "pass"),
        ("self.first if prefix else self.later", "self.later"),
        ("self.first if prefix else self.later", "self.first"),
        ("[self.bos] if bos else []", "[]"),
        ("[self.bos] if bos else []", "[self.eos] if bos else []"),
    ],
)
def test_a_wrong_line_breaks_an_original_id(old, new, llama, monkeypatch):
    plant(monkeypatch, tokenizers, "SentencePiece.encode", old, new)
    assert any(llama.encode(text) != case["hf_nonlegacy"] for text, case in TEXTS.items())


@needs_llama
def test_transformers_agrees_on_wild_text_in_llamas_own_vocabulary(llama, tmp_path):
    agree_on_wild_text(llama, LLAMA, tmp_path, 300)


def test_transformers_agrees_on_wild_text(small, small_path, tmp_path):
    agree_on_wild_text(small, small_path, tmp_path, 1000)


def agree_on_wild_text(ours: SentencePiece, path: Path, folder: Path, count: int) -> None:
    rng = random.Random(0)
    alphabet = [
        *"aeéñdrst   ▁\n\t-–“€…<>/日服👗\u200b\x00\u00a0１.,'",
        "dress",
        " red",
        "</Img>",
        "Assistant:",
    ]
    alphabet += SPECIALS
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(20))) for _ in range(count)]
    names = dict(zip(("bos_token", "eos_token", "unk_token"), SPECIALS, strict=True))
    slow = SentencePieceBackend(vocab_file=str(path), legacy=True, **names)
    # transformers edits the model for legacy=False with a package we do not need. This does the same to the file.
    plain = folder / "plain.model"
    plain.write_bytes(path.read_bytes() + tokenizers.NO_DUMMY_PREFIX)
    later = SentencePieceBackend(vocab_file=str(plain), legacy=True, **names)
    later.legacy = False
    fast = rust(path)
    for text in texts:
        for theirs, how in ((slow, {"legacy": True}), (later, {"prefix": False}), (fast, {})):
            if theirs is fast and text.startswith((" ", "▁")):
                continue  # the tokenizer of today adds no prefix to these, unlike the original
            expected = theirs.encode(text, add_special_tokens=False)
            assert ours.encode(text, bos=False, **how) == expected, (ascii(text), how)


def rust(path: Path) -> LlamaTokenizer:
    """transformers' tokenizer of today, a BPE of merges: the best piece that two others make comes first."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = {model.id_to_piece(i): i for i in range(len(model))}
    merges = []
    for piece in sorted(
        vocab, key=lambda piece: -model.get_score(vocab[piece])
    ):  # not by id: runs of ▁ come last
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [pair for pair in pairs if vocab.keys() >= set(pair)]
    return LlamaTokenizer(vocab=vocab, merges=merges, legacy=False)


def test_special_tokens_in_a_text_stand_for_themselves(small):
    bos, eos, unk = small.bos, small.eos, small.unk
    assert len({bos, eos, unk}) == 3
    assert small.encode("<s></s><unk>") == [bos, bos, eos, unk]
    red = small.encode("red", bos=False)
    assert small.encode("red</s>") == [bos, *red, eos]
    assert small.encode("red</s>red", legacy=True) == [bos, *red, eos, *red]
    assert small.encode("red</s>red") != small.encode("red</s>red", legacy=True)
    assert small.encode("red</s> red") == [bos, *red, eos, *red]
    assert eos not in small.encode("</S> < /s> </s") and unk not in small.encode("<UNK>")


@each_case
def test_every_text_comes_back_without_its_special_tokens(case, small):
    plain = case["text"].replace("▁", " ")
    for special in SPECIALS:
        plain = plain.replace(special, "")
    if not is_special(case["text"]):
        assert small.decode(small.encode(case["text"])) == plain
    # A continuation has no dummy prefix to lose: a space of its own is lost for it.
    assert small.decode(small.encode(case["text"], prefix=False)) == plain.removeprefix(" ")


def test_bytes_that_are_no_utf8_are_replaced(small):
    glyph = small.encode("👗", bos=False)
    assert len(glyph) == 5 and small.decode(glyph) == "👗"  # ▁ and four bytes
    assert small.decode(glyph[:-1]) == "\ufffd" * 3
    assert small.decode(glyph[2:] + small.encode("red", bos=False)) == "\ufffd" * 3 + " red"
    assert small.decode([]) == small.decode([small.bos, small.eos, small.unk]) == ""


def test_an_id_outside_the_vocabulary_is_refused(small):
    for wrong in (len(small), -200):
        with pytest.raises(IndexError):
            small.decode([wrong])


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.999, "one byte", "the settings", "all settings"])
def test_a_model_that_is_cut_short_is_the_users_error(part, small_path, tmp_path, capfd):
    refuse_cut(small_path.read_bytes(), part, tmp_path, capfd)


@needs_llama
@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.999, "one byte", "the settings", "all settings"])
def test_llamas_model_cut_short_is_the_users_error(part, tmp_path, capfd):
    refuse_cut(LLAMA.read_bytes(), part, tmp_path, capfd)


def refuse_cut(whole: bytes, part: float | str, folder: Path, capfd: pytest.CaptureFixture) -> None:
    normalizer = whole.index(b"\n\x08identity") - 2  # where the last field of the protobuf message begins
    ends = {"one byte": -1, "the settings": normalizer, "all settings": last_piece(whole)}
    path = folder / "tokenizer.model"
    path.write_bytes(whole[: ends[part] if part in ends else int(len(whole) * part)])
    message = refused(path)
    assert "damaged" in message or "cut short" in message
    assert capfd.readouterr() == ("", "")  # SentencePiece, too, says nothing of its own


def last_piece(model: bytes) -> int:
    """Where the pieces of a model, its first fields (tag 0x0a, length, piece), end: a cut that is valid protobuf."""
    place = 0
    while model[place] == 0x0A:
        assert model[place + 1] < 128
        place += 2 + model[place + 1]
    return place


def test_every_cut_in_the_settings_is_noticed(small_path, tmp_path):
    whole, path = small_path.read_bytes(), tmp_path / "tokenizer.model"
    for end in range(last_piece(whole), len(whole)):
        path.write_bytes(whole[:end])
        refused(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"\x00" * 1000, "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\nsize 499723\n", "damaged"),
        (b'{"model": {"vocab": {}}}', "damaged"),
        (b"\n\x07\n\x05\xff\xfe\xfd\xfc\xfb" * 2, "damaged"),  # pieces that are no UTF-8
    ],
)
def test_a_wrong_file_is_the_users_error(content, message, tmp_path):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    assert message in refused(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bos_id": -1}, "lacks <s>"),
        ({"bos_id": -1, "eos_id": -1}, "lacks <s> </s>"),
        ({"unk_piece": "[UNK]"}, "lacks <unk>"),
        ({"byte_fallback": False}, "drops"),
        ({"remove_extra_whitespaces": True}, "drops"),
    ],
)
def test_a_sentencepiece_model_of_another_kind_is_the_users_error(settings, message, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(**settings))
    assert message in refused(path)


def test_a_folder_is_the_users_error(tmp_path):
    assert "cannot read" in refused(tmp_path)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        SentencePiece(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


# The chat template


def test_the_instructions_are_those_of_table_7():
    assert list(INSTRUCTIONS) == ["fashion200k", "fashiongen", "fashioniq-cap"]
    assert INSTRUCTIONS["fashioniq-cap"] == (
        "Describe the cloth\N{RIGHT SINGLE QUOTATION MARK}s style, color, design\N{HORIZONTAL ELLIPSIS} and other key points."
    )
    assert INSTRUCTIONS["fashiongen"] == "Write a detail and professional description for the cloth."


@pytest.mark.parametrize("style", INSTRUCTIONS)
def test_the_template_reads_as_the_papers(style, small):
    before, after = tokenizers.prompt(small, style)
    assert before[0] == small.bos and small.bos not in before[1:] + after and small.eos not in after
    assert small.decode(before) == "USER: <Img>"
    assert small.decode(after) == f"</Img>{INSTRUCTIONS[style]} Assistant:"
    whole = before + after + tokenizers.answer_ids(small, "a red dress", 99)
    assert small.decode(whole) == f"USER: <Img></Img>{INSTRUCTIONS[style]} Assistant: a red dress"
    assert whole[-1] == small.eos


@pytest.mark.parametrize("style", INSTRUCTIONS)
def test_the_pieces_at_the_seam_are_those_of_the_text_in_one_go(style, small):
    same_at_the_seam(small, style)


@needs_llama
@pytest.mark.parametrize("style", INSTRUCTIONS)
def test_llamas_pieces_at_the_seam_are_those_of_the_text_in_one_go(style, llama):
    same_at_the_seam(llama, style)
    _, after = tokenizers.prompt(llama, style)
    assert [
        llama.first.id_to_piece(i) for i in after[-1:] + tokenizers.answer_ids(llama, "a red dress", 4)
    ] == [*(":", "▁a", "▁red", "▁dress", "</s>")]


def same_at_the_seam(tokenizer: SentencePiece, style: str) -> None:
    before, after = tokenizers.prompt(tokenizer, style)
    texts = [text for text in TEXTS if not is_special(text) and text]
    for text in ["a red dress", *texts]:
        whole = f"USER: <Img></s></Img>{INSTRUCTIONS[style]} Assistant: {text}"  # a token for the soft prompt
        ids = before + [tokenizer.eos] + after + tokenizers.answer_ids(tokenizer, text, 999)
        assert ids == [*tokenizer.encode(whole), tokenizer.eos], ascii(text)


@pytest.mark.parametrize(
    ("target", "old", "new"),
    [
        ("prompt", 'encode("USER: <Img>")', 'encode("USER: <Img>", bos=False)'),
        ("prompt", "encode(after, bos=False, prefix=False)", "encode(after, bos=False)"),
        ("prompt", "encode(after, bos=False, prefix=False)", "encode(after, prefix=False)"),
        ("prompt", '[style]} Assistant:"', '[style]} Assistant: "'),
        ("answer_ids", "encode(text, bos=False)", "encode(text)"),
        ("answer_ids", "encode(text, bos=False)", "encode(text, bos=False, prefix=False)"),
        ("answer_ids", ", tokenizer.eos]", "]"),
        ("SentencePiece.encode", "prefix = legacy", "prefix = True"),
    ],
)
def test_a_wrong_line_breaks_the_seam(target, old, new, small, monkeypatch):
    plant(monkeypatch, tokenizers, target, old, new)
    with pytest.raises(AssertionError):
        same_at_the_seam(small, "fashiongen")


@needs_llama
def test_text_before_the_soft_prompts_end_would_merge_with_it(llama):
    _, after = tokenizers.prompt(llama, "fashion200k")
    glued = llama.encode("USER: <Img></Img>Short description. Assistant:")
    assert llama.first.id_to_piece(after[0]) == "</" and glued[-len(after) + 1 :] == after[1:]
    assert llama.first.id_to_piece(glued[-len(after)]) == "></"


@needs_llama
@pytest.mark.parametrize("text", ["USER: <image>\nDescribe. ASSISTANT:", "<image>", "text <image>"])
def test_the_ids_around_llavas_picture_equal_the_original(text, llama):
    around_llavas_picture(llama, text)


def around_llavas_picture(llama: SentencePiece, text: str) -> None:
    (case,) = (case for case in GOLD["llava_prompts"] if case["prompt"] == text)
    before, after = tokenizers.around_image(llama, text)
    assert [*before, -200, *after] == case["ids_legacy"] == case["ids_nonlegacy"]


@needs_llama
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("encode(before),", "encode(before, bos=False),"),
        ("encode(after, bos=False)\n", "encode(after)\n"),
        ("encode(after, bos=False)\n", "encode(after, bos=False, prefix=bool(0))\n"),
    ],
)
def test_a_wrong_line_breaks_the_ids_around_llavas_picture(old, new, llama, monkeypatch):
    plant(monkeypatch, tokenizers, "around_image", old, new)
    with pytest.raises(AssertionError):
        around_llavas_picture(llama, "USER: <image>\nDescribe. ASSISTANT:")


@pytest.mark.parametrize("style", INSTRUCTIONS)
def test_llava_is_asked_what_the_paper_asks(style, small):
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    system += "detailed, and polite answers to the user's questions."
    before, after = tokenizers.llava_prompt(small, style)
    assert before[0] == small.bos and small.bos not in before[1:] + after and small.eos not in after
    assert small.decode(before) == f"{system} USER: "
    assert small.decode(after) == f"\n{INSTRUCTIONS[style]} ASSISTANT:"


def test_llava_is_offered_the_key_words_in_their_order(small):
    before, after = tokenizers.llava_prompt(small, "fashion200k", ("long sleeve", "red", "v-neck"))
    assert before == tokenizers.llava_prompt(small, "fashion200k")[0]
    asked = (
        "Use those of these words that match the picture, and leave out the others: long sleeve, red, v-neck."
    )
    assert small.decode(after) == f"\nShort description. {asked} ASSISTANT:"


def test_a_style_without_instruction_is_the_users_error(small):
    with pytest.raises(UserError, match="'vogue'.*: it is one of fashion200k, fashiongen, fashioniq-cap$"):
        tokenizers.prompt(small, "vogue")
    with pytest.raises(UserError, match="^unknown caption style 'vogue'"):
        tokenizers.llava_prompt(small, "vogue")


def test_an_answer_that_is_cut_has_no_end(small):
    ids = small.encode("a red dress", bos=False)
    for room in range(1, len(ids) + 1):
        assert tokenizers.answer_ids(small, "a red dress", room) == ids[:room]
    for room in (len(ids) + 1, 999):
        assert tokenizers.answer_ids(small, "a red dress", room) == [*ids, small.eos]
    assert tokenizers.answer_ids(small, "", 1) == [small.eos]
    for room in (0, -1):
        with pytest.raises(ValueError, match="no room"):
            tokenizers.answer_ids(small, "a red dress", room)


def is_special(text: str) -> bool:
    return any(special in text for special in SPECIALS)


def train(**settings: object) -> bytes:
    """A small SentencePiece model: Llama's settings, but for `settings`."""
    words = (
        "a red blue short long dress shirt with sleeves, a collar and no print. USER: <Img> </Img> Assistant:"
    )
    rng, model = random.Random(0), io.BytesIO()
    texts = [" ".join(rng.choices(words.split(), k=12)) for _ in range(200)]
    llama = {
        "model_type": "bpe",
        "vocab_size": 400,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, **{**llama, **settings}
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def small_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(train())
    return path


@pytest.fixture(scope="module")
def small(small_path) -> SentencePiece:
    return SentencePiece(small_path)


@pytest.fixture(scope="module")
def llama() -> SentencePiece:
    return SentencePiece(LLAMA)
