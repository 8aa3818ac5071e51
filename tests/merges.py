"""A vocabulary for CLIP's tokenizer, small enough to read: the real one is OpenAI's."""

from pathlib import Path

PAIRS = """
d r|e s|es s</w>|dr ess</w>|r e|re d</w>|s h|i r|sh ir|shir t</w>|l o|lo n|lon g</w>|w i|t h</w>|wi th</w>|b l|a c|bl ac|blac k</w>
' s</w>|' t</w>|. .|.. .</w>|- -|! !</w>|! !|Ã ©|Ã ©</w>|c a|ca f|caf Ã©</w>|Å Ł|à ¤|o o|oo oo|oooo o</w>|o o</w>|n e|e c|e r|re s
""".replace("\n", "|").strip("|").split("|")  # fmt: skip
VOCAB_SIZE = 2 * 256 + len(PAIRS) + 2


def write_merges(path: Path) -> Path:
    """Hugging Face's edition -> `path`."""
    path.write_text("\n".join(["#version: 0.2", *PAIRS]) + "\n", encoding="utf-8")
    return path
