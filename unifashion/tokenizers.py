"""Text to token ids, and the words around them.

WordPiece is what the Q-Former reads: BERT's uncased tokenizer, written out. SentencePiece is what the LLM reads and
writes: Llama's tokenizer, on top of the package `sentencepiece`. `prompt` and `answer_ids` are the LLM's chat template.
CLIP's own BPE is what its text tower reads.
"""

import gzip
import html
import re
import string
import sys
import unicodedata
import zlib
from functools import lru_cache
from itertools import pairwise
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

START, END = "<|startoftext|>", "<|endoftext|>"  # CLIP's

# What ftfy replaces, whatever stands around it: curly quotes; ligatures, and letters as wide or as narrow as a Chinese one.
QUOTES = str.maketrans(dict.fromkeys("ʼ‘’‚‛", "'") | dict.fromkeys("“”„‟", '"'))
COMPATIBLE = re.compile("[ĲĳŉǄ-ǌǱ-ǳ\u3000\ufb00-\ufb06\uff01-\uffef]")
CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
# Bytes as Windows-1252 reads them, and as Latin-1 does, which has controls at 0x80 to 0x9f where that has quotes.
WINDOWS = {bytes([byte]).decode("cp1252", "ignore") or chr(byte): byte for byte in range(0x80, 0x100)}
LATIN = {chr(byte): byte for byte in range(0x80, 0x100)}
LATIN_CONTROLS = {byte: letter for letter, byte in WINDOWS.items() if byte < 0xA0}
# UTF-8 that was read as one of the two: Ã© for é, â€™ for a quote (twelve texts of MGD's), ðŸ˜€ for a smile.
FOLLOWS = f"[{''.join(letter for letter, byte in (WINDOWS | LATIN).items() if byte < 0xC0)}]"
MOJIBAKE = re.compile(f"[ÂÃ]{FOLLOWS}|â{FOLLOWS}{{2}}|ð{FOLLOWS}{{3}}")

INSTRUCTIONS = {  # Table 7, word for word
    "fashion200k": "Short description.",
    "fashiongen": "Write a detail and professional description for the cloth.",
    "fashioniq-cap": "Describe the cloth’s style, color, design… and other key points.",
}

# What Vicuna, and so LLaVA-1.5, has read before every question.
SYSTEM = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."


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


