"""Our words against PTBTokenizer's: the golden's, and what the original made of each quirk when it was asked (pycocoevalcap 1.2,
Java 17). Of 93,291 captions of Fashion-IQ, UniFashion's Fashion-IQ-Cap, MGD and ToyFashion it was asked about all agreed."""

import json
import random
import string

import numpy as np
import pytest

from eval.metrics import ptb as module
from eval.metrics.ptb import ptb_words
from tests.faults import plant
from tests.goldens import GOLDEN
from unifashion.data import toy
from unifashion.data.texts import WRITERS

GOLD = json.loads((GOLDEN / "captions.json").read_text())

ASKED = {  # caption -> the original's words
    # words in two
    "Don't DON'T don’t isn`t is'nt": "do n't do n't do n't is n`t is nt",
    "it's IT'S women’s he'd've girls' it`s": "it 's it 's women 's he 'd 've girls it s",
    "cannot gonna wanna gotta lemme gimme dunno": "can not gon na wan na got ta lem me gim me dunno",
    "'Tis 'twas y'all Y'all cannots gotta-x": "'t is 't was y' all y' all cannots gotta-x",
    "80's 90s a/b's u.s.'s v-neck's tee's's": "80 's 90s a/b 's u.s. 's v-neck 's tee 's 's",
    # an apostrophe within
    "o'clock d'orsay O'Neill L'Oréal l'x o’clock": "o'clock d'orsay o'neill l'oréal l' x o’clock",
    "B'more b'more qu'il ma'am c'mon rock'n'roll": "b'more b more qu'il ma'am c'mon rock 'n' roll",
    "'80s ’80s '05s '84 '84, mid-'80s rock 'n roll": "'80s ’80s 05s '84 84 mid '80s rock 'n roll",
    "'bomber' ‘bomber’ \"x\" “x” «x» ``x''": "bomber bomber x x x x",
    # full stops
    "A.P.C. a.p.c. U.S.A. p.m. Ph.D. hello.world white.Short": "a.p.c. a.p.c. u.s.a. p.m. ph.d. hello.world white.short",
    "etc. vs. St. Inc. ft. in. approx. lb. cm. max.": "etc. vs. st. inc. ft. in approx lb cm max",
    "wash. Wash. mass. Mass. WASH. ill.": "wash wash. mass mass. wash. ill",
    "no. 5 No.5 no. five no.  5 fig. 3a art. The": "no. 5 no. 5 no five no 5 fig. 3a art the",
    "size L. Red; size L. The red; size XL. A": "size l. red size l the red size xl a",
    "xl., collar.; 100%., a.., v-neck.,": "xl. collar. 100 % a. v-neck.",
    # joined words
    "w/ w/o w/lace a/b/c/d and/or 3/4-sleeve/x": "w / w/o w/lace a/b/c / d and/or 3/4-sleeve/x",
    "black,v-neck white,black v-neck,red 2.5-inch": "black,v-neck white black v-neck red 2.5-inch",
    "hi-lo- -foo foo--bar foo — bar a-b-c foo_bar _x": "hi-lo foo foo bar foo bar a-b-c foo_bar _ x",
    "H&M D&G h&m A+B black&white AT&amp;T": "h&m d&g h & m a+b black & white at&t",
    "#tag @brand #1 @1 # ## @é #é-x": "#tag @brand # 1 @ 1 # ## @ é #é x",
    # figures
    "1,000.50 .5 5. -5 +5 2-3 2.5-3.5 10:30am 10x12": "1,000.50 .5 5 -5 +5 2-3 2.5-3 .5 10:30 am 10x12",
    '1/2 1-1/2" 2½ ½ ⅔ 5\'9" 12" 3XL 34B 1st': "1/2 1-1/2 2 1/2 1/2 2/3 5 9 12 3xl 34b 1st",
    "$45.50 US$30 €20 £15 ¥300 20¢ a$5 100% 5%x": "$ 45.50 us$ 30 $ 20 # 15 ¥ 300 20 cents a $ 5 100 % 5 % x",
    # signs
    "(a) [b] {c} () :) ;-) a:)": "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb- -lrb- -rrb- :-rrb- ;--rrb- a :-rrb-",
    "color:Dark size:M a:D x;p =D": "color dark size m a :d x ;p =d",
    "! ? !! ?! ... .. … - -- --- ----- ; : ,": "!! ?! -----",
    "Lycra® brand™ 30°C 3×4 • § ¿": "lycra ® brand ™ 30 ° c 3 × 4 • § ¿",
    "* ** a*b + ++ = ~ ^ | || \\ a\\b _ __ > <<": "* ** a * b + + + = ~ ^ | | | \\ a \\ b _ __ > <<",
    "<b>x</b><br/>a < b <3": "<b> x </b> <br/> a < b < 3",
    "&lt;x&gt; &quot;y&quot; &nbsp;z a&apos;s": "< x > y z a 's",
    # other scripts, and what is none
    "piqué crêpe Ærø ß piqué/x x/piqué": "piqué crêpe ærø ß piqué / x x/piqu é",
    "日本 ру́сский 한국어": "日本 ру́сский 한국어",
    "a\U0001f600b \ufffd \x00 soft\xadhyphen zero\u200bwidth no\xa0break": "a b softhyphen zero width no break",
    "a\x92s \x93b\x94 c\x96d": "a 's b c d",  # cp1252 in what should be Latin 1
}


