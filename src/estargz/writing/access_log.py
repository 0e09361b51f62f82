"""Which files were read, as somebody else wrote it down, and the patterns that choose a layer's names by it.

A log is ctr-remote's or estargz's JSON lines, strace's output, or a plain list; its content tells which. Whatever it is, it
becomes a list of patterns in order of first appearance; a path is the pattern that matches nothing but itself.

Patterns are of whole names relative to the root, as ``usr/lib/libc.so.6``:

    *       any characters of one component, also none
    ?       one character of a component
    [a-z]   one of these characters; [!a-z] or [^a-z] one of the others
    **      as a whole component: any number of components, also none; at the end, everything below, but at least one
    \\       the next character stands for itself

So ``usr/lib`` is that directory's own entry, and its content is ``usr/lib/**``.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import re
from array import array
from bisect import bisect_left, bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import BinaryIO, Literal

from estargz.errors import UsageError

__all__ = ["AccessLog", "PathPattern", "escape", "match", "match_all", "plain_line", "read_access_log"]

LINE_LIMIT = 1 << 20
"""Bytes of one line. A path has 4096, which strace may write in four characters each; arguments come on top."""

PATTERN_LIMIT = 1 << 14
"""Characters of a pattern with wildcards: four times a path's."""

Kind = Literal["json", "strace", "plain"]


class AccessLog(list[str]):
    """The patterns of a log, in order of first appearance, each once."""

    kind: Kind
    """What the log was."""
    unresolved: int
    """strace only: successful opens whose relative path begins at a directory that the log does not tell."""

    def __init__(self, patterns: Iterable[str] = (), kind: Kind = "plain", unresolved: int = 0) -> None:
        super().__init__(patterns)
        self.kind = kind
        self.unresolved = unresolved


# --- patterns


@dataclass(frozen=True, slots=True)
class PathPattern:
    """A pattern, cleaned and compiled.

    Raises:
        UsageError: it is no pattern.
    """

    text: str
    literal: str | None = field(init=False)
    """The only name that matches, if there is but one."""
    prefix: str = field(init=False, repr=False)
    """What all names that match begin with."""
    needle: str = field(init=False, repr=False)
    """The longest text that is in all of them."""
    _regex: re.Pattern[str] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        text = _clean(self.text)
        prefix, needle, fixed = _literals(text)
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "literal", prefix if fixed else None)
        object.__setattr__(self, "prefix", prefix)
        object.__setattr__(self, "needle", needle)
        object.__setattr__(self, "_regex", None if fixed else re.compile(_regex_of(text), re.DOTALL))

    def matches(self, name: str) -> bool:
        """Whether a name, cleaned and relative to the root, matches as a whole."""
        return name == self.literal if self._regex is None else self._regex.fullmatch(name) is not None