class CLIPTokenizer:
    """CLIP's tokenizer (arXiv 2103.00020): lower-case BPE on the bytes of each word, whose last piece ends in </w>.

    `path` is OpenAI's `bpe_simple_vocab_16e6.txt.gz` or Hugging Face's `merges.txt`: a line of title, then a pair of pieces
    a line, in the order in which they are merged. The ids are those of the 256 bytes, the bytes that end a word, the merged
    pieces, <|startoftext|> and <|endoftext|>; lines beyond `vocab_size` ids are not used. Raises UserError for a file that
    cannot be read, is cut short, merges what is no piece yet, or makes a piece twice.
    """

    def __init__(self, path: Path, vocab_size: int = 49408):
        byte_pieces = list(_byte_letters().values())
        pieces = [*byte_pieces, *(piece + "</w>" for piece in byte_pieces)]
        pairs = _read_merges(path, vocab_size - len(pieces) - 2)
        known = set(pieces)
        for line, (left, right) in enumerate(pairs, start=2):
            if left not in known or right not in known or left + right in known:
                raise UserError(
                    f"{path} is damaged: line {line}, {left} {right}, does not fit those before it"
                )
            known.add(left + right)
            pieces.append(left + right)
        self.ids = {piece: i for i, piece in enumerate([*pieces, START, END])}
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.word = _word_pattern()
        self.pieces = lru_cache(maxsize=2**16)(self._pieces)  # words come again

    def __len__(self) -> int:
        return len(self.ids)

    def tokenize(self, text: str) -> list[str]:
        """Pieces of `text` without start and end, which stand for themselves where they are written in the text."""
        words = self.word.findall(clip_clean(text))
        return [piece for word in words for piece in self.pieces(word)]

    def encode(self, texts: list[str], max_length: int = 77) -> Tensor:
        """-> ids (b,max_length) int64: start, pieces, end, then zeros. A longer text loses its last pieces and keeps the end."""
        ids = torch.zeros(len(texts), max_length, dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens = [START, *self.tokenize(text)[: max_length - 2], END]
            ids[row, : len(tokens)] = torch.tensor([self.ids[token] for token in tokens])
        return ids

    def _pieces(self, word: str) -> list[str]:
        """Merge neighbours, the pair that was learned first before all others, until no two of them are a known pair."""
        if word in (START, END):
            return [word]
        letters = _byte_letters()
        pieces = [letters[byte] for byte in word.encode("utf-8")]
        pieces[-1] += "</w>"
        unknown = len(self.ranks)
        while len(pieces) > 1:
            pair = min(pairwise(pieces), key=lambda pair: self.ranks.get(pair, unknown))
            if pair not in self.ranks:
                break
            merged, i = [], 0
            while i < len(pieces):
                together = tuple(pieces[i : i + 2]) == pair
                merged.append("".join(pair) if together else pieces[i])
                i += 1 + together
            pieces = merged
        return pieces


def prompt(tokenizer: SentencePiece, style: str) -> tuple[list[int], list[int]]:
    """Ids before and after the soft prompt in "USER: <Img>(soft prompt)</Img>(instruction) Assistant:" (section 3.3).

    Before: <s> and the text up to <Img>, which is plain text to Llama, as </Img> is. After: a continuation of the soft
    prompt, so without dummy prefix. The + that the paper writes before an instruction is taken for "followed by".
    The template's space after "Assistant:" is not here. It is the dummy prefix of the answer, which `answer_ids` encodes
    as a text of its own: ":", "▁a", "▁red", the pieces of the whole written in one go. A space here would be a piece
    of its own, and the answer's first word one without its space: ":", "▁", "a". Raises UserError for an unknown style.
    """
    _check_style(style)
    after = f"</Img>{INSTRUCTIONS[style]} Assistant:"
    return tokenizer.encode("USER: <Img>"), tokenizer.encode(after, bos=False, prefix=False)


def llava_prompt(
    tokenizer: SentencePiece, style: str, keywords: tuple[str, ...] = ()
) -> tuple[list[int], list[int]]:
    """Ids before and after a picture's soft tokens in LLaVA-1.5's template. Table 7's instruction is the question.

    `keywords`, if any, are offered as appendix C does: LLaVA is to use those that match the picture. Raises UserError for an
    unknown style.
    """
    _check_style(style)
    question = INSTRUCTIONS[style]
    if keywords:
        question += " Use those of these words that match the picture, and leave out the others: "
        question += ", ".join(keywords) + "."
    return around_image(tokenizer, f"{SYSTEM} USER: <image>\n{question} ASSISTANT:")


def around_image(tokenizer: SentencePiece, text: str) -> tuple[list[int], list[int]]:
    """Ids of what is before the <image> of a text, after <s>, and of what is behind it.

    Two texts to LLaVA: the second, too, gets SentencePiece's dummy prefix, a space.
    """
    before, after = text.split("<image>")
    return tokenizer.encode(before), tokenizer.encode(after, bos=False)


def _check_style(style: str) -> None:
    if style not in INSTRUCTIONS:
        raise UserError(f"unknown caption style {style!r}: it is one of {', '.join(INSTRUCTIONS)}")


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


MAX_WORDS = 50  # of a text, as LAVIS cuts captions by default


def blip_caption(text: str, max_words: int = MAX_WORDS) -> str:
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
    if words.is_cut(blip_caption(whole), max_length):
        notes.append(f"--text is too long: the model reads its first {max_length - 2} tokens")
    elif blip_caption(whole) != whole:
        notes.append(f"--text is too long: the model reads its first {MAX_WORDS} words")
    cut = {w: any(t[:2] == "##" or t == "[UNK]" for t in words.tokenize(w)) for w in whole.split()}
    if few_words and any(cut.values()):
        notes.append(f"tiny does not know the words {', '.join(w for w in cut if cut[w])}")
    return *words.encode([blip_caption(whole)], max_length), notes


def clip_clean(text: str) -> str:
    """
    The cleaning CLIP gives a text before its BPE: broken Unicode mended, HTML entities read, white space one space, lower case.

    OpenAI mends with the package ftfy. Here is what it does to captions: entities; UTF-8 read as Windows-1252 or Latin-1, in
    the sequences that are hardly ever meant (Ã©, â€™); Windows' quotes read as Latin-1; curly quotes; ligatures and wide
    letters; lone surrogates; control characters; NFC. Not done: other letters than those of Western Europe, punctuation and
    emoji read in a wrong code, a text damaged besides, entities in capitals, the escape sequences of terminals.
    """
    if "<" not in text:  # otherwise ftfy takes it for HTML, whose entities are meant
        text = html.unescape(text)
    text = MOJIBAKE.sub(_as_utf8, text).translate(LATIN_CONTROLS)
    text = COMPATIBLE.sub(lambda m: unicodedata.normalize("NFKC", m[0]), text).translate(QUOTES)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = unicodedata.normalize("NFC", CONTROLS.sub("", text))
    text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


def _as_utf8(found: re.Match) -> str:
    try:
        return bytes((WINDOWS | LATIN)[c] for c in found[0]).decode("utf-8")
    except UnicodeDecodeError:  # an overlong form
        return found[0]


@lru_cache(maxsize=1)
def _byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for every byte: Latin-1's own where it has a visible one, then U+0100 and on. In order of ids."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


@lru_cache(maxsize=1)
def _word_pattern() -> re.Pattern:
    r"""CLIP's words: special tokens, English endings, runs of letters (\p{L}), single digits (\p{N}), runs of other marks."""
    # To Python's \d, ½ and Ⅳ are no digits, and to its \w they belong to words.
    digits = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] == "N")
    specials = "|".join(map(re.escape, (START, END)))
    rules = rf"{specials}|'(?:s|t|re|ve|m|ll|d)|[^\W_{digits}]+|[{digits}]|(?:[^\s\w]|_)+"
    return re.compile(rules, re.IGNORECASE)


def _read_merges(path: Path, count: int) -> list[tuple[str, str]]:
    """The first `count` pairs of a file of merges, packed or not."""
    try:
        data = Path(path).read_bytes()
        lines = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the vocabulary {path}: {error}") from error
    if "#version" not in lines[0]:
        raise UserError(f"{path} is not CLIP's vocabulary: it starts with no line of title (#version: ...)")
    pairs = [tuple(line.split(" ")) for line in lines[1 : 1 + count]]
    if wrong := [line for line, pair in enumerate(pairs, start=2) if len(pair) != 2]:
        cut = wrong[0] == len(lines)  # what is behind the last line's end
        fault = (
            f"cut short: {count} pairs wanted" if cut else f"damaged: line {wrong[0]} is no pair of pieces"
        )
        raise UserError(f"{path} is {fault}")
    if len(pairs) < count:
        raise UserError(f"{path} is cut short: {len(pairs)} pairs, wanted {count}")
    return pairs


def _is_punctuation(c: str) -> bool:
    # BERT counts ASCII symbols such as $ + < ^ as punctuation, which Unicode does not; other symbols are letters to it.
    return c in string.punctuation or unicodedata.category(c).startswith("P")


def _is_cjk(c: str) -> bool:
    return any(first <= ord(c) <= last for first, last in CJK)
