"""Text to token ids, and the words around them.

WordPiece is what the Q-Former reads: BERT's uncased tokenizer, written out. SentencePiece is what the LLM reads and
writes: Llama's tokenizer, on top of the package `sentencepiece`. `prompt` and `answer_ids` are the LLM's chat template.
"""

import re
import string
import unicodedata
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from unifashion import UserError

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

# The blocks BERT counts as Chinese characters. Kana and Hangul are not among them: those scripts write words.
CJK = [
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
]

# SentencePiece puts a space before every text, its dummy prefix, so that a first word is the same piece as any other.
# A tokenizer.model is a protobuf message, to which a field may be appended: the last one counts. These four bytes say
# normalizer_spec.add_dummy_prefix = false.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

INSTRUCTIONS = {  # Table 7, word for word
    "fashion200k": "Short description.",
    "fashiongen": "Write a detail and professional description for the cloth.",
    "fashioniq-cap": "Describe the cloth’s style, color, design… and other key points.",
}


class WordPiece:
    """BERT's uncased tokenizer (arXiv 1810.04805) with BLIP-2's [DEC] appended as the last id.

    `vocab` is a text file, one token a line, the line number its id: `vocab.txt` of bert-base-uncased (30522 lines, so
    [DEC] = 30522) or one made by `build_vocab`. Raises UserError when the file cannot be read, lacks a special token
    or holds a token twice. `len(tokenizer)` counts [DEC].
    """

    def __init__(self, vocab: Path):
        try:
            # Not splitlines(): it would also break at characters that are tokens of their own, such as U+2028.
            tokens = Path(vocab).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the vocabulary {vocab}: {error}") from error
        self.tokens = [*tokens, "[DEC]"]
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if missing := [token for token in SPECIALS if token not in self.ids]:
            raise UserError(f"{vocab} is not a WordPiece vocabulary: it lacks {' '.join(missing)}")
        if len(self.ids) != len(self.tokens):
            raise UserError(f"{vocab} holds a token twice")
        self.special = re.compile("(" + "|".join(map(re.escape, [*SPECIALS, "[DEC]"])) + ")")

    def __len__(self) -> int:
        return len(self.tokens)

    def tokenize(self, text: str) -> list[str]:
        """Pieces of `text`, without [CLS] and [SEP]. A special token written in the text stands for itself."""
        pieces = []
        for part in self.special.split(text):
            if self.special.fullmatch(part):
                pieces.append(part)
            else:
                for word in split_words(part):
                    pieces += self._pieces(word)
        return pieces

    def encode(self, texts: list[str], max_length: int = 64) -> tuple[Tensor, Tensor]:
        """ids (b,t) int64 and mask (b,t) bool, True on tokens; t is `max_length` whatever the texts: static shapes.

        [CLS] pieces [SEP] [PAD]...; a longer text loses its last pieces and keeps [SEP] (see `is_cut`).
        """
        ids = torch.full((len(texts), max_length), self.ids["[PAD]"])
        mask = torch.zeros(len(texts), max_length, dtype=torch.bool)
        for row, text in enumerate(texts):
            tokens = ["[CLS]", *self.tokenize(text)[: max_length - 2], "[SEP]"]
            ids[row, : len(tokens)] = torch.tensor([self.ids[token] for token in tokens])
            mask[row, : len(tokens)] = True
        return ids, mask

    def is_cut(self, text: str, max_length: int = 64) -> bool:
        """Whether `encode` drops the end of `text`."""
        return len(self.tokenize(text)) > max_length - 2

    def _pieces(self, word: str) -> list[str]:
        """Greedy longest match from the left; one position without a match makes the whole word [UNK]."""
        pieces, start = [], 0
        while start < len(word) <= 100:
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.ids:
                    break
            else:
                return ["[UNK]"]
            pieces.append(piece)
            start = end
        return pieces or ["[UNK]"]


