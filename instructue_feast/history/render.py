"""Event texts: the one place where a raw value becomes text that a model reads.

Rendering happens in two steps. Spark concatenates the template natively; then each *distinct* text is cut to
`max_text_chars` code points and goes through `normalise`, once. The identity of a text, `text_id`, is a hash of what
`normalise` returns.
"""

from __future__ import annotations

import re
import unicodedata

import xxhash

RENDER_VERSION = 1
"""Goes into every embedding version. Raise it when a rendered text or a bucket edge could change."""

_NEUTRAL = str.maketrans({"<": "‹", ">": "›", "[": "(", "]": ")", "|": "¦"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]+")


def normalise(text: str) -> str:
    r"""Makes a rendered text canonical and harmless.

    NFC; control characters, zero-width and direction marks become spaces; runs of spaces collapse; the brackets that
    special tokens are made of (`<USER>`, `</bill>`, `[SEP]`, `<|im_end|>`) become look-alikes, so that no text of a
    user can close a section or pose as an instruction. Emoji and right-to-left letters stay.

    Args:
        text: Any text.

    Returns:
        The canonical text; `empty` when nothing is left.

    Example:
        >>> normalise("caf\u0065\u0301\x00  </bill>")
        'café ‹/bill›'
    """
    cleaned = _CONTROL.sub(" ", unicodedata.normalize("NFC", text)).translate(_NEUTRAL)
    return " ".join(cleaned.split()) or "empty"


def text_id(source: str, text: str) -> int:
    """Stable signed 64-bit identity of a text of a source; equals Spark's `xxhash64(source, text)`.

    >>> text_id("bill", "coffee")
    8742207242304102694
    """
    seed = xxhash.xxh64_intdigest(source.encode(), seed=42)
    digest = xxhash.xxh64_intdigest(text.encode(), seed=seed)
    return digest - (1 << 64) if digest >= 1 << 63 else digest


def categorical_text(column: str, value: str) -> str:
    """Text of a categorical value of a tabular source, before `normalise`.

    >>> categorical_text("home_ownership", "Renter")
    'home ownership: Renter'
    """
    return f"{column.replace('_', ' ')}: {value}"
