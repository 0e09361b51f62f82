"""Which paths come first in a layer: names and patterns as they were asked for, and what the source has of them."""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from posixpath import normpath

from estargz.errors import UsageError
from estargz.writing.access_log import PathPattern

__all__ = ["LANDMARK_PAYLOAD", "NO_PREFETCH_LANDMARK", "PREFETCH_LANDMARK", "Priority"]

PREFETCH_LANDMARK = b".prefetch.landmark"
NO_PREFETCH_LANDMARK = b".no.prefetch.landmark"
LANDMARK_PAYLOAD = b"\x0f"

PATH_ABSENT = 0
"""State of a path that the layer does not have; every other one means that it does, or may (ext/estargz/_walk.pyx)."""

NAMES_IN_MESSAGE = 50

NamesBelow = Callable[[bytes], bytes]
"""Gives all paths below a directory of the source, each followed by a NUL, in any order."""


class Priority:
    """Paths and patterns in order of priority, each once.

    Args:
        wanted: paths relative to the layer's root; leading ``/`` and ``./`` mean nothing. One with ``*``, ``?``, ``[`` or a
            backslash in it is a pattern, unless the source has something of just that name: it means all that matches, in
            byte order. A backslash makes the next character an ordinary one.
        allow_missing: what the layer does not have is an answer, not an error.

    Raises:
        UsageError: it is no sequence of paths and patterns.
    """

    def __init__(self, wanted: Iterable[str], *, allow_missing: bool = False) -> None:
        if isinstance(wanted, str | bytes):
            raise UsageError("paths to prefetch are a sequence of paths, not one path")
        self.allow_missing = allow_missing
        self._wanted: dict[str | PathPattern, str] = {}  # path or pattern -> as it was given first
        for text in wanted:
            if not isinstance(text, str) or not can_be_path(text):
                raise UsageError(f"{text!r} is no path to prefetch")
            self._wanted.setdefault(path_or_pattern(text), text)
        self._counts: array[int] | None = None  # paths of each that was wanted; None: one

    def __len__(self) -> int:
        return len(self._wanted)

    def resolve(self, names_below: NamesBelow) -> bytes:
        """The paths, each followed by a NUL; a pattern gives those that it matches."""
        folders = {folder_of(pattern) for pattern in self._wanted if isinstance(pattern, PathPattern)}
        if not folders:
            return b"".join(os.fsencode(str(path)) + b"\0" for path in self._wanted)
        listings = {folder: in_order(names_below(folder)) for folder in outermost(folders)}
        parts, counts = [], array("q")
        for wish in self._wanted:
            found = [os.fsencode(wish)] if isinstance(wish, str) else resolved(wish, listings)
            parts.append(b"".join(name + b"\0" for name in found))
            counts.append(len(found))
        self._counts = counts
        return b"".join(parts)

    def missing(self, states: bytes | bytearray) -> tuple[str, ...]:
        """What the layer has nothing of, as it was given; ``states``: one for each path that ``resolve`` gave.

        Raises:
            UsageError: there is such, and it is not allowed to be; names them all, up to a limit.
        """
        missing = tuple(self._missing(states))
        if missing and not self.allow_missing:
            shown = ", ".join(map(repr, missing[:NAMES_IN_MESSAGE]))
            more = f" and {len(missing) - NAMES_IN_MESSAGE} more" if len(missing) > NAMES_IN_MESSAGE else ""
            raise UsageError(
                f"paths to prefetch that are not in the layer: {shown}{more}; leave them out, or use --allow-missing"
            )
        return missing

    def _missing(self, states: bytes | bytearray) -> Iterator[str]:
        at = 0
        for i, text in enumerate(self._wanted.values()):
            count = 1 if self._counts is None else self._counts[i]
            if states.count(PATH_ABSENT, at, at + count) == count:
                yield text
            at += count


def can_be_path(text: str) -> bool:
    """Lone surrogates are bytes that are no UTF-8, as long as they stand for one (PEP 383)."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def path_or_pattern(text: str) -> str | PathPattern:
    path = normpath("/" + text.lstrip("/"))[1:]
    if not any(special in path for special in "*?[\\"):
        return path
    pattern = PathPattern(path)
    return pattern if pattern.literal is None else pattern.literal


def folder_of(pattern: PathPattern) -> bytes:
    """The directory that all that matches lies below; empty for the root."""
    return os.fsencode(pattern.prefix.rpartition("/")[0])


def outermost(folders: Iterable[bytes]) -> list[bytes]:
    """Those that lie below no other one."""
    kept: list[bytes] = []
    for folder in sorted(folders, key=lambda folder: folder + b"/" if folder else b""):
        if not kept or not is_within(folder, kept[-1]):
            kept.append(folder)
    return kept


def is_within(path: bytes, folder: bytes) -> bool:
    return not folder or path == folder or path.startswith(folder + b"/")


def in_order(names: bytes) -> bytes:
    """Names in byte order, a NUL in front of each and at the end."""
    return b"\0".join([b"", *sorted(names.split(b"\0")[:-1]), b""])


def resolved(pattern: PathPattern, listings: dict[bytes, bytes]) -> list[bytes]:
    """What a pattern means: the path of just that name, if there is one, or else all that it matches, in order."""
    names = next(names for folder, names in listings.items() if is_within(folder_of(pattern), folder))
    itself = os.fsencode(pattern.text)
    if b"\0" + itself + b"\0" in names:
        return [itself]
    prefix = os.fsencode(pattern.prefix)
    span = range(len(names) - 1)
    first = bisect_left(span, prefix, key=lambda at: name_at(at, names))
    last = bisect_left(span, True, lo=first, key=lambda at: name_at(at, names)[: len(prefix)] > prefix)
    needle = b"\0" if pattern.needle in pattern.prefix else os.fsencode(pattern.needle)
    return [name for name in names_with(needle, names, first, last) if pattern.matches(os.fsdecode(name))]


def name_at(at: int, names: bytes) -> bytes:
    begin = names.rfind(b"\0", 0, at + 1) + 1
    return names[begin : names.index(b"\0", begin)]


def names_with(needle: bytes, names: bytes, at: int, end: int) -> Iterator[bytes]:
    """Those that begin in names[at:end] and have the needle in them, or behind the NUL in front of them."""
    while at < end and (found := names.find(needle, at, end)) >= 0:
        name = name_at(found, names)
        yield name
        at = names.index(b"\0", found + 1)