def match(pattern: str | PathPattern, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that match, in their order. Names are cleaned and relative to the root.

    Raises:
        UsageError: ``pattern`` is no pattern.
    """
    compiled = pattern if isinstance(pattern, PathPattern) else PathPattern(pattern)
    return list(filter(compiled.matches, names))


def match_all(patterns: Iterable[str | PathPattern], names: Iterable[str]) -> list[str]:
    """The names that match any pattern, each once: those of the first pattern first, and of one pattern in their order.

    Raises:
        UsageError: one of ``patterns`` is no pattern.
    """
    compiled = [pattern if isinstance(pattern, PathPattern) else PathPattern(pattern) for pattern in patterns]
    places = {name: place for place, name in enumerate(names)}
    if all(pattern.literal is not None for pattern in compiled):
        return list(dict.fromkeys(pattern.literal for pattern in compiled if pattern.literal in places))
    index = _NameIndex(places)
    return list(dict.fromkeys(name for pattern in compiled for name in index.matching(pattern)))


class _NameIndex:
    """Names that are found by what they begin with and what is in them; a pattern's regular expression sees only those."""

    def __init__(self, places: dict[str, int]) -> None:
        self._places = places
        self._sorted = sorted(places)
        self._text = "\0".join(self._sorted) + "\0"
        self._starts = array("q", accumulate(map(len, self._sorted), lambda start, size: start + size + 1, initial=0))

    def matching(self, pattern: PathPattern) -> list[str]:
        """In the names' own order."""
        if pattern.literal is not None:
            return [pattern.literal] if pattern.literal in self._places else []
        return sorted(filter(pattern.matches, self._candidates(pattern)), key=self._places.__getitem__)

    def _candidates(self, pattern: PathPattern) -> Iterator[str]:
        prefix, size = pattern.prefix, len(pattern.prefix)
        first = bisect_left(self._sorted, prefix)
        last = bisect_left(self._sorted, True, lo=first, key=lambda name: name[:size] > prefix)
        if not pattern.needle or pattern.needle in prefix:
            yield from self._sorted[first:last]
            return
        end = self._starts[last]
        found = self._text.find(pattern.needle, self._starts[first], end)
        while found >= 0:
            index = bisect_right(self._starts, found) - 1
            yield self._sorted[index]
            found = self._text.find(pattern.needle, self._starts[index + 1], end)


def escape(path: str) -> str:
    """The pattern that matches this path only."""
    return re.sub(r"[\\*?[]", r"\\\g<0>", path)


def plain_line(path: str) -> str:
    """The line of a plain list that means this path. A line break in it becomes ``?``, for lines have no other way."""
    line = re.sub(r"[\n\r]", "?", escape(path))
    return (
        "\\" + line
        if _kind_of(line.encode("utf-8", "surrogateescape")) != "plain" or line[:1] in "# \t\ufeff"
        else line
    )


def _clean(path: str) -> str:
    """Relative to the root, without empty, "." and ".." components; "" is the root itself."""
    return posixpath.normpath("/" + path.lstrip("/"))[1:]


_TOKEN = re.compile(
    r"\\(?P<escaped>[^/])|(?P<star>\*+)|(?P<any>\?)|(?P<set>\[[!^]?\]?(?:\\[^/]|[^\]\\/])*\])|(?P<plain>[^\\*?[/]+|.)",
    re.DOTALL,
)


def _literals(text: str) -> tuple[str, str, bool]:
    """What a pattern begins with, its longest piece within a component, and whether that beginning is all of it."""
    pieces: list[list[str]] = [[]]
    prefix: list[str] = []
    fixed = True
    for token in _TOKEN.finditer(text):
        plain = token["escaped"] or token["plain"]
        if token["plain"] in ("[", "\\"):
            raise _bad(text, f"{plain} has no end", f"write \\{plain} for the character itself")
        fixed = fixed and plain is not None
        if fixed:
            prefix.append(plain)
        if plain is None or plain == "/":
            pieces.append([])
        else:
            pieces[-1].append(plain)
    return "".join(prefix), max(map("".join, pieces), key=len), fixed


def _regex_of(text: str) -> str:
    """The regular expression of a clean pattern with wildcards.

    A wildcard that another one follows settles for its first fit (an atomic group): the later one takes whatever is left,
    and no pattern takes time that grows faster than its length times the name's squared.
    """
    if len(text) > PATTERN_LIMIT:
        raise _bad(text[:100] + "...", f"it is longer than {PATTERN_LIMIT} characters", "split it")
    runs: list[list[str]] = [[]]
    for component in text.split("/"):
        if component != "**":
            runs[-1].append(_component(component, text))
        elif runs[-1] or len(runs) == 1:  # two in a row say no more than one
            runs.append([])
    if len(runs) == 1:
        return "/".join(runs[0])
    first, *middle, last = ["".join(part + "/" for part in run) for run in runs]
    skipped = "".join(f"(?>(?:[^/]+/)*?{run})" for run in middle)
    return first + skipped + (f"(?:[^/]+/)*{last[:-1]}" if last else ".+")


def _component(component: str, text: str) -> str:
    parts: list[list[str]] = [[]]
    for token in _TOKEN.finditer(component):
        if token["star"]:
            if len(token["star"]) > 1:
                raise _bad(text, "** stands alone between slashes", "write * within a component, or /**/")
            parts.append([])
        elif token["any"]:
            parts[-1].append("[^/]")
        elif token["set"]:
            parts[-1].append(_set(token["set"][1:-1], text))
        else:
            parts[-1].append(re.escape(token["escaped"] or token["plain"]))
    first, *later = ["".join(part) for part in parts]
    if not later:
        return first
    return first + "".join(f"(?>[^/]*?{part})" for part in later[:-1]) + f"[^/]*{later[-1]}"


def _set(inside: str, text: str) -> str:
    negated = inside[:1] in ("!", "^")
    if "[:" in inside or "[." in inside or "[=" in inside:
        raise _bad(text, "named character classes are not known", "list the characters")
    chars = re.findall(r"\\.|.", inside[negated:], re.DOTALL)
    middle = range(1, len(chars) - 1)
    members = "".join("-" if char == "-" and at in middle else re.escape(char[-1]) for at, char in enumerate(chars))
    try:
        re.compile(f"[{members}]")
    except re.error as error:
        raise _bad(text, f"[{inside}] is no set of characters", "put the lower end of a range first") from error
    return f"[^/{members}]" if negated else f"(?!/)[{members}]"


def _bad(pattern: str, what: str, remedy: str) -> UsageError:
    return UsageError(f"{pattern!r} is no pattern: {what}; {remedy}")


# --- logs


def read_access_log(
    source: str | os.PathLike[str] | bytes | BinaryIO,
    *,
    layer_index: int | None = None,
    cwd: str | None = None,
) -> AccessLog:
    """The patterns of an access log: a path of a file, the log's own bytes, or a binary file that is read to its end.

    JSON lines: every ``path``. ``layer_index`` leaves out those that state another ``layerIndex``; a path that the layer
    has not is the caller's affair. Surrogate escapes stand for bytes that are no UTF-8.

    strace's output, with any of -f, -i, -n, -r, -t, -T, -v, -x, -y and -X: what was executed, or opened so that its content
    can be read. Where -y tells what a descriptor is, that is the path; else links in it are not resolved. Relative paths
    begin where -y, chdir and clone say; ``cwd`` is where the command was started, None if that is not known. What cannot be
    resolved is counted in ``unresolved``. What a kernel opens on its own, such as dynamic loaders, strace does not see.

    A plain list: a path or pattern a line. Empty lines and those that begin with # are left out.

    A byte order mark in front of it all means nothing.

    Raises:
        UsageError: a line is malformed or longer than 1 MiB, or the file is open in text mode.
        OSError: the file cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return _read(file, os.fspath(source), layer_index, cwd)
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), "access log", layer_index, cwd)
    return _read(source, str(getattr(source, "name", "access log")), layer_index, cwd)


def _read(file: BinaryIO, name: str, layer_index: int | None, cwd: str | None) -> AccessLog:
    lines = _lines(file, name)
    kind: Kind = "plain"
    strace = _Strace(cwd)
    patterns: dict[str, None] = {}
    for first, (number, line) in enumerate(lines):
        if first == 0:
            kind = _kind_of(line)
        try:
            if kind == "strace":
                path = strace.path_of(line)
                found = None if path is None else escape(_clean(_decoded(path)))
            elif kind == "json":
                found = _json_pattern(line, layer_index)
            else:
                found = PathPattern(_decoded(line)).text
        except ValueError as error:
            raise UsageError(f"{name}: line {number}: {error}") from error
        if found:
            patterns[found] = None
    return AccessLog(patterns, kind, strace.unresolved)


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Numbered from 1, without line breaks, empty ones and comments."""
    number = 0
    while line := file.readline(LINE_LIMIT + 1):
        number += 1
        if not isinstance(line, bytes):
            raise UsageError(f"{name}: reads {type(line).__name__}, not bytes; open it in binary mode")
        if number == 1:
            line = line.removeprefix(BOM_UTF8)
        if len(line) > LINE_LIMIT:
            raise UsageError(f"{name}: line {number}: is longer than 1 MiB; this is no access log")
        line = line.rstrip(b"\r\n")
        if line.strip() and not line.startswith(b"#"):
            yield number, line


def _decoded(path: bytes) -> str:
    if b"\0" in path:
        raise ValueError("a path with a NUL byte; no file can be called so")
    return path.decode("utf-8", "surrogateescape")


def _json_pattern(line: bytes, layer_index: int | None) -> str | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON: {error}; the log is damaged or cut off") from error
    path = entry.get("path") if isinstance(entry, dict) else None
    if not isinstance(path, str):
        raise ValueError('has no "path"; a record has one JSON object with a path on each line')
    stated = entry.get("layerIndex")
    if layer_index is not None and stated is not None and stated != layer_index:
        return None
    return escape(_clean(_decoded(path.encode("utf-8", "surrogateescape"))))


# --- strace

_PREFIX = rb"""\s*
    (?:\[pid\s+(?P<pid>\d+)(?:<[^>]*>)?\]\s+ | (?P<bare_pid>\d+)(?:<[^>]*>)?\s+)?          # -f
    (?:(?:\d+\.\d+ | \d\d:\d\d:\d\d(?:\.\d+)?(?:[+-]\d{4})? | \(\+\s*[\d.]+\))\s+)*         # -r, -t, -tt, -ttt
    (?:\[[\s?0-9a-f]+\]\s+)*                                                                # -n, -i
"""
_LINE = re.compile(
    _PREFIX
    + rb"""(?:(?P<call>[a-z_][a-z0-9_]*)\((?P<rest>.*)
    | <\.\.\.\s(?P<resumed>[a-z_][a-z0-9_]*)\sresumed>\s?(?P<tail>.*)
    | \+\+\+\s(?P<end>.*)\s\+\+\+ | ---\s.*\s---)""",
    re.VERBOSE | re.DOTALL,
)
# also in the middle of a call's line, which the next one ends
_ATTACHED = re.compile(rb"strace: Process (\d+) attached$")
_UNFINISHED = b"<unfinished ...>"
_SURELY_STRACE = re.compile(rb"<unfinished \.\.\.>$|\)\s+= (?:-?\d|\?|0x)|\+\+\+$|---$")

_TEXT = rb'"(?P<path>(?:[^"\\]|\\.)*)"(?P<cut>\.\.\.)?'
_HANDLE = rb"(?:AT_FDCWD|-?\d+(?:\s/\*\sAT_FDCWD\s\*/)?)(?:<(?P<base>[^<>]*)(?:<[^<>]*>)?>)?(?P<base_gone>\(deleted\))?"
_FLAGS = rb"(?P<flags>[0-9A-Zx_|a-f]+(?:\s/\*\s[^*]*\s\*/)?)"
_RESULT = rb"\)\s+=\s(?P<result>\d+)(?:<(?P<real>[^<>]*)(?P<special><[^<>]*>)?>)?(?P<gone>\(deleted\))?"


def _shape(arguments: bytes) -> re.Pattern[bytes]:
    return re.compile(arguments, re.VERBOSE | re.DOTALL)


# call -> its arguments and result when it succeeded
_OPENS = {
    b"open": _shape(_TEXT + rb",\s" + _FLAGS + rb"(?:,\s[^,)]*)?" + _RESULT),
    b"openat": _shape(_HANDLE + rb",\s" + _TEXT + rb",\s" + _FLAGS + rb"(?:,\s[^,)]*)?" + _RESULT),
    b"openat2": _shape(_HANDLE + rb",\s" + _TEXT + rb",\s\{flags=" + _FLAGS + rb"[^}]*\},\s\d+" + _RESULT),
    b"execve": _shape(_TEXT + rb",\s.*\)\s+=\s0(?:\s<[\d.]+>)?$"),
    b"execveat": _shape(_HANDLE + rb",\s" + _TEXT + rb",\s.*\)\s+=\s0(?:\s<[\d.]+>)?$"),
}
_CHDIR = _shape(_TEXT + rb"\)\s+=\s0\b")
_FCHDIR = _shape(_HANDLE + rb"\)\s+=\s0\b")
_FORK = _shape(rb".*\)\s+=\s(?P<child>\d+)(?:<[^>]*>)?(?:\s<[\d.]+>)?$")
_FORKS = {b"clone", b"clone2", b"clone3", b"fork", b"vfork"}
_FAILED = re.compile(rb"\)\s+=\s(?:-1|\?)")


class _Strace:
    """What strace told so far: calls that have not returned yet, and where processes are."""

    def __init__(self, cwd: str | None) -> None:
        self.unresolved = 0
        self._start: list[bytes | None] = [None if cwd is None else os.fsencode(cwd)]
        self._folders: dict[bytes, list[bytes | None]] = {}  # pid -> working directory, shared by threads
        self._unfinished: dict[bytes, tuple[bytes, bytes]] = {}  # pid -> call, first part of its arguments
        self._new: set[bytes] = set()  # processes whose parents are not known yet
        self._announces = False  # whether strace tells of new processes, so that others are old ones
        self._begun = b""  # a line that such news broke off

    def path_of(self, line: bytes) -> bytes | None:
        """The path of what the line says was executed or opened for reading; None for anything else."""
        if attached := _ATTACHED.search(line):
            self._new.add(attached[1])
            self._announces = True
            self._begun = (self._begun + line[: attached.start()])[-LINE_LIMIT:]
            return None
        parts = _LINE.match(self._begun + line)
        self._begun = b""
        if parts is None:
            return None  # what the command itself wrote in between
        pid = parts["pid"] or parts["bare_pid"] or b""
        if parts["end"] is not None:
            self._end(pid, parts["end"])
            return None
        call, rest = parts["call"], parts["rest"]
        if parts["resumed"]:
            started = self._unfinished.pop(pid, None)
            if started is None or started[0] != parts["resumed"]:
                return None
            call, rest = started[0], started[1] + parts["tail"]
        if call not in _OPENS and call not in _FORKS and call not in (b"chdir", b"fchdir"):
            return None
        if rest.endswith(_UNFINISHED):
            self._folder(pid)
            self._unfinished[pid] = call, rest.removesuffix(_UNFINISHED).rstrip()
            return None
        if call in _OPENS:
            return self._opened(pid, call, rest)
        self._moved(pid, call, rest)
        return None

    def _end(self, pid: bytes, how: bytes) -> None:
        """A process that is gone; a thread that executes takes over the number of its process."""
        if taken := re.match(rb"superseded by execve in pid (\d+)", how):
            if taken[1] in self._unfinished:
                self._unfinished[pid] = self._unfinished.pop(taken[1])
            self._folders.pop(taken[1], None)
        else:
            self._unfinished.pop(pid, None)
            if self._folders.pop(pid, None) is self._folders.get(b""):
                self._folders.pop(b"", None)

    def _folder(self, pid: bytes) -> list[bytes | None]:
        """Where a process is. One that is new is where its parent is, if there is but one that it can be."""
        if pid not in self._folders:
            self._folders[pid] = self._folder_of_new(pid)
        return self._folders[pid]

    def _folder_of_new(self, pid: bytes) -> list[bytes | None]:
        forking = [parent for parent, (call, _) in self._unfinished.items() if call in _FORKS]
        others = {id(folder): folder for folder in self._folders.values()}
        if not others and not self._new:
            return self._start  # the first one
        if pid and self._announces and pid not in self._new and b"" in self._folders:
            return self._folders[b""]  # it had no number on its lines as long as it was alone
        if not pid and len(others) == 1:
            return next(iter(others.values()))  # and has none again
        if len(forking) == 1:
            folder = self._folders[forking[0]]
            return folder if b"CLONE_FS" in self._unfinished[forking[0]][1] else list(folder)
        self._new.add(pid)
        return [None]

    def _moved(self, pid: bytes, call: bytes, rest: bytes) -> None:
        folder = self._folder(pid)
        if call in _FORKS:
            forked = _FORK.match(rest)
            child = forked["child"] if forked else b""
            if child and (child not in self._folders or child in self._new):
                self._folders[child] = folder if b"CLONE_FS" in rest else list(folder)
            self._new.discard(child)
            return
        moved = (_CHDIR if call == b"chdir" else _FCHDIR).match(rest)
        if moved is None:
            return
        self._new.discard(pid)
        if call == b"fchdir":
            folder[0] = None if moved["base"] is None else _unescape(moved["base"])
        elif moved["cut"]:
            folder[0] = None
        else:
            folder[0] = _join(folder[0], _unescape(moved["path"]))

    def _opened(self, pid: bytes, call: bytes, rest: bytes) -> bytes | None:
        folder = self._folder(pid)
        found = _OPENS[call].match(rest)
        if found is None:
            self.unresolved += not _FAILED.search(rest)
            return None
        parts = found.groupdict()
        if parts.get("flags") is not None and not _reads_content(parts["flags"]):
            return None
        if parts.get("real") is not None:
            opened = _unescape(parts["real"])
            return opened if opened.startswith(b"/") and not parts["gone"] and not parts["special"] else None
        base = folder[0]
        if "base" in parts:
            if rest.startswith((b"AT_FDCWD", b"-100")):
                folder[0] = base = folder[0] if parts["base"] is None else _unescape(parts["base"])
            else:
                base = None if parts["base"] is None else _unescape(parts["base"])
        written = _unescape(parts["path"])
        path = base if not written and call == b"execveat" else _join(base, written)
        if path is None or parts["cut"] or not path.startswith(b"/"):
            self.unresolved += 1
            return None
        return None if parts.get("base_gone") else path


def _join(folder: bytes | None, path: bytes) -> bytes | None:
    if path.startswith(b"/"):
        return path
    return None if folder is None else posixpath.join(folder, path)


_NO_CONTENT = {b"O_WRONLY", b"O_PATH", b"O_DIRECTORY", b"O_TRUNC", b"O_TMPFILE"}


def _reads_content(flags: bytes) -> bool:
    """The same choice as the recorder's: not for writing only, emptying, a directory, a handle, or a new file."""
    number, named, comment = flags.partition(b" /* ")
    if not named and number[:1].isdigit() and b"|" not in number:
        value = int(number, 0)
        nothing = os.O_PATH | os.O_DIRECTORY | os.O_TRUNC
        new = os.O_CREAT | os.O_EXCL
        return not value & nothing and value & os.O_ACCMODE != os.O_WRONLY and value & new != new
    names = set((comment.removesuffix(b" */") if named else flags).split(b"|"))
    return not names & _NO_CONTENT and not names >= {b"O_CREAT", b"O_EXCL"}


_ESCAPED = re.compile(rb"\\(x[0-9a-fA-F]{1,2}|[0-7]{1,3}|.)", re.DOTALL)
_CONTROLS = {b"a": b"\a", b"b": b"\b", b"e": b"\x1b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}


def _unescape(text: bytes) -> bytes:
    def char(found: re.Match[bytes]) -> bytes:
        code = found[1]
        if code[:1] == b"x" and len(code) > 1:
            return bytes([int(code[1:], 16)])
        if code.isdigit():
            return bytes([int(code, 8) & 0xFF])
        return _CONTROLS.get(code, code)

    return _ESCAPED.sub(char, text) if b"\\" in text else text


def _kind_of(line: bytes) -> Kind:
    if line.lstrip(b" \t").startswith(b"{"):
        return "json"
    if _ATTACHED.match(line) or (_LINE.match(line) and _SURELY_STRACE.search(line)):
        return "strace"
    return "plain"
