"""How the JSON of a table of contents is spelled, as far as two decoders may take it for different tables."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from estargz.errors import BlobError
from estargz.reading.toc import TOCEntry

__all__ = ["TOCText", "read_text"]

_ENTRY_KEYS = frozenset(TOCEntry.__struct_encode_fields__)
_TABLE_KEYS = frozenset(("version", "entries"))
_KEYS = {key.lower(): key for key in _ENTRY_KEYS | _TABLE_KEYS}
_FIRST = 100  # spellings of one kind that are kept with their entry
_SHOWN = 256  # characters of a key that are kept with it
_KEYS_MOST = 10_000  # different ones in one object
_TEXT_MOST = 1 << 24  # characters of one key, number or text, as it is spelled
_SMALL = 1 << 20  # characters at hand in which an entry is decoded at once: some twenty times as much as objects

Pairs = tuple[tuple[str, Any], ...]

# All but brackets and what stands in texts, as far as it is at hand as a whole; what is shallow is passed over as such.
_TEXT = r'"(?:[^"\\]++|\\.)*+"'
_FLAT = re.compile(rf'(?:[^"\[\]{{}}]++|{_TEXT}|\[[^"\[\]{{}}]*+\]|\{{\}})*+', re.DOTALL)
_IN_TEXT = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
_LITERAL = re.compile(r"[-+.0-9A-Za-z]*+")


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

    def note(self, kind: str, entry: str | None, key: str, times: int = 1) -> None:
        kept = getattr(self, kind)
        shown = key if len(key) <= _SHOWN else key[:_SHOWN] + "..."
        kept += [(entry, shown)] * min(times, _FIRST - len(kept))
        self.counts[kind] += times


def read_text(pieces: Iterator[bytes], *, name: str = "TOC") -> TOCText:
    """Look through the JSON, which must be one that parse_toc() accepts, entry by entry and never all of it at once.

    Values that nobody asks for are passed over without being decoded. ``name`` is what messages call the JSON. Raises
    BlobError when one object has over 10,000 different keys, or its keys or one text take over 16 Mi characters.
    """
    found = TOCText()
    text = _Text(pieces, name)
    keys = _Keys(name)
    for key in text.object_keys():
        known = _known(key)
        if not keys.add(key):
            found.note("twice", None, key)
        if known not in _TABLE_KEYS:
            found.note("unknown", None, key)
        elif known != key:
            found.note("folded", None, key)
        is_array = text.peek() == "["
        found.array_in_front |= is_array and found.null_entries and known != "entries"
        if known == "entries" and is_array:
            found.null_entries = False
            _read_entries(text, found, name)
        elif known == "version":
            found.version = _read_version(text)
        else:
            text.skip()
    found.trailing = text.rest()
    return found


def _read_version(text: _Text) -> Any:
    """A number beyond those of parse_toc() comes as its text, as do lists and objects, which are not decoded."""
    first = text.peek()
    if first in "[{":
        text.skip()
        return "a list" if first == "[" else "an object"
    value = text.value()
    return int(value) if first != '"' and isinstance(value, str) and re.fullmatch("-?[0-9]{1,20}", value) else value


def _read_entries(text: _Text, found: TOCText, table: str) -> None:
    text.take("[")
    while text.peek() != "]":
        entry = text.small_object()
        if entry is not None:
            _check_entry(entry, found, table)
        elif text.peek() == "{":
            _read_large_entry(text, found, table)
        else:
            text.skip()  # in a list that another one comes behind, which is all that parse_toc() has looked into
        if text.peek() == ",":
            text.take(",")
    text.take("]")


def _check_entry(entry: Pairs, found: TOCText, table: str) -> None:
    """An object comes as its pairs, so that none is lost."""
    keys = [key for key, _ in entry]
    odd = len(set(keys)) != len(keys) or not _ENTRY_KEYS.issuperset(keys)
    attributes = [value for key, value in entry if type(value) is tuple and _known(key) == "xattrs"]
    if not odd and not attributes:
        return
    _expect_few(attributes, table)
    name = next((value for key, value in reversed(entry) if _known(key) == "name" and isinstance(value, str)), "")
    if odd:
        _Keys(table, keys).note(found, name)
    for pairs in attributes:
        _Keys(table, (key for key, _ in pairs)).note_twice(found, name)


def _read_large_entry(text: _Text, found: TOCText, table: str) -> None:
    """What _check_entry() does, one key after the other: an entry may be as long as the table."""
    name = ""
    keys = _Keys(table)
    attributes: list[_Keys] = []
    for key in text.object_keys():
        keys.add(key)
        known, first = _known(key), text.peek()
        if known == "name" and first == '"':
            name = text.value()
        elif known == "xattrs" and first == "{":
            attributes.append(_Keys(table))
            _expect_few(attributes, table)
            for attribute in text.object_keys():
                attributes[-1].add(attribute)
                text.skip()
        else:
            text.skip()
    keys.note(found, name)
    for those in attributes:
        those.note_twice(found, name)


def _expect_few(attributes: Sequence[object], table: str) -> None:
    if len(attributes) > _FIRST:
        raise BlobError(f'{table}: an entry has "xattrs" more than {_FIRST} times; build the blob again')


class _Keys:
    """The keys of one object, in the order in which they first come, and how often each of them does."""

    def __init__(self, table: str, keys: Iterable[str] = ()) -> None:
        self._table = table
        self._counts: Counter[str] = Counter()
        self._size = 0
        for key in keys:
            self.add(key)

    def add(self, key: str) -> bool:
        """Whether the key is new. Raises BlobError beyond what may be kept of one object."""
        self._counts[key] += 1
        if self._counts[key] > 1:
            return False
        self._size += len(key)
        if len(self._counts) > _KEYS_MOST or self._size > _TEXT_MOST:
            raise BlobError(
                f"{self._table}: an object has more than {_KEYS_MOST} keys, or keys of more than {_TEXT_MOST} characters; "
                "build the blob again"
            )
        return True

    def note(self, found: TOCText, entry: str) -> None:
        self.note_twice(found, entry)
        for key, count in self._counts.items():
            if key not in _ENTRY_KEYS:
                found.note("folded" if _known(key) in _ENTRY_KEYS else "unknown", entry, key, count)

    def note_twice(self, found: TOCText, entry: str) -> None:
        for key, count in self._counts.items():
            if count > 1:
                found.note("twice", entry, key)


def _known(key: str) -> str | None:
    """The key that decoders in Go take this one for: they fold case, two letters beyond ASCII included."""
    return _KEYS.get(key.replace("\u017f", "s").replace("\u212a", "k").lower())


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where a pattern that matches anywhere, be it nothing, ends when it begins at ``at``."""
    match = pattern.match(text, at)
    return match.end() if match else at


