"""The clean-up of captions before CLIP's byte pairs, as normalizers of the tokenizers library.

open_clip repairs a text with ftfy, resolves HTML entities twice, joins white space and lowers the
case. The tokenizers library knows none of these but the last: here each is a list of replacements,
so that an exported ``tokenizer.json`` does by itself what our tokenizer does.
"""

from __future__ import annotations

import html
import re
from collections import defaultdict
from html.entities import name2codepoint
from typing import Any

DIFFERENCES = (
    "broken encodings (`cafÃ©`) are not repaired, half-width Hangul stays as it is, and of HTML "
    "entities those stay that are neither of Latin-1 nor common punctuation (`&alpha;`, "
    "`&#20320;`), that lack their semicolon (`&copy 2020`) or are written in capitals "
    "(`&EACUTE;`); entities in a text that holds a `<`, and end-of-text tokens written right "
    "behind punctuation, are read in another order"
)
"""In which captions an exported tokenizer gives other tokens than open_clip's."""

_PUNCTUATION = (
    *range(0x2013, 0x2015), *range(0x2018, 0x201F), 0x2022, 0x2026, 0x2032, 0x2033, 0x20AC, 0x2122,
)  # fmt: skip
_CONTROLS = "\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc"
_CHANGED = (
    (0x80, 0x300), (0x2010, 0x2030), (0x3000, 0x3001), (0xFB00, 0xFB07), (0xFF00, 0xFFA0),
    (0xFFE0, 0xFFF0),
)  # fmt: skip
"""Where ftfy changes single characters: C1 controls, ligatures, quotes, full and half width."""


def clip_normalizer() -> Any:
    """What open_clip does to a caption, but for the captions of :data:`DIFFERENCES`."""
    from tokenizers import Regex, normalizers

    replace = normalizers.Replace
    return normalizers.Sequence(
        [
            # texts are often escaped twice: whatever hides behind an ampersand comes out first
            replace(Regex("&(?:(?:amp|AMP|#0*38|#[xX]0*26);)+"), "&"),
            *(replace(Regex(pattern), text) for pattern, text in _entities()),
            *(replace(Regex(pattern), text) for pattern, text in _characters()),
            replace(Regex(r"\x1b\[[0-9;]*[a-zA-Z]"), ""),
            replace(Regex(f"[{_CONTROLS}]"), ""),
            normalizers.NFC(),
            replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            # a capital sigma is lowered by its place in the word
            replace(Regex("(?<=\\p{L})\u03a3(?!\\p{L})"), "\u03c2"),
            normalizers.Lowercase(),
        ]
    )


def _entities() -> list[tuple[str, str]]:
    """A pattern for all spellings of every character that is resolved."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, number in name2codepoint.items():
        names[number].append(name)
    for name in ("apos", "QUOT", "LT", "GT"):
        names[ord(html.unescape(f"&{name};"))].append(name)
    ascii_marks = (n for n in range(0x20, 0x7F) if not chr(n).isalnum() and chr(n) != "&")
    patterns = []
    for number in (*ascii_marks, *range(0xA0, 0x100), *_PUNCTUATION):
        digits = "".join(f"[{d}{d.upper()}]" if d.isalpha() else d for d in f"{number:x}")
        spellings = [*names[number], f"#0*{number}", f"#[xX]0*{digits}"]
        patterns.append((f"&(?:{'|'.join(spellings)});", chr(number)))
    return patterns


def _characters() -> list[tuple[str, str]]:
    """A pattern for all characters that ftfy makes the same of, and what it makes of them."""
    import ftfy

    made: dict[str, str] = defaultdict(str)
    for number in (number for start, stop in _CHANGED for number in range(start, stop)):
        fixed = ftfy.fix_text(chr(number), normalization=None)
        if fixed != chr(number) and not (fixed.isspace() or not fixed):
            made[fixed] += chr(number)
    return [(f"[{re.escape(characters)}]", fixed) for fixed, characters in made.items()]
