"""A caption's words as pycocoevalcap 1.2 has them: PTBTokenizer of Stanford CoreNLP 3.4.1, lower case, punctuation dropped.

    It's a v-neck (12.5" long), approx. $45.50.  ->  it 's a v-neck -lrb- 12.5 long -rrb- approx $ 45.50

A lexer: of all `RULES` the one that matches most takes its place in the text, the first of equals; a rule's groups are words
of their own; what no rule knows vanishes, and so punctuation does. Written from what the original does to captions and to
single signs, not from its grammar. Its quirks are kept:

    brackets survive as words: its list of punctuation has -LRB- in capitals, and the text by then has none
    !! and ?! are words, ! and ? are not
    an abbreviation keeps its full stop, and so does any single letter ("size L. Red" -> l.); Wash. is one, wash. is not
    a full stop without a blank ends nothing (white.short), nor does a comma before a hyphen (black,v-neck)
    ½ becomes 1/2, the euro $, the pound #, the cent cents, a smile :-rrb-
    emoji and control characters vanish; words in two get a straight apostrophe (women ’s -> 's), others keep their own

Not here: telephone numbers, addresses of web and mail, HTML's entities but those of `ENTITIES`.
"""

import re
from functools import lru_cache


def one_of(words: str, capitals: bool = False) -> str:
    return "|".join(f"{word}|{word.upper()}" if capitals else word for word in words.split())


OTHER = r"\W_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u218f\u2460-\u2793\U00010000-\U0010ffff"  # figures that are no digits
ACCENT = r"[\u0300-\u036f]"
A = rf"(?:[^{OTHER}]|{ACCENT})"  # a letter or digit
L = rf"(?:[^{OTHER}\d]{ACCENT}*)"  # a letter
Q = "['’]"
HALF = r"(?i:[smd]|re|ve|ll)"  # it 's, they 're
INITIALS = r"[A-Za-z](?:\.[A-Za-z])+\."
TAG = r"</?[A-Za-z][^<>]*>|<![^<>]*>"

# Found by asking the original about every word of two to four letters and those of the data sets' captions.
ABBREVIATIONS = one_of("""
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros calif capt cf cie
    cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov
    govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo
    mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph\\.d ph plc ppte ppty pres prof profs pte ptes pty
    ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs treas tue tues
    univ va vs vt wed wis wisc wm wyo
""")
STATES = one_of("Ark Az Del Ill La Mass Miss Ore Pa Tex Wash", capitals=True)
NUMBERED = one_of("no nos art ca fig figs op pp prop")  # before a figure only
STARTERS = one_of(
    """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once One Other
    Our She Since So Some Such That The Their Then There These They This We What When While Yet You
    """,
    capitals=True,
)

RULES = [
    re.compile(rule)
    for rule in (
        TAG,
        # Two words in one: is n't, it 's, y' all, can not
        rf"({L}{A}*?)([nN](?:{Q}|`)[tT]{A}*)|[nN](?:{Q}|`)[tT]{A}*",
        rf"'{HALF}(?!{A})|’{HALF}|[yY]{Q}(?={A})",
        r"(?i:(can)(not)|(gon|wan)(na)|(got)(ta)|(lem|gim)(me))",
        rf"({Q}[tT])((?i:is|was))",
        # An apostrophe within one: o'clock, 'n', '90s
        rf"[dDlLoO]{Q}{A}{{2,}}|[nA-HJ-XZ]{Q}(?!{HALF}(?!{A})){L}{{2,}}|[dDjJlL]{Q}",
        rf"[A-Za-z]+[aeiouyAEIOUY]{Q}[aeiouAEIOU][A-Za-z]*",
        rf"(?i:c{Q}mon|nor{Q}easter|ol{Q}(?!{A}{{2}})|{Q}em|{Q}till?)|{Q}[nN](?:{Q}|(?!{A}))",
        rf"{Q}\d\d(?!\S)|{Q}[2-9]0[sS](?!{A})",
        # A full stop at its end
        INITIALS,
        rf"[A-Za-z]\.|(?i:{ABBREVIATIONS})\.|(?:{STATES})\.|(?i:{NUMBERED})\.(?= $|\d)",
        rf"{A}+(?:-{A}+)*\.(?=[,;:])",
        # Whole words, joined or not: v-neck, navy/white, 2.5-inch, H&M
        rf"{L}{A}*(?:[.!?]{L}{A}*)*",
        rf"{A}+(?:[-_‐‑]{A}+)*",
        r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
        rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:{INITIALS}|[A-Za-z0-9]+))+",
        r"[A-Z]+(?:[&+][A-Z]+)+",
        rf"#{L}+|@[A-Za-z][A-Za-z0-9_]*",
        # Figures
        r"\d{1,4}-\d{1,4}/\d{1,4}|[-+]?(?:\d+|[.:,]\d+)(?:[.:,]\d+)*|[A-Z]+\$",
        # Signs; an empty group is no word, but keeps others from what it matches
        rf"[<>]?[:;=][-o*']?[()DPdpO\\@|\[\]{{3](?!{A})",  # a smile
        r"()(?:\.{3,}|''|-{2,4}(?!-))|-{5,}|[!?]{2,}|\*+|_+|[#@]{2,}|<<|>>",
        r"[#$%&()*+/<=>@\[\\\]^_{|}~¡-ª¬®-º¼-¿×÷\u2016\u2017‚„-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044]",
        r"[\u2070-\u209f\u20a0\u20a4€\u2100-\u214f\u2153-\u215e\u2190-\u2bff\u3001\u3002]",
    )
]
# No word reaches beyond a chunk. The blank at a chunk's end says that a figure follows.
CHUNK = re.compile(r"<[^<>]*>|[^\s<]+(?: (?=\d))?|<+")
# "in size L. The sleeves": the full stop is the sentence's, and none of an initial.
LAST = re.compile(rf"(?<![\w.&-])({L})\.(?=\s+(?:(?:{STARTERS})(?!\S)|{TAG}))")
CURLY = re.compile(f"(n?)’({HALF}|t)")
SPELT = str.maketrans(
    {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
    | {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
    | {"€": "$", "¤": "$", "\u20a0": "$", "£": "#", "¢": "cents"}
)
# What cp1252 has between 80 and 9f is read right where it was taken for Latin 1; soft hyphens go.
WINDOWS = str.maketrans("\x80\x91\x92\x93\x94\x96\x97", "€‘’“”–—", "\u00ad")
ENTITIES = {"amp": "&", "lt": " < ", "gt": " > ", "quot": '"', "apos": "'", "nbsp": " "}
ENTITY = re.compile(f"&({'|'.join(ENTITIES)});", re.IGNORECASE)


def ptb_words(text: str) -> list[str]:
    """A caption, of one line or several -> its words."""
    text = ENTITY.sub(lambda match: ENTITIES[match[1].lower()], text.translate(WINDOWS))
    return [word for chunk in CHUNK.findall(LAST.sub(r"\1 .", text)) for word in lex(chunk)]


@lru_cache(1 << 16)  # captions say the same words over and over
def lex(chunk: str) -> tuple[str, ...]:
    words, at = [], 0
    while at < len(chunk):
        found = (match for rule in RULES if (match := rule.match(chunk, at)))
        longest = max(found, key=lambda match: match.end(), default=None)
        if longest:
            groups = [group for group in longest.groups() if group is not None]
            words += " ".join(groups or [longest[0]]).lower().translate(SPELT).split()
        at = longest.end() if longest else at + 1
    return tuple(CURLY.sub(r"\1'\2", word) if CURLY.fullmatch(word) else word for word in words)
