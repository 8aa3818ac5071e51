"""Text to token ids. WordPiece is what the Q-Former reads: BERT's uncased tokenizer, written out."""

import re
import string
import unicodedata
from pathlib import Path

import torch
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


def build_vocab(texts: list[str]) -> list[str]:
    """A WordPiece vocabulary, in id order: specials, single characters, their ## forms, the words of `texts`.

    Every ASCII letter, digit and punctuation mark is in, so that an English word the texts never use falls into
    pieces, not into [UNK].
    """
    words = {word for text in texts for word in split_words(text)}
    characters = set(string.ascii_lowercase + string.digits + string.punctuation).union(*words)
    inner = sorted(
        c for c in characters if not _is_punctuation(c) and not _is_cjk(c)
    )  # the others stand alone
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


def _is_punctuation(c: str) -> bool:
    # BERT counts ASCII symbols such as $ + < ^ as punctuation, which Unicode does not; other symbols are letters to it.
    return c in string.punctuation or unicodedata.category(c).startswith("P")


def _is_cjk(c: str) -> bool:
    return any(first <= ord(c) <= last for first, last in CJK)