class _Text:
    """JSON text that comes in pieces; what was taken is let go."""

    def __init__(self, pieces: Iterator[bytes], name: str) -> None:
        self._pieces = pieces
        self._name = name
        self._decode = codecs.getincrementaldecoder("utf-8")("estargz-replace").decode
        self._scan = json.JSONDecoder(object_pairs_hook=tuple, parse_int=str, parse_float=str).raw_decode
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

    def object_keys(self) -> Iterator[str]:
        """The keys of the object that comes next; whoever takes one takes its value before the next one."""
        self.take("{")
        while self.peek() != "}":
            key = self.value()
            self.take(":")
            yield key
            if self.peek() == ",":
                self.take(",")
        self.take("}")

    def value(self) -> Any:
        """The next string or literal; a number comes as its text."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except json.JSONDecodeError:
                self._expect_at_most(len(self._text) - self._at)
                if not self._more():
                    raise
                continue
            # A number that ends where the text does may go on, and so may one that ends in front of a point there.
            if _end(_LITERAL, self._text, end) == len(self._text) and self._more():
                continue
            self._expect_at_most(end - self._at)
            self._at = end
            return value

    def _expect_at_most(self, size: int) -> None:
        if size > _TEXT_MOST:
            raise BlobError(
                f"{self._name}: a key or a value of more than {_TEXT_MOST} characters; build the blob again"
            )

    def small_object(self) -> Pairs | None:
        """The next object; None, and nothing is taken, when it is not in what is at hand or nested too deeply."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except RecursionError:
                return None
            except json.JSONDecodeError:
                if len(self._text) - self._at >= _SMALL or not self._more():
                    return None
                continue
            if type(value) is not tuple:
                return None
            self._at = end
            return value

    def skip(self) -> None:
        """Take the next value, however long and deep it is, and make nothing of it."""
        depth = 0
        while True:
            if depth:
                self._at = _end(_FLAT, self._text, self._at)
            character = self.peek()
            if not character:
                raise ValueError("it ends inside a value")
            if character == '"':
                self._skip_text()
            elif character in "[{":
                self._at += 1
                depth += 1
            elif character in "]}":
                self._at += 1
                depth -= 1
            elif not depth:
                self._skip_literal()
            if not depth:
                return

    def _skip_text(self) -> None:
        self._at += 1
        while True:
            self._at = _end(_IN_TEXT, self._text, self._at)
            if self._text.startswith('"', self._at):
                self._at += 1
                return
            if not self._more():
                raise ValueError("it ends inside a text")

    def _skip_literal(self) -> None:
        while True:
            self._at = _end(_LITERAL, self._text, self._at)
            if self._at < len(self._text) or not self._more():
                return

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
        wanted = min(len(self._text) - self._at, _SMALL)
        while (piece := next(self._pieces, None)) is not None:
            fresh.append(self._decode(piece))
            wanted -= len(piece)
            if wanted <= 0:
                break
        self._text = self._text[self._at :] + "".join(fresh)
        self._at = 0
        return bool(fresh)