class SentencePiece:
    """Llama's tokenizer (arXiv 2302.13971): BPE whose pieces keep their spaces, as ▁, and bytes for what is in no piece.

    `path` is the `tokenizer.model` of Llama or Vicuna (32000 pieces). Raises UserError when it cannot be read, is cut
    short or no SentencePiece model, lacks <s>, </s> or <unk>, or changes texts, which Llama's model never does. A
    wrong letter inside a piece cannot be noticed here. `bos`, `eos` and `unk` are the ids of <s>, </s> and <unk>.
    """

    def __init__(self, path: Path):
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error}") from error
        probe = "  \U0010ffff  "  # the settings are the end of the file: without them it may load, but drop spaces
        try:
            # Two loads, and the file as it is first: cut short, it could take the appended bytes for its own.
            self.first = SentencePieceProcessor(model_proto=model)
            self.later = SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
            specials = {token: self.first.piece_to_id(token) for token in ("<s>", "</s>", "<unk>")}
            missing = [token for token, i in specials.items() if self.first.id_to_piece(i) != token]
            keeps = self.first.decode(self.first.encode(probe)) == probe
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a SentencePiece model, or damaged") from error
        if missing:
            raise UserError(f"{path} is not a tokenizer for Llama: it lacks {' '.join(missing)}")
        if not keeps:
            raise UserError(
                f"{path} is cut short, or not a tokenizer for Llama: it drops spaces or characters"
            )
        self.specials = specials
        self.bos, self.eos, self.unk = specials.values()

    def __len__(self) -> int:
        return self.first.get_piece_size()

    def encode(self, text: str, bos: bool = True, legacy: bool = False, prefix: bool = True) -> list[int]:
        """Ids of `text`, after <s> if `bos`. <s>, </s> and <unk> written in the text stand for themselves.

        Without `prefix` the text gets no dummy prefix: it continues what precedes it, for instance a soft prompt. So
        does a text after a special token; `legacy` gives it the prefix there. transformers has the same flag: Vicuna 1.5
        and LLaVA 1.5 say legacy=False, older models True. Without special tokens in the text it changes nothing.
        """
        ids = [self.bos] if bos else []
        for part in re.split("(</?s>|<unk>)", text):
            if part in self.specials:
                ids.append(self.specials[part])
                prefix = legacy
            else:
                # Not one processor on "<unk>" + part, less the first pieces: the > would merge, <unk></Img> holds "></".
                ids += (self.first if prefix else self.later).encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, without special tokens; bytes that are no UTF-8 become U+FFFD.

        Its first space, if any, is taken for the dummy prefix and goes, as in SentencePiece itself: what `encode` made of
        a text comes back exactly. (transformers' legacy decoding loses a second one.) Raises IndexError for an unknown id.
        """
        return self.first.decode([i for i in ids if i not in self.specials.values()])


def prompt(tokenizer: SentencePiece, style: str) -> tuple[list[int], list[int]]:
    """Ids before and after the soft prompt in "USER: <Img>(soft prompt)</Img>(instruction) Assistant:" (section 3.3).

    Before: <s> and the text up to <Img>, which is plain text to Llama, as </Img> is. After: a continuation of the soft
    prompt, so without dummy prefix. The + that the paper writes before an instruction is taken for "followed by".
    The template's space after "Assistant:" is not here. It is the dummy prefix of the answer, which `answer_ids` encodes
    as a text of its own: ":", "▁a", "▁red", the pieces of the whole written in one go. A space here would be a piece
    of its own, and the answer's first word one without its space: ":", "▁", "a". Raises UserError for an unknown style.
    """
    if style not in INSTRUCTIONS:
        raise UserError(f"unknown caption style {style!r}: it is one of {', '.join(INSTRUCTIONS)}")
    after = f"</Img>{INSTRUCTIONS[style]} Assistant:"
    return tokenizer.encode("USER: <Img>"), tokenizer.encode(after, bos=False, prefix=False)


def answer_ids(tokenizer: SentencePiece, text: str, room: int) -> list[int]:
    """Ids of the answer and </s>, at most `room` of them. Raises ValueError if there is no room at all.

    An answer that is cut has no </s>: it would teach the LLM to stop in the middle of a sentence.
    """
    if room < 1:
        raise ValueError(f"no room for an answer: {room} tokens")
    return [*tokenizer.encode(text, bos=False), tokenizer.eos][:room]


def build_vocab(texts: list[str]) -> list[str]:
    """A WordPiece vocabulary, in id order: specials, single characters, their ## forms, the words of `texts`.

    Every ASCII letter, digit and punctuation mark is in, so that an English word the texts never use falls into
    pieces, not into [UNK].
    """
    words = {word for text in texts for word in split_words(text)}
    characters = set(string.ascii_lowercase + string.digits + string.punctuation).union(*words)
    # The others stand alone.
    inner = sorted(c for c in characters if not _is_punctuation(c) and not _is_cjk(c))
    return SPECIALS + sorted(characters) + ["##" + c for c in inner] + sorted(words - characters)


def split_words(text: str) -> list[str]:
    """BERT's words: lower case, no accents, every punctuation mark and Chinese character a word of its own."""
    kept = []
    for c in text:
        if c in "\t\n\r":  # of category C too, but spaces to BERT; zero-width marks and soft hyphens vanish
            kept.append(" ")
        elif c != "\ufffd" and not unicodedata.category(c).startswith("C"):
            kept.append(f" {c} " if _is_cjk(c) else c)
    decomposed = unicodedata.normalize("NFD", "".join(kept).lower())
    plain = (c for c in decomposed if unicodedata.category(c) != "Mn")
    return "".join(f" {c} " if _is_punctuation(c) else c for c in plain).split()


def blip_caption(text: str, max_words: int = 50) -> str:
    """The cleaning BLIP-2 gives a caption before its tokenizer (LAVIS `BlipCaptionProcessor.pre_caption`).

    Lower case; . ! " ( ) * # : ; ~ become spaces; runs of white space one space; at most `max_words` words.
    """
    text = re.sub(r'[.!"()*#:;~]', " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def read_query(
    words: WordPiece, text: str, max_length: int, few_words: bool = False
) -> tuple[Tensor, Tensor, list[str]]:
    """
    What a user typed as --text -> ids and mask (1,t) as `WordPiece.encode`'s, and what he should be told of them.

    few_words: the vocabulary holds whole words alone, so that others mean nothing. Raises UserError for a text without a word.
    """
    whole = blip_caption(text, max_words=len(text))
    if not words.tokenize(whole):
        raise UserError("--text is empty: say what the garment is like, or leave it out")
    notes = []
    if words.is_cut(whole, max_length) or blip_caption(whole) != whole:
        notes.append(f"--text is too long: the model reads its first {max_length - 2} tokens")
    cut = {w: any(t[:2] == "##" or t == "[UNK]" for t in words.tokenize(w)) for w in whole.split()}
    if few_words and any(cut.values()):
        notes.append(f"tiny does not know the words {', '.join(w for w in cut if cut[w])}")
    return *words.encode([blip_caption(whole)], max_length), notes


def _is_punctuation(c: str) -> bool:
    # BERT counts ASCII symbols such as $ + < ^ as punctuation, which Unicode does not; other symbols are letters to it.
    return c in string.punctuation or unicodedata.category(c).startswith("P")


def _is_cjk(c: str) -> bool:
    return any(first <= ord(c) <= last for first, last in CJK)
