"""How the JSON of a table of contents is spelled, as far as two decoders may take it for different tables."""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from estargz.reading.toc import TOCEntry

__all__ = ["TOCText", "read_text"]

_ENTRY_KEYS = frozenset(TOCEntry.__struct_encode_fields__)
_TABLE_KEYS = frozenset(("version", "entries"))
_KEYS = {key.lower(): key for key in _ENTRY_KEYS | _TABLE_KEYS}
_FIRST = 100  # spellings of one kind that are kept with their entry


@dataclass(slots=True)
class TOCText:
    """What was seen.

    version:         its value, None when there is none
    null_entries:    "entries" is null or missing
    array_in_front:  an unknown key in front of "entries" has an array as its value
    trailing:        characters of white space behind the last brace
    twice, folded, unknown:  keys that an object has more than once, that are known but written in another case, or not
                     known: (name of the entry or None for the table, key), the first 100; how many there are in ``counts``
    """

    version: Any = None
    null_entries: bool = True
    array_in_front: bool = False
    trailing: int = 0
    twice: list[tuple[str | None, str]] = field(default_factory=list)
    folded: list[tuple[str | None, str]] = field(default_factory=list)
    unknown: list[tuple[str | None, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, entry: str | None, key: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= _FIRST:
            getattr(self, kind).append((entry, key))


def read_text(pieces: Iterator[bytes]) -> TOCText:
    """Look through the JSON, which must be one that parse_toc() accepts, entry by entry and never all of it at once."""
    found = TOCText()
    text = _Text(pieces)
    seen: set[str] = set()
    text.take("{")
    while text.peek() != "}":
        key = text.value()
        text.take(":")
        known = _known(key)
        if key in seen:
            found.note("twice", None, key)
        seen.add(key)
        if known not in _TABLE_KEYS:
            found.note("unknown", None, key)
        elif known != key:
            found.note("folded", None, key)
        if known == "entries" and text.peek() == "[":
            found.null_entries = False
            _read_entries(text, found)
        else:
            in_front = text.peek() == "[" and found.null_entries
            value = text.value()
            found.array_in_front |= in_front
            found.version = value if known == "version" else found.version
        if text.peek() == ",":
            text.take(",")
    text.take("}")
    found.trailing = text.rest()
    return found


def _read_entries(text: _Text, found: TOCText) -> None:
    text.take("[")
    while text.peek() != "]":
        _check_keys(text.value(), found)
        if text.peek() == ",":
            text.take(",")
    text.take("]")


def _check_keys(entry: tuple[tuple[str, Any], ...], found: TOCText) -> None:
    """An object comes as its pairs, so that none is lost."""
    keys = [key for key, _ in entry]
    odd = len(set(keys)) != len(keys) or not _ENTRY_KEYS.issuperset(keys)
    attributes = [value for _, value in entry if type(value) is tuple]
    if not odd and not attributes:
        return
    name = next((value for key, value in reversed(entry) if _known(key) == "name" and isinstance(value, str)), "")
    for key in _repeated(keys):
        found.note("twice", name, key)
    for key in keys if odd else ():
        if key not in _ENTRY_KEYS:
            found.note("folded" if _known(key) in _ENTRY_KEYS else "unknown", name, key)
    for pairs in attributes:
        for key in _repeated([key for key, _ in pairs]):
            found.note("twice", name, key)


def _repeated(keys: list[str]) -> list[str]:
    if len(set(keys)) == len(keys):
        return []
    return [key for key, count in Counter(keys).items() if count > 1]


def _known(key: str) -> str | None:
    """The key that decoders in Go take this one for: they fold case, two letters beyond ASCII included."""
    return _KEYS.get(key.replace("\u017f", "s").replace("\u212a", "k").lower())


class _Text:
    """JSON text that comes in pieces; what was taken is let go."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._decode = codecs.getincrementaldecoder("utf-8")("estargz-replace").decode
        self._scan = json.JSONDecoder(object_pairs_hook=tuple, parse_float=str).raw_decode
        self._text = ""
        self._at = 0

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in " \t\r\n":
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(f"{character} is missing")
        self._at += 1

    def value(self) -> Any:
        """The next string, number, literal, list, or object as a tuple of pairs."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            # A number that ends where the text does may go on.
            if end == len(self._text) and self._more():
                continue
            self._at = end
            return value

    def rest(self) -> int:
        """How many characters are left; they are taken."""
        count = 0
        while True:
            count += len(self._text) - self._at
            self._at = len(self._text)
            if not self._more():
                return count

    def _more(self) -> bool:
        """Take as much again as is at hand, so that a long value is not looked at for every piece of it."""
        fresh = []
        wanted = len(self._text) - self._at
        while (piece := next(self._pieces, None)) is not None:
            fresh.append(self._decode(piece))
            wanted -= len(piece)
            if wanted <= 0:
                break
        self._text = self._text[self._at :] + "".join(fresh)
        self._at = 0
        return bool(fresh)
