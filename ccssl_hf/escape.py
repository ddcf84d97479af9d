"""Text that somebody else wrote, such as a class name, made safe for a terminal, a card or a plot."""

from __future__ import annotations

import re
import reprlib

# Control characters and those that change the direction of text, without the joiners that some scripts need.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]")
_MARKDOWN = re.compile(
    r"[\\`\[\]|$~]|(?<!\s)\*|\*(?!\s)|(?<![^\W_])_|_(?![^\W_])"  # an underscore within a word is plain text
    r"|(?<=\b(?:http|file))(?=://)|(?<=\bhttps)(?=://)|(?<=\bftp)(?=://)|(?<=\bwww)(?=\.)"  # would become links
    r"|^(?=>|[-+](?:\s|$)|#{1,6}(?:\s|$)|-{2,}|(?:-\s*){3,}$|=+\s*$)|(?<=^\d)(?=[.)](?:\s|$))|(?<=^\d\d)(?=[.)](?:\s|$))"
)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def short(value: object) -> str:
    """A value that can be long and deep, for an error message."""
    return "null or missing" if value is None else _REPR.repr(value)


def printable(text: str, *, lines: bool = False, most: int | None = None) -> str:
    """Text for a terminal, in one line unless `lines`: other control characters as escapes, such as `\\x1b`.

    `most` is the number of characters from which the end is left out.
    """
    text = re.sub(r"[^\S\n]" if lines else r"\s+", " ", text)
    text = _HIDDEN.sub(lambda match: match[0] if match[0] == "\n" else match[0].encode("unicode_escape").decode(), text)
    return text if most is None or len(text) <= most else f"{text[: most - 1]}…"


def markdown(text: str) -> str:
    """Text for a line or table cell of Markdown that shows as it is: no markup, links, mathematics or HTML."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", printable(text.strip()))
    return _MARKDOWN.sub(r"\\\g<0>", text).replace("<", "&lt;")


def code(text: str) -> str:
    """Text for a code span of Markdown."""
    return f"`{printable(text).replace('`', chr(39)).replace('|', '¦').strip() or ' '}`"


def plot_text(text: str, most: int = 40) -> str:
    """A name for a plot: no mathematics, and not longer than `most` characters."""
    text = printable(text.strip(), most=most).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # matplotlib hides legend entries that start with one
