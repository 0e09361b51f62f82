"""Access logs of every kind, and the patterns they become."""

from __future__ import annotations

import fnmatch
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import missing
from hypothesis import given
from hypothesis import strategies as st

import estargz
from estargz.errors import UsageError
from estargz.writing.access_log import LINE_LIMIT, AccessLog, PathPattern, escape, match, match_all, plain_line

read = estargz.read_access_log


# --- plain lists


def test_plain_list() -> None:
    text = b"# what the start needs\n\nusr/bin/app\r\n/etc/./app//conf \n   \n  lead\n../usr/lib/../bin/x\nusr/bin/app\n/\n."
    assert read(text) == ["usr/bin/app", "etc/app/conf ", "  lead", "usr/bin/x"]
    assert read(text).kind == "plain"
    assert read(b"") == read(b"\n#\n") == []


def test_byte_order_mark_and_blanks_in_front() -> None:
    mark = "\ufeff".encode()
    for start in (mark, b" \t", mark + b"  "):
        log = read(start + b'{"path":"usr/x"}\n{"path":"usr/y"}\n')
        assert (log.kind, log) == ("json", ["usr/x", "usr/y"])
    assert read(mark + b"# comment\nusr/x") == read(mark + b"usr/x") == ["usr/x"]


def test_text_mode(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("usr/x\n")
    with (
        open(tmp_path / "list") as file,
        pytest.raises(UsageError, match="list: reads str, not bytes; open it in binary mode"),
    ):
        read(file)  # type: ignore[arg-type]


def test_plain_patterns() -> None:
    assert read(b"usr/**\n\\#x\n[ab]/*.py") == ["usr/**", "\\#x", "[ab]/*.py"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("usr/bin/[", r"\[ has no end; write \\\[ for the character itself"),
        ("usr/[a", r"\[ has no end"),
        ("usr/[a/b]", r"\[ has no end"),
        ("a\\", r"\\ has no end"),
        ("a\\/b*", r"\\ has no end"),
        ("usr/lib**", r"\*\* stands alone between slashes"),
        ("***", r"\*\* stands alone"),
        ("[z-a]", "is no set of characters; put the lower end"),
        ("[[:alpha:]]", "named character classes"),
        ("a\0b", "NUL byte"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, what: str) -> None:
    (tmp_path / "list").write_text(f"usr\n\n{line}\n")
    with pytest.raises(UsageError, match=f"list: line 3: .*{what}"):
        read(tmp_path / "list")


def test_sources(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"a\nb\n")
    for source in (tmp_path / "list", str(tmp_path / "list"), b"a\nb\n", io.BytesIO(b"a\nb\n")):
        assert read(source) == ["a", "b"]
    with open(tmp_path / "list", "rb") as file:
        assert read(file) == ["a", "b"]
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("start", [b"", b'{"path":"', b'openat(AT_FDCWD, "'])
def test_endless_lines(start: bytes) -> None:
    line = start + b"x" * (LINE_LIMIT + 1)
    with pytest.raises(UsageError, match="access log: line 2: is longer than 1 MiB"):
        read(b'openat(AT_FDCWD, "/x", O_RDONLY) = 3\n' + line)
    assert read(b"x" * (LINE_LIMIT - 1) + b"\n") == ["x" * (LINE_LIMIT - 1)]


# --- JSON lines

RECORD = b"""\
{"path":"usr/bin/bash","manifestDigest":"sha256:5d07","layerIndex":0}
{"path":"usr/bin/bash","manifestDigest":"sha256:5d07","layerIndex":0}
{"path":"/etc/ld.so.cache","layerIndex":1}

{"path":"usr/bin/\\u003cx\\u003e"}
"""


def test_json_lines() -> None:
    assert read(RECORD) == ["usr/bin/bash", "etc/ld.so.cache", "usr/bin/<x>"]
    assert read(RECORD).kind == "json"
    assert read(RECORD, layer_index=0) == ["usr/bin/bash", "usr/bin/<x>"]
    assert read(RECORD, layer_index=1) == ["etc/ld.so.cache", "usr/bin/<x>"]


def test_json_paths_are_no_patterns() -> None:
    names = ["usr/bin/[", "a*", "q?", "back\\slash", "new\nline", "#x", "\udcff", "ü"]
    log = "\n".join(json.dumps({"path": name}) for name in names).encode()
    assert [match(pattern, names) for pattern in read(log)] == [[name] for name in names]
    assert [PathPattern(pattern).literal for pattern in read(log)] == names


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"path":"x"', "is no JSON"),
        (b"usr/bin/x", "is no JSON"),
        (b'{"name":"x"}', 'has no "path"'),
        (b'{"path":1}', 'has no "path"'),
        (b"[]", 'has no "path"'),
        (b'{"path":"\\u0000"}', "NUL byte"),
        (b'{"path":"\\ud800"}', "surrogates not allowed"),
        (b'{"a":' * 100_000, "is no JSON"),
        (b'{"path":"\xff"}', "is no JSON"),
    ],
)
def test_bad_json(line: bytes, what: str) -> None:
    with pytest.raises(UsageError, match=f"access log: line 2: .*{what}"):
        read(b'{"path":"a"}\n' + line)