@pytest.mark.parametrize("case", GOLD["tokenizer_cases"], ids=lambda case: ascii(case["in"][:20]))
def test_the_goldens_cases(case):
    assert ptb_words(case["in"]) == case["out"].split()


def test_the_goldens_captions():
    for part in (GOLD, GOLD["multi"]):
        for kind in ("refs", "hyps"):
            for key, texts in part[kind].items():
                wanted = part.get("coco")[f"tokenized_{kind}"][key]
                assert [" ".join(ptb_words(text)) for text in texts] == wanted


@pytest.mark.parametrize("caption", ASKED, ids=lambda caption: ascii(caption[:20]))
def test_quirks(caption):
    assert ptb_words(caption) == ASKED[caption].split()


@pytest.mark.parametrize(
    ("target", "old", "new"),
    [
        ("lex", "[longest[0]]).lower()", "[longest[0]])"),
        ("lex", ".translate(SPELT)", ""),
        ("lex", "key=lambda match: match.end()", "key=lambda match: -match.end()"),
        ("ptb_words", 'LAST.sub(r"\\1 .", text)', "text"),
        ("ptb_words", ".translate(WINDOWS)", ""),
        ("ptb_words", "ENTITIES[match[1].lower()]", "match[0]"),
    ],
)
def test_a_wrong_line_is_noticed(target, old, new, monkeypatch):
    module.lex.cache_clear()
    monkeypatch.setattr(module, "lex", module.lex.__wrapped__)
    plant(monkeypatch, module, target, old, new)
    if target == "lex":
        monkeypatch.setattr(module, "lex", getattr(module.lex, "__wrapped__", module.lex))
    with pytest.raises(AssertionError):
        for caption, wanted in ASKED.items():
            assert module.ptb_words(caption) == wanted.split()


def test_every_rule_is_needed(monkeypatch):
    """Without any one of them some case comes out otherwise."""
    monkeypatch.setattr(module, "lex", module.lex.__wrapped__)
    cases = [*ASKED, *(case["in"] for case in GOLD["tokenizer_cases"])]
    right = [ptb_words(case) for case in cases]
    for i, rule in enumerate(module.RULES):
        monkeypatch.setattr(module, "RULES", [*module.RULES[:i], *module.RULES[i + 1 :]])
        assert [ptb_words(case) for case in cases] != right, rule.pattern
        monkeypatch.undo()
        monkeypatch.setattr(module, "lex", module.lex.__wrapped__)


def test_texts_without_words():
    for text in ("", "  ", "\n\r\t", ". , ; - -- ... ' \" `", "\U0001f600"):
        assert ptb_words(text) == []


def test_lines_and_blanks_part_words_and_nothing_else():
    for blank in ("\n", "\r\n", "\t", "  ", "\u2028", "\xa0", "\u3000"):
        assert ptb_words(f"{blank}v-neck tee.{blank}Red{blank}") == ["v-neck", "tee", "red"]


def test_toyfashions_captions_are_plain_words():
    rng = np.random.default_rng(0)
    for write in WRITERS.values():
        for _ in range(50):
            text = write(toy.sample_garment(rng), rng)
            plain = text.lower().translate(str.maketrans("", "", ".,;:!?")).split()
            assert ptb_words(text) == [word for word in plain if word != "-"]


def test_any_text_has_words():
    rng = random.Random(0)
    signs = string.printable + "éÉ’“”™½€\xad\x92\u0301\U0001f600"
    for _ in range(300):
        words = ptb_words("".join(rng.choices(signs, k=80)))
        assert all(word == word.lower() and word.split() == [word] for word in words)
    for text in ("a" * 20000, "a.," * 2000, "-" * 20000, "a-" * 9000, "<" * 20000, "a'" * 9000, "<a" * 2000):
        ptb_words(text)  # no pattern runs away
