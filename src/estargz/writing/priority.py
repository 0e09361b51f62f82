"""Which paths come first in a layer: names and patterns as they were asked for, and what the source has of them."""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from posixpath import normpath

from estargz.errors import UsageError

__all__ = ["ABSENT", "LANDMARK_PAYLOAD", "NO_PREFETCH_LANDMARK", "PREFETCH_LANDMARK", "Priority"]

PREFETCH_LANDMARK = b".prefetch.landmark"
NO_PREFETCH_LANDMARK = b".no.prefetch.landmark"
LANDMARK_PAYLOAD = b"\x0f"

ABSENT = 0
"""State of a path that the layer does not have; every other state means that it does, or may (_walk.pyx)."""

NAMES_IN_MESSAGE = 50

NamesBelow = Callable[[bytes], bytes]
"""Gives all paths below a directory of the source, each followed by a NUL."""


class Priority:
    """Paths and patterns in order of priority, each once.

    Args:
        wanted: paths relative to the layer's root; leading ``/`` and ``./`` mean nothing. One with ``*``, ``?``, ``[`` or a
            backslash in it that names nothing as it stands is a pattern: it means its matches, in byte order.
        allow_missing: what the layer does not have is an answer, not an error.

    Raises:
        UsageError: it is no sequence of paths.
    """

    def __init__(self, wanted: Iterable[str], *, allow_missing: bool = False) -> None:
        if isinstance(wanted, str | bytes):
            raise UsageError("paths to prefetch are a sequence of paths, not one path")
        self._allow_missing = allow_missing
        self._wanted: dict[str, str] = {}  # cleaned -> as it was given first
        for text in wanted:
            if not isinstance(text, str) or "\0" in text:
                raise UsageError(f"{text!r} is no path to prefetch")
            self._wanted.setdefault(normpath("/./" + text)[1:], text)
        self._counts: array[int] | None = None

    def __len__(self) -> int:
        return len(self._wanted)

    def resolve(self, names_below: NamesBelow) -> bytes:
        """The paths, each followed by a NUL; patterns give what they match among the source's names."""
        patterns = [path for path in self._wanted if is_pattern(path)]
        listings = {folder: names_below(os.fsencode(folder)) for folder in outermost(map(fixed_folder, patterns))}
        if not patterns:
            return b"".join(os.fsencode(path) + b"\0" for path in self._wanted)
        parts, counts = [], array("q")
        for path in self._wanted:
            found = resolve_pattern(path, listings) if is_pattern(path) else [path]
            parts.append(b"".join(name + b"\0" for name in sorted(map(os.fsencode, found))))
            counts.append(len(found))
        self._counts = counts
        return b"".join(parts)

    def missing(self, states: bytes | bytearray) -> tuple[str, ...]:
        """What the layer has nothing of, as it was given; ``states``: one for each path that ``resolve`` gave.

        Raises:
            UsageError: there is such, and it is not allowed to be; names them all, up to a limit.
        """
        missing = tuple(self._missing(states))
        if missing and not self._allow_missing:
            shown = ", ".join(map(repr, missing[:NAMES_IN_MESSAGE]))
            more = f" and {len(missing) - NAMES_IN_MESSAGE} more" if len(missing) > NAMES_IN_MESSAGE else ""
            raise UsageError(
                f"paths to prefetch that are not in the layer: {shown}{more}; leave them out, or use --allow-missing"
            )
        return missing

    def _missing(self, states: bytes | bytearray) -> Iterator[str]:
        if self._counts is None:
            yield from (text for text, state in zip(self._wanted.values(), states, strict=True) if state == ABSENT)
            return
        at = 0
        for text, count in zip(self._wanted.values(), self._counts, strict=True):
            if states.count(ABSENT, at, at + count) == count:
                yield text
            at += count


def is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[\\")


def fixed_folder(pattern: str) -> str:
    """The directory that everything a pattern can match lies below; "" is the root."""
    parts = pattern.split("/")[:-1]
    special = next((i for i, part in enumerate(parts) if is_pattern(part)), len(parts))
    return "/".join(parts[:special])


def outermost(folders: Iterable[str]) -> list[str]:
    """Those that lie below no other one."""
    kept: list[str] = []
    for folder in sorted(set(folders), key=lambda name: name.split("/") if name else []):
        if not kept or not is_below(folder, kept[-1]):
            kept.append(folder)
    return kept


def is_below(path: str, folder: str) -> bool:
    return not folder or path.startswith(folder + "/")


def resolve_pattern(pattern: str, listings: dict[str, bytes]) -> list[str]:
    """What a pattern means: the path of just that name, if there is one, or else all that it matches."""
    listing = next(names for folder, names in listings.items() if is_below(fixed_folder(pattern) + "/", folder))
    name = os.fsencode(pattern) + b"\0"
    if listing.startswith(name) or b"\0" + name in listing:
        return [pattern]
    return matches(pattern, (os.fsdecode(found[0]) for found in re.finditer(rb"[^\0]+", listing)))


def matches(pattern: str, names: Iterable[str]) -> list[str]:
    return list(filter(re.compile(pattern_expression(pattern), re.DOTALL).fullmatch, names))


def pattern_expression(pattern: str) -> str:
    """The regular expression of a pattern: ``*`` and ``?`` stay within a name, ``**`` crosses directories."""
    tokens = re.compile(
        r"(?P<deep>\*\*/?)|(?P<star>\*)|(?P<any>\?)|(?P<set>\[[!^]?\]?[^\]/]*\])|\\?(?P<plain>.)", re.DOTALL
    )
    expression = ""
    for token in tokens.finditer(pattern):
        if token["deep"]:
            expression += "(?:.*/)?" if token["deep"].endswith("/") else ".*"
        elif token["star"]:
            expression += "[^/]*"
        elif token["any"]:
            expression += "[^/]"
        elif token["set"]:
            negated = token["set"][1] in "!^"
            body = token["set"][2 if negated else 1 : -1].replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
            expression += f"(?!/)[{'^' if negated else ''}{body}]"
        else:
            expression += re.escape(token["plain"])
    return expression