# --- strace's output, as written by various versions


def strace_log(*lines: str, **options: Any) -> AccessLog:
    log = read("\n".join(lines).encode(), **options)
    assert log.kind == "strace"
    return log


@pytest.mark.parametrize(
    "prefix",
    ["", "1234 ", "1234  ", "[pid  1234] ", "12:34:56 ", "1234  12:34:56.123456 ", "[pid 1234] 1700000000.123456 ",
     "     0.000132 ", "12:34:56 (+     0.000128) ", "[00007eff8c116011] ", "[ 257] ", "1234<sh> ", "[pid 1234<sh>] ",
     "1234 12:34:56.1 (+     0.000012) [ 257] [????????????????] "],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["", " <0.000132>"])
def test_strace_prefixes(prefix: str, suffix: str) -> None:
    assert strace_log(f'{prefix}execve("/bin/sh", ["sh"], 0x7ffe /* 24 vars */) = 0{suffix}') == ["bin/sh"]
    assert strace_log(f'{prefix}openat(AT_FDCWD, "/etc/x", O_RDONLY|O_CLOEXEC) = 3{suffix}') == ["etc/x"]


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ('open("/x", O_RDONLY)                    = 3', ["x"]),
        ('open("/x", O_RDWR|O_CREAT, 0666)        = 3', ["x"]),
        ('openat(AT_FDCWD, "/x", O_RDONLY) = 3</real/x>', ["real/x"]),
        ('openat(3</usr>, "lib/x", O_RDONLY) = 4', ["usr/lib/x"]),
        ('openat(3</usr>, "../x", O_RDONLY) = 4', ["x"]),
        ('openat(AT_FDCWD</home/u>, "x", O_RDONLY) = 4', ["home/u/x"]),
        ('openat2(AT_FDCWD, "/x", {flags=O_RDONLY|O_CLOEXEC, resolve=RESOLVE_BENEATH}, 24) = 3', ["x"]),
        ('openat2(AT_FDCWD, "/x", {flags=O_RDWR|O_CREAT, mode=0644, resolve=0}, 24) = 3', ["x"]),
        ('execveat(4</usr/bin/env>, "", ["env"], 0x7ff /* 3 vars */, AT_EMPTY_PATH) = 0', ["usr/bin/env"]),
        ('execveat(4</usr/bin>, "env", ["a) = 1"], 0x7ff /* 3 vars */, 0) = 0', ["usr/bin/env"]),
        ('execve("/bin/a", ["a", ") = -1 ENOENT"], ["X=) = 5"...]) = 0', ["bin/a"]),
        ('openat(-100, "/x", 0x80000) = 3', ["x"]),
        ('openat(-100, "/x", 0x80001) = 3', []),
        ('openat(-100, "/x", 0) = 3', ["x"]),
        ('openat(-100 /* AT_FDCWD */</home>, "x", 0x80000 /* O_RDONLY|O_CLOEXEC */) = 3', ["home/x"]),
        ('openat(-100 /* AT_FDCWD */</home>, "x", 0x80001 /* O_WRONLY|O_CLOEXEC */) = 3', []),
        ('openat(AT_FDCWD, "\\x2f\\x78", O_RDONLY) = 3', ["x"]),
        ('openat(AT_FDCWD, "/sp \\"q\\" \\\\ \\t\\303\\274\\0012", O_RDONLY) = 3', ['sp "q" \\\\ \tü\x012']),
        ('openat(AT_FDCWD, "/\\377", O_RDONLY) = 3', ["\udcff"]),
        ('openat(AT_FDCWD, "/x", O_RDONLY) = 3</a\\76b\\74c>', ["a>b<c"]),
        ('openat(AT_FDCWD, "/x*[1]", O_RDONLY) = 3', ["x\\*\\[1]"]),
        ('openat(AT_FDCWD, "/x", O_RDONLY) = -1 ENOENT (No such file or directory)', []),
        ('openat(AT_FDCWD, "/x", O_RDONLY) = ? ERESTARTSYS (To be restarted)', []),
        ('openat(AT_FDCWD, "/x", O_WRONLY|O_CREAT|O_APPEND, 0666) = 3', []),
        ('openat(AT_FDCWD, "/x", O_RDONLY|O_DIRECTORY) = 3', []),
        ('openat(AT_FDCWD, "/x", O_RDONLY|O_PATH) = 3', []),
        ('openat(AT_FDCWD, "/x", O_RDWR|O_CREAT|O_TRUNC, 0666) = 3', []),
        ('openat(AT_FDCWD, "/x", O_RDWR|O_CREAT|O_EXCL, 0666) = 3', []),
        ('openat(AT_FDCWD, "/x", O_RDWR|O_TMPFILE, 0666) = 3', []),
        ('openat(AT_FDCWD, "/x", O_RDONLY) = 3</tmp/x>(deleted)', []),
        ('openat(AT_FDCWD, "/dev/null", O_RDONLY) = 3</dev/null<char 1:3>>', []),
        ('creat("/x", 0666) = 3', []),
        ('stat("/x", {st_mode=S_IFREG|0644}) = 0', []),
        ('readlink("/x", "y", 4095) = 1', []),
    ],
)  # fmt: skip
def test_strace_calls(call: str, found: list[str]) -> None:
    log = strace_log('execve("/first", ["x"], 0x7ffe /* 24 vars */) = 0', call)
    assert (log[0], list(log[1:]), log.unresolved) == ("first", found, 0)


