"""What is a caption: one rule for every store.

A caption is text with something to read in it. Numbers are text too (a title may be ``7``);
truth values, objects and ``null`` are not. White space, control characters and byte-order marks
around a caption go, and what holds nothing else, or only characters without a glyph, is none.
"""

from __future__ import annotations

import math
import re
from typing import Any

_CONTROLS = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
_SPACES = "".join(filter(str.isspace, map(chr, range(0x3001))))
_EDGES = _CONTROLS + _SPACES + "\ufeff"
_WITHOUT_GLYPH = re.compile(
    # what Unicode calls default ignorable and format characters, spaces and controls
    "[\\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff0-\ufffb\U000e0000-\U000e0fff]*"
)
_SURROGATES = re.compile("[\ud800-\udfff]")


def caption_text(value: Any) -> str:
    """The caption that a stored value is, stripped; "" where it is none."""
    if not isinstance(value, str):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return str(value) if is_number and math.isfinite(value) else ""
    text = value.strip()
    if text.isascii() and text.isprintable():  # 9 in 10 captions
        return text
    text = text.strip(_EDGES)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which no encoding holds: as open_clip repairs it
        text = _SURROGATES.sub("\ufffd", text)
    return "" if _WITHOUT_GLYPH.fullmatch(text) else text


def caption_texts(value: Any) -> list[str]:
    """The captions that a stored value holds: itself, or those of a list that are some."""
    values = value if isinstance(value, list) else [value]
    return [text for item in values if (text := caption_text(item))]


def caption_lines(text: str) -> list[str]:
    r"""Every line that is a caption; ``\n``, ``\r\n`` and ``\r`` end one."""
    return caption_texts(text.replace("\r", "\n").split("\n"))