@pytest.mark.parametrize(
    "call",
    [
        'openat(AT_FDCWD, "x", O_RDONLY) = 3',
        'openat(5, "x", O_RDONLY) = 3',
        'execve("./x", ["x"], 0x7ffe /* 24 vars */) = 0',
        'openat(AT_FDCWD, "/xxxx"..., O_RDONLY) = 3',
        "openat(AT_FDCWD, 0x7ffe1234, O_RDONLY) = 3",
    ],
)
def test_what_cannot_be_resolved_is_counted(call: str) -> None:
    log = strace_log(call, 'openat(AT_FDCWD, "/y", O_RDONLY) = 4')
    assert (list(log), log.unresolved) == (["y"], 1)


def test_working_directories() -> None:
    lines = [
        'openat(AT_FDCWD, "a", O_RDONLY) = 3',
        'chdir("sub") = 0',
        'openat(AT_FDCWD, "b", O_RDONLY) = 3',
        'chdir("nowhere") = -1 ENOENT (No such file or directory)',
        'chdir("/abs") = 0',
        'open("c", O_RDONLY) = 3',
        "fchdir(3</usr>) = 0",
        'execve("./d", ["d"], 0x7ffe /* 24 vars */) = 0',
        "fchdir(4) = 0",
        'open("e", O_RDONLY) = 3',
    ]
    log = strace_log(*lines, cwd="/start")
    assert (list(log), log.unresolved) == (["start/a", "start/sub/b", "abs/c", "usr/d"], 1)
    log = strace_log(*lines)
    assert (list(log), log.unresolved) == (["abs/c", "usr/d"], 3)


def test_children_are_where_their_parents_were() -> None:
    log = strace_log(
        '1 execve("/sh", ["sh"], 0x7ffe /* 24 vars */) = 0',
        '1 chdir("/one") = 0',
        "1 clone(child_stack=NULL, flags=CLONE_CHILD_CLEARTID|SIGCHLD, child_tidptr=0x7f) = 2",
        '1 chdir("/two") = 0',
        '2 open("a", O_RDONLY) = 3',
        '1 open("b", O_RDONLY) = 3',
        "1 clone3({flags=CLONE_VM|CLONE_FS|CLONE_THREAD, exit_signal=0}, 88) = 3",
        '3 chdir("/three") = 0',
        '1 open("c", O_RDONLY) = 3',
        "2 vfork( <unfinished ...>",
        '4 open("d", O_RDONLY) = 3',
        "2 <... vfork resumed>) = 4",
        "7 +++ exited with 0 +++",
        '9 open("unknown", O_RDONLY) = 3',
    )
    assert (list(log), log.unresolved) == (["sh", "one/a", "two/b", "three/c", "one/d"], 1)


def test_unfinished_calls() -> None:
    log = strace_log(
        '1 execve("/sh", ["sh"], 0x7ffe /* 24 vars */ <unfinished ...>',
        '2 openat(AT_FDCWD, "/a", O_RDONLY <unfinished ...>',
        "1 <... execve resumed>) = 0",
        '3 openat(AT_FDCWD, "/b", O_RDONLY <unfinished ...>',
        "2 <... openat resumed> )      = 3</real/a>",
        "3 <... openat resumed>) = -1 ENOENT (No such file or directory)",
        "3 <... openat resumed>) = 3",
        '4 execve("/new", ["new"], 0x7ffe /* 24 vars */ <unfinished ...>',
        "1 +++ superseded by execve in pid 4 +++",
        "1 <... execve resumed>) = 0",
        '5 openat(AT_FDCWD, "/lost", O_RDONLY <unfinished ...>',
        "5 +++ killed by SIGKILL +++",
        "--- SIGCHLD {si_signo=SIGCHLD} ---",
    )
    assert (list(log), log.unresolved) == (["sh", "real/a", "new"], 0)


def test_other_lines_in_between() -> None:
    log = strace_log(
        'execve("/sh", ["sh"], 0x7ffe /* 24 vars */) = 0',
        "the program's own words = 3",
        "clone(child_stack=NULL, flags=SIGCHLDstrace: Process 12 attached",
        ", child_tidptr=0x7f) = 12",
        "strace: Process 12 detached",
        '[pid    12] openat(AT_FDCWD, "/a", O_RDONLY) = 3',
        " > /usr/lib/libc.so.6(__open+0x1f) [0x9f]",
        "% time     seconds  usecs/call     calls    errors syscall",
    )
    assert (list(log), log.unresolved) == (["sh", "a"], 0)


# --- strace itself

OPTIONS = [
    [], ["-f"], ["-f", "-q"], ["-f", "-y"], ["-f", "-yy", "-ttt", "-T"], ["-f", "-i", "-r", "-X", "verbose"],
    ["-f", "-X", "raw"], ["-f", "-n", "-t", "-r", "-xx"], ["-f", "-y", "-v"], ["-f", "-y", "-x", "-tt"],
]  # fmt: skip
SHELL = "cd sub; cat ../a ../link; (cd ..; cat b) ; (exec cat f) | cat; cd ../o*; cat f & wait"


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
@pytest.mark.parametrize("to_file", [True, False])
def test_real_strace(tmp_path: Path, options: list[str], to_file: bool) -> None:
    if shutil.which("strace") is None:
        missing("strace is not installed")
    for name in ("a", "b", "sub/f", "odd [name]\n/f"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "link").symlink_to("b")
    log = tmp_path / "log"
    command = ["strace", *options, "-e", "trace=%file,%process,fchdir", *(["-o", log] if to_file else [])]
    done = subprocess.run([*command, "sh", "-c", SHELL], cwd=tmp_path, capture_output=True, check=False)
    if done.returncode:
        missing("strace may not trace: the kernel or a sandbox forbids it")
    found = read(log if to_file else done.stderr, cwd=os.fspath(tmp_path))
    assert (found.kind, found.unresolved) == ("strace", 0)
    here = escape(str(tmp_path)[1:]) + "/"
    names = [name.removeprefix(here) for name in found if name.startswith(here) and not name.endswith("/log")]
    files = {"a", "b", "sub/f", "odd \\[name]\n/f"} | (set() if any(o.startswith("-y") for o in options) else {"link"})
    assert set(names) == (files if "-f" in options else set())
    if "-f" in options:
        assert names[0] == "a"
        assert {"cat", "sh"} <= {Path(name).name for name in found}


# --- patterns

NAMES = [
    "usr", "usr/lib", "usr/lib/a.py", "usr/lib/b.pyc", "usr/lib/x/a.py", "usr/lib/x/y/a.py", "usr/bin/[", "usr/bin/a*b",
    "usr/bin/aXb", "etc/.hidden", "etc/a\nb", "a.py", "ü/ß",
]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("usr", ["usr"]),
        ("usr/lib", ["usr/lib"]),
        ("usr/", ["usr"]),
        ("/usr/./lib/../lib", ["usr/lib"]),
        ("usr/lib/*", ["usr/lib/a.py", "usr/lib/b.pyc"]),
        ("usr/lib/*.py", ["usr/lib/a.py"]),
        ("usr/lib/?.py", ["usr/lib/a.py"]),
        ("usr/*/a.py", ["usr/lib/a.py"]),
        ("usr/lib/**", ["usr/lib/a.py", "usr/lib/b.pyc", "usr/lib/x/a.py", "usr/lib/x/y/a.py"]),
        ("usr/lib/**/a.py", ["usr/lib/a.py", "usr/lib/x/a.py", "usr/lib/x/y/a.py"]),
        ("usr/**/x/**/a.py", ["usr/lib/x/a.py", "usr/lib/x/y/a.py"]),
        ("**/a.py", ["usr/lib/a.py", "usr/lib/x/a.py", "usr/lib/x/y/a.py", "a.py"]),
        ("**/**/a.py", ["usr/lib/a.py", "usr/lib/x/a.py", "usr/lib/x/y/a.py", "a.py"]),
        ("**/*.py*", ["usr/lib/a.py", "usr/lib/b.pyc", "usr/lib/x/a.py", "usr/lib/x/y/a.py", "a.py"]),
        ("**", NAMES),
        ("*", ["usr", "a.py"]),
        ("usr/bin/\\[", ["usr/bin/["]),
        ("usr/bin/[[]", ["usr/bin/["]),
        ("usr/bin/a\\*b", ["usr/bin/a*b"]),
        ("usr/bin/a?b", ["usr/bin/a*b", "usr/bin/aXb"]),
        ("usr/bin/a[!*]b", ["usr/bin/aXb"]),
        ("usr/bin/a[^A-Z]b", ["usr/bin/a*b"]),
        ("usr/bin/a[A-Z]b", ["usr/bin/aXb"]),
        ("usr/lib/[!b-z].py", ["usr/lib/a.py"]),
        ("usr[!x]lib", []),
        ("usr[+-9]lib", []),
        ("usr?lib", []),
        ("etc/*", ["etc/.hidden", "etc/a\nb"]),
        ("etc/a?b", ["etc/a\nb"]),
        ("?/?", ["ü/ß"]),
        ("nowhere", []),
        ("nowhere/**", []),
        ("", []),
    ],
)
def test_patterns(pattern: str, found: list[str]) -> None:
    assert match(pattern, NAMES) == found
    assert match_all([pattern], NAMES) == found
    assert match(PathPattern(pattern), NAMES) == found
    assert [name for name in NAMES if PathPattern(pattern).matches(name)] == found


def test_several_patterns_in_their_order() -> None:
    assert match_all(["a.py", "usr/lib/*", "usr/lib/a.py", "**/a.py", "a.py"], NAMES) == [
        "a.py", "usr/lib/a.py", "usr/lib/b.pyc", "usr/lib/x/a.py", "usr/lib/x/y/a.py",
    ]  # fmt: skip
    assert match_all(["usr", "a.py", "usr"], reversed(NAMES)) == ["usr", "a.py"]
    assert match_all(["**"], reversed(NAMES)) == NAMES[::-1]
    assert match_all([], NAMES) == match_all(["*"], []) == []


@pytest.mark.parametrize(
    "pattern", ["[", "a[", "[]", "[!]", "\\", "a/**b", "x**", "[b-a]", "[[:digit:]]", "?" * 20_000]
)
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(UsageError, match="is no pattern: .*; "):
        match(pattern, NAMES)
    with pytest.raises(UsageError):
        match_all(["usr", pattern], NAMES)


PART = st.text("ab[]*?\\!-^#\n ü\udcff.", min_size=1, max_size=4).filter(lambda part: part not in (".", ".."))
PATH = st.lists(PART, min_size=1, max_size=4).map("/".join)


@given(st.lists(PATH, unique=True))
def test_an_escaped_path_matches_itself_alone(paths: list[str]) -> None:
    for path in paths:
        assert match(escape(path), paths) == match_all([escape(path)], paths) == [path]
        assert PathPattern(escape(path)).literal == path


@given(PATH)
def test_a_plain_line_means_its_path(path: str) -> None:
    log = read(plain_line(path).encode("utf-8", "surrogateescape") + b"\n")
    assert log.kind == "plain"
    assert len(log) == 1
    assert PathPattern(log[0]).matches(path)
    assert ("\n" in path) == (PathPattern(log[0]).literal is None)


@pytest.mark.parametrize(
    "path",
    [
        'open("/x", O_RDONLY) = 3',
        "1 +++ exited with 0 +++",
        "{",
        " {",
        "#",
        " ",
        "\ufeffx",
        "strace: Process 1 attached",
    ],
)
def test_paths_that_look_like_other_logs(path: str) -> None:
    log = read(plain_line(path).encode())
    assert (log.kind, match_all(log, [path])) == ("plain", [path])


def slow_match(pattern: list[str], name: list[str]) -> bool:
    """Components one by one, by Python's fnmatch."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        if len(pattern) == 1:
            return bool(name)
        return any(slow_match(pattern[1:], name[at:]) for at in range(len(name) + 1))
    return (
        bool(name)
        and re.fullmatch(fnmatch.translate(pattern[0]), name[0]) is not None
        and slow_match(pattern[1:], name[1:])
    )


GLOB = st.lists(st.sampled_from("a b * ? [ab] [!a] .".split()), min_size=1, max_size=5).map("".join)
GLOBS = st.lists(
    st.just("**") | GLOB.filter(lambda part: "**" not in part and part not in (".", "..")), min_size=1, max_size=5
)
SIMPLE = st.lists(
    st.text("ab.", min_size=1, max_size=4).filter(lambda part: part not in (".", "..")), min_size=1, max_size=5
)


@given(GLOBS, st.lists(SIMPLE, max_size=8, unique_by=tuple))
def test_patterns_as_fnmatch_does_them(pattern: list[str], names: list[list[str]]) -> None:
    expected = ["/".join(name) for name in names if slow_match(pattern, name)]
    assert match("/".join(pattern), ["/".join(name) for name in names]) == expected
    assert match_all(["/".join(pattern)], ["/".join(name) for name in names]) == expected


@pytest.mark.measured
@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("*a" * 40 + "b", "a" * 250),
        ("**/a/" * 30 + "b", "a/" * 1000 + "c"),
        ("**/*a*/" * 30 + "b", "a/" * 1000 + "c"),
        ("[ab]*" * 40 + "c", "a" * 250),
    ],
)
def test_no_pattern_takes_forever(pattern: str, name: str) -> None:
    assert match(pattern, [name]) == []


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@pytest.mark.measured
@pytest.mark.timeout(120)
def test_many_names_and_patterns() -> None:
    """Patterns that begin or contain something see few names: a hundred cost less than 40 times as much as one look at all."""
    random_names = random.Random(1)
    names = [f"usr/lib/d{random_names.randrange(1000)}/sub{i % 7}/file{i}.so" for i in range(100_000)]
    patterns = [f"usr/lib/d{i}/**/*.so" for i in range(50)] + [f"**/file{i * 31}.*" for i in range(50)]
    all_of_them = PathPattern("**/*.[s]*")
    once = min(seconds(lambda: match(all_of_them, names)) for _ in range(3))
    index = seconds(lambda: match_all(["**/nothing-is-called-so*"], names))
    assert seconds(lambda: match_all(patterns, names)) < 40 * once + 2 * index
    assert len(match_all(patterns, names)) > 1000


def test_importing_patterns_is_cheap() -> None:
    code = "import sys, estargz; estargz.read_access_log; print([n for n in ('numpy', 'msgspec') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
