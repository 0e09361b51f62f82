"""The recorder: what commands open, as strace and the kernel's own files see it, and that the commands do not notice."""

from __future__ import annotations

import ctypes
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import missing

import estargz
from estargz import _record
from estargz.errors import EstargzError, UsageError

NOBODY = 65534
COMMAND = [sys.executable, "-c", "import sys; from estargz.cli import main; sys.exit(main())", "record"]


@pytest.fixture(autouse=True, scope="module")
def recording() -> None:
    """Skips where the kernel or a sandbox does not let anybody record."""
    try:
        estargz.record(["true"])
    except EstargzError as error:
        pytest.skip(f"the kernel or a sandbox around the tests forbids recording: {error}")


@pytest.fixture
def tree(scratch: Path) -> Path:
    """A few files, each with its own name as content."""
    for name in ("a", "b", "sub/c", "sub/deep/d", "other/e"):
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_text(f"{name}\n")
    (scratch / "to-a").symlink_to("a")
    (scratch / "to-sub").symlink_to("sub")
    (scratch / "absolute").symlink_to(scratch / "sub" / "c")
    (scratch / "chain").symlink_to("to-sub/deep/d")
    (scratch / "dangling").symlink_to("nowhere")
    return scratch


def opened(tree: Path, command: Sequence[str | Path], **options: Any) -> list[str]:
    """What a command that succeeds opens below the tree."""
    recorded = estargz.record(command, root=tree, cwd=tree, **options)
    assert recorded.status == 0
    return recorded.paths


def python(tree: Path, code: str, **options: Any) -> list[str]:
    return opened(tree, [sys.executable, "-S", "-c", f"import os, sys\n{code}"], **options)


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, timeout=60, check=False, **{"input": b""} | options
    )


def listed(file: Path) -> list[str]:
    return [json.loads(line)["path"] for line in file.read_bytes().splitlines()]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.005)


# --- what is listed


def test_architectures_without_open_are_compiled_for(tmp_path: Path) -> None:
    """aarch64 and riscv64 have openat alone, and a switch must not have one case twice."""
    if shutil.which("cc") is None:
        missing("there is no C compiler")
    (tmp_path / "calls.c").write_text(
        '#include <sys/syscall.h>\n#undef SYS_open\n#include "record.h"\n'
        "int kind(int call) {\n"
        "    switch (call) { case SYS_openat: return 1; case EST_SYS_OPEN: return 2; default: return 0; }\n"
        "}\n"
    )
    includes = Path(__file__).parent.parent / "ext" / "estargz"
    command = ["cc", "-D_GNU_SOURCE", "-fsyntax-only", "-I", includes, tmp_path / "calls.c"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_each_file_once_in_order_of_first_opening(tree: Path) -> None:
    assert opened(tree, ["cat", "b", "sub/c", "b", "a", "sub/c"]) == ["b", "sub/c", "a"]


@pytest.mark.parametrize(
    "flags", ["O_RDONLY", "O_RDWR", "O_RDWR | os.O_APPEND", "O_RDONLY | os.O_CREAT", "O_RDONLY | os.O_NOFOLLOW"]
)
def test_opens_that_read(tree: Path, flags: str) -> None:
    assert python(tree, f"os.open('a', os.{flags})") == ["a"]


@pytest.mark.parametrize(
    "call",
    [
        "os.open('a', os.O_WRONLY)",
        "os.open('a', os.O_WRONLY | os.O_APPEND)",
        "os.open('a', os.O_RDWR | os.O_TRUNC)",
        "os.open('a', os.O_PATH)",
        "os.open('sub', os.O_RDONLY)",
        "os.open('sub', os.O_RDONLY | os.O_DIRECTORY)",
        "os.open('new', os.O_RDWR | os.O_CREAT | os.O_EXCL)",
        "os.open('.', os.O_RDWR | os.O_TMPFILE)",
        "os.mkfifo('pipe'); os.open('pipe', os.O_RDWR)",
        "os.stat('a'), os.readlink('to-a'), os.listdir('sub'), os.access('b', os.R_OK)",
    ],
)
def test_calls_that_read_no_content(tree: Path, call: str) -> None:
    assert python(tree, call) == []


@pytest.mark.parametrize("path", ["nowhere", "dangling", "a/b", "", "x" * 300, "y/" * 2500, "sub/../nowhere"])
def test_opens_that_fail(tree: Path, path: str) -> None:
    assert python(tree, f"try: os.open({path!r}, 0)\nexcept OSError: pass") == []


def test_a_link_where_none_may_be(tree: Path) -> None:
    assert python(tree, "try: os.open('to-a', os.O_NOFOLLOW)\nexcept OSError: pass") == []


def test_links_are_followed_and_not_listed(tree: Path) -> None:
    assert opened(tree, ["cat", "to-a", "to-sub/c", "absolute", "chain"]) == ["a", "sub/c", "sub/deep/d"]


def test_relative_paths(tree: Path) -> None:
    code = """
        os.open('sub/../b', 0)
        os.chdir('sub')
        os.open('c', 0)
        folder = os.open('deep', os.O_RDONLY)
        os.open('d', 0, dir_fd=folder)
        os.fchdir(folder)
        os.open('../../other/e', 0)
        os.open('../a', 0, dir_fd=os.open('..', os.O_PATH))
    """
    assert python(tree, "if True:" + code) == ["b", "sub/c", "sub/deep/d", "other/e", "a"]
    assert python(tree, "os.open('../a', 0, dir_fd=os.open('sub', os.O_PATH))") == ["a"]


def test_hard_links_are_names_of_their_own(tree: Path) -> None:
    (tree / "hard").hardlink_to(tree / "a")
    assert opened(tree, ["cat", "hard", "a"]) == ["hard", "a"]


def test_removed_files(tree: Path) -> None:
    code = "f = os.open('a', 0); os.unlink('a'); os.open(f'/proc/self/fd/{f}', 0); os.open('b', 0)"
    assert python(tree, code) == ["a", "b"]
    code = "f = os.open('b', os.O_PATH); os.unlink('b'); os.open(f'/proc/self/fd/{f}', 0)"
    assert python(tree, code) == []


def test_names_that_look_removed(tree: Path) -> None:
    (tree / "x (deleted)").write_text("")
    assert opened(tree, ["cat", "x (deleted)"]) == ["x (deleted)"]


def test_the_kernels_own_files_are_left_out() -> None:
    paths = estargz.record(
        ["cat", "/proc/self/maps", "/sys/kernel/mm/transparent_hugepage/enabled", "/etc/passwd"]
    ).paths
    assert "etc/passwd" in paths
    assert not [path for path in paths if path.startswith(("proc/", "sys/"))]


def test_own_descriptors_lead_to_the_process_itself(tree: Path) -> None:
    code = """
        one = os.open('a', os.O_PATH)
        os.open(f'/proc/self/fd/{one}', 0)
        two = os.open('b', os.O_PATH)
        os.open(f'/dev/fd/{two}', 0)
        os.open('/proc/self/cwd/sub/c', 0)
        os.dup2(os.open('sub/deep/d', os.O_PATH), 0)
        os.open('/dev/stdin', 0)
    """
    assert python(tree, "if True:" + code) == ["a", "b", "sub/c", "sub/deep/d"]


def test_names_of_any_bytes(tree: Path) -> None:
    names = [b"sp ace", b"new\nline", b"\xff\xfe", "ü".encode(), b'quo"te\\', b"t\tab", b"x" * 255]
    for name in names:
        (tree / os.fsdecode(name)).write_bytes(b"")
    assert [os.fsencode(path) for path in opened(tree, ["cat", *map(os.fsdecode, names)])] == names


def test_root_and_what_lies_outside(tree: Path) -> None:
    command = ["cat", tree / "sub/c", tree / "a", tree / "sub/deep/d"]
    assert opened(tree / "sub", command) == ["c", "deep/d"]
    assert opened(tree / "to-sub", command) == ["c", "deep/d"]
    (tree / "subway").write_text("")
    assert opened(tree / "sub", ["cat", tree / "subway"]) == []
    everything = estargz.record(command).paths
    assert [path for path in everything if path.startswith(str(tree)[1:] + "/")] == [
        str(tree / name)[1:] for name in ("sub/c", "a", "sub/deep/d")
    ]


SYSCALL = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def test_openat2(tree: Path) -> None:
    code = f"""{SYSCALL}
def openat2(folder, path, flags=0, resolve=0):
    how = (ctypes.c_uint64 * 3)(flags, 0, resolve)
    return libc.syscall(437, folder, path, ctypes.byref(how), 24)
NO_LINKS, BENEATH, IN_ROOT = 4, 8, 16
folder = os.open('sub', os.O_PATH)
os.symlink('/deep/d', 'sub/inside')
assert openat2(folder, b'c') > 0
assert openat2(folder, b'../a', resolve=BENEATH) < 0
assert openat2(-100, b'to-a', resolve=NO_LINKS) < 0
assert openat2(folder, b'/inside', resolve=IN_ROOT) > 0
assert openat2(folder, b'../a', flags=os.O_PATH) > 0
assert openat2(folder, b'../b') > 0
"""
    assert python(tree, code) == ["sub/c", "sub/deep/d", "b"]


def test_paths_that_cannot_be_read(tree: Path) -> None:
    code = f"""{SYSCALL}
import mmap
assert libc.syscall(257 if os.uname().machine == 'x86_64' else 56, -100, ctypes.c_void_p(8), 0) == -1
assert libc.syscall(257 if os.uname().machine == 'x86_64' else 56, -100, b'x' * 5000, 0) == -1
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
pages = libc.mmap(None, 8192, 3, 0x22, -1, 0)
libc.munmap(ctypes.c_void_p(pages + 4096), 4096)
ctypes.memmove(pages + 4094, b'a', 2)
assert libc.syscall(257 if os.uname().machine == 'x86_64' else 56, -100, ctypes.c_void_p(pages + 4094), 0) > 0
"""
    recorded = estargz.record([sys.executable, "-S", "-c", "import os\n" + code], root=tree, cwd=tree)
    assert (recorded.status, recorded.paths, recorded.unread) == (0, ["a"], 0)


# --- programs


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_scripts_and_their_interpreters(tree: Path) -> None:
    shutil.copy(shutil.which("sh") or "", tree / "shell")
    script(tree / "one", "#! ./shell -e\ncat a\n")
    script(tree / "two", "#!./one argument\n")
    assert opened(tree, ["./one"]) == ["one", "shell", "a"]
    assert opened(tree, ["./two"]) == ["two", "one", "shell", "a"]


def test_programs_that_do_not_run(tree: Path) -> None:
    script(tree / "no-interpreter", "#!/nowhere/at/all\n")
    (tree / "plain").write_text("#!/bin/sh\n")
    script(tree / "not-a-program", "\x7fELF but nothing else")
    code = """
for name in ('no-interpreter', 'plain', 'sub', 'nowhere'):
    try: os.execv('./' + name, [name])
    except OSError: pass
"""
    assert python(tree, code) == []


def test_everything_that_is_mapped_is_listed(tree: Path) -> None:
    """The kernel's own list of a program's files, the dynamic loader included."""
    done = run("-o", tree / "list", "--", "cat", "/proc/self/maps")
    mapped = {line.split(maxsplit=5)[5] for line in done.stdout.decode().splitlines() if "/" in line}
    paths = {"/" + path for path in listed(tree / "list")}
    assert len(mapped) >= 3
    assert mapped <= paths


def test_a_program_by_its_handle(tree: Path) -> None:
    shutil.copy(shutil.which("true") or "", tree / "program")
    assert python(tree, "os.execve(os.open('program', os.O_PATH), ['program'], {})") == ["program"]
    code = """
f = os.memfd_create('memory')
os.write(f, open('program', 'rb').read())
os.execve(f, ['program'], {})
"""
    assert python(tree, code) == ["program"]


def compiled(folder: Path, *options: str) -> Path:
    if shutil.which("gcc") is None:
        missing("gcc is not installed")
    source = folder / "source.c"
    source.write_text('#include <fcntl.h>\nint main(void) { return open("a", O_RDONLY) < 0; }\n')
    done = subprocess.run(
        ["gcc", *options, "-o", folder / "built", source], capture_output=True, text=True, check=False
    )
    if done.returncode:
        missing(f"this kind of program cannot be compiled: {done.stderr.strip()[-200:]}")
    return folder / "built"


def test_static_program(tree: Path, tmp_path: Path) -> None:
    shutil.copy(compiled(tmp_path, "-static"), tree / "static")
    assert opened(tree, ["./static"]) == ["static", "a"]
    assert len(estargz.record(["./static"], cwd=tree).paths) == 2


def test_found_by_path(tree: Path) -> None:
    script(tree / "sub" / "tool", "#!/bin/sh\nexit 0\n")
    (tree / "other" / "tool").write_text("no program")
    path = f"{tree}/nowhere:{tree}/other:{tree}/sub:{os.environ['PATH']}"
    assert opened(tree, ["tool"], env=os.environ | {"PATH": path}) == ["sub/tool"]
    assert opened(tree, ["sh", "-c", "tool"], env=os.environ | {"PATH": path}) == ["sub/tool"]


# --- strace and the recorder see the same


def strace(folder: Path, command: Sequence[str | Path], **options: Any) -> set[str]:
    """The regular files outside of /proc and /sys that strace saw being opened or executed."""
    if shutil.which("strace") is None:
        missing("strace is not installed")
    log = folder / "strace.log"
    traced = ["strace", "-f", "-y", "-e", "trace=%file,%process,fchdir", "-o", log, "--", *command]
    done = subprocess.run(traced, capture_output=True, check=False, **options)
    if not log.exists() or b"ptrace" in done.stderr:
        pytest.skip("strace may not trace: the kernel or a sandbox forbids it")
    found = estargz.read_access_log(log)
    assert (found.kind, found.unresolved) == ("strace", 0)
    names = {os.path.realpath(b"/" + name.replace("\\", "").encode("utf-8", "surrogateescape")) for name in found}
    return {os.fsdecode(name) for name in names if os.path.isfile(name) and not name.startswith((b"/proc/", b"/sys/"))}


def loaders() -> set[str]:
    """What only the kernel opens: the dynamic loader."""
    maps = subprocess.run(["cat", "/proc/self/maps"], capture_output=True, text=True, check=True).stdout
    return {line.split(maxsplit=5)[5] for line in maps.splitlines() if "/ld-" in line}


@pytest.mark.parametrize(
    "command",
    [
        [
            "sh",
            "-c",
            "cat a to-sub/deep/d; cd sub; (cd deep; cat d | cat ../c) & wait; cat < ../b; : > new; cat new nowhere",
        ],
        ["find", ".", "-type", "f", "-exec", "cat", "{}", "+"],
        [sys.executable, "-c", "import json, sqlite3, subprocess; subprocess.run(['cat', 'b'])"],
        [
            sys.executable,
            "-c",
            "import threading, os; [threading.Thread(target=open, args=(n,)).start() for n in 'ab']",
        ],
        ["tar", "-cf", "/dev/null", "."],
        ["gcc", "-E", "-x", "c", "-include", "stdio.h", "/dev/null"],
        ["git", "hash-object", "a", "b"],
    ],
    ids=["shell", "find", "python", "threads", "tar", "gcc", "git"],
)
def test_the_same_as_strace(tree: Path, tmp_path: Path, command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        missing(f"{command[0]} is not installed")
    recorded = estargz.record(command, cwd=tree)
    expected = strace(tmp_path, command, cwd=tree)
    assert len(expected) >= 3
    assert {"/" + path for path in recorded.paths} - expected <= loaders()
    assert expected <= {"/" + path for path in recorded.paths}
    assert recorded.unread == 0


# --- what the command sees


def test_streams_arguments_and_folder(tree: Path) -> None:
    done = run(
        "-o", tree / "list", "--", "sh", "-c", 'pwd; cat; echo $# "$2" >&2', "0", "-o", "--x y", input=b"in", cwd=tree
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tree}\nin".encode(), b"2 --x y\n")


@pytest.mark.parametrize(
    ("ending", "status"), [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -TERM $$", 143), ("kill -9 $$", 137)]
)
def test_exit_status(tree: Path, ending: str, status: int) -> None:
    assert estargz.record(["sh", "-c", f"cat a; {ending}"], root=tree, cwd=tree) == estargz.Recorded(["a"], status)
    assert run("-o", tree / "list", "--root", tree, "sh", "-c", f"cat a; {ending}", cwd=tree).returncode == status
    assert listed(tree / "list") == ["a"]


def test_environment(tree: Path) -> None:
    env = {"PATH": os.environ["PATH"], "ONLY": "a"}
    assert opened(tree, ["sh", "-c", 'cat "$ONLY"; [ "$(env | grep -c HOME)" = 0 ]'], env=env) == ["a"]


def test_the_command_is_like_any_other(tree: Path) -> None:
    """Signals, descriptors, process group and limits are those that an ordinary start gives."""
    code = """
import os
kept = ('SigB', 'SigI', 'SigC', 'CapE', 'CapB', 'Uid:', 'Thre')
print([line for line in open('/proc/self/status') if line[:4] in kept])
print(sorted(os.listdir('/proc/self/fd')), os.getpgrp(), os.getsid(0), os.getcwd(), os.umask(0))
"""
    command = [sys.executable, "-S", "-c", code]
    # preexec_fn keeps glibc's posix_spawn away, which ignores two signals of its own
    plain = subprocess.run(command, stdout=subprocess.PIPE, check=True, close_fds=False, preexec_fn=int)
    read, write = os.pipe()
    saved = os.dup(1)
    os.dup2(write, 1)
    try:
        assert estargz.record(command).status == 0
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(write)
    with open(read, "rb") as output:
        assert output.read().decode().split() == plain.stdout.decode().split()


def privileges(recorded: Callable[[list[str]], Any], tree: Path) -> str:
    recorded(["sh", "-c", f"grep NoNewPrivs /proc/self/status > {tree}/privileges"])
    return (tree / "privileges").read_text().split()[1]


def as_nobody(function: Callable[[], None]) -> int:
    """Runs a function in a process of an ordinary user; its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, as after an execution
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_rights_are_kept_where_they_may_be(tree: Path, root: None) -> None:
    assert privileges(estargz.record, tree) == "0"


def test_without_privileges(tree: Path, root: None) -> None:
    tree.chmod(0o777)
    (tree / "secret").write_text("")
    (tree / "secret").chmod(0)

    def check() -> None:
        assert opened(tree, ["sh", "-c", "cat a to-sub/c; sh -c 'cat b'"]) == ["a", "sub/c", "b"]
        assert privileges(estargz.record, tree) == "1"
        assert estargz.record(["cat", "secret"], root=tree, cwd=tree).status == 1

    assert as_nobody(check) == 0


def test_what_may_not_be_looked_into_is_counted(tree: Path, root: None) -> None:
    """A program that its user may execute, but not read, is closed to everybody of that user."""
    shutil.copy(shutil.which("cat") or "", tree / "closed")
    (tree / "closed").chmod(0o711)

    def check() -> None:
        recorded = estargz.record(["./closed", "a"], root=tree, cwd=tree)
        assert (recorded.status, recorded.paths) == (0, ["closed"])
        assert recorded.unread > 0

    assert as_nobody(check) == 0


def test_other_users_of_a_privileged_recorder(tree: Path, root: None) -> None:
    if shutil.which("setpriv") is None:
        missing("setpriv is not installed")
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "cat", "a"]
    assert opened(tree, command) == ["a"]


def test_chroot(tree: Path, root: None) -> None:
    (tree / "sub" / "absolute").symlink_to("/deep/d")
    (tree / "sub" / "deep" / "up").symlink_to("/../../c")
    code = f"os.chroot({str(tree / 'sub')!r}); os.chdir('/deep'); os.open('/absolute', 0); os.open('up', 0)"
    assert python(tree, code) == ["sub/deep/d", "sub/c"]
    assert python(tree / "sub", code) == ["deep/d", "c"]
    code = f"os.chroot({str(tree / 'sub')!r}); os.open('a', 0); os.open('../a', 0, dir_fd=os.open('/deep', os.O_PATH))"
    assert estargz.record([sys.executable, "-Sc", f"import os; {code}"], root=tree, cwd=tree).paths == ["a"]


def test_mounts_that_only_the_command_sees(tree: Path, root: None) -> None:
    if shutil.which("unshare") is None:
        missing("unshare is not installed")
    inside = f"mount -t tmpfs none {tree}/other && echo x > {tree}/other/mounted && ln -s {tree}/other/mounted link && cat link"
    tried = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip("the kernel or a sandbox forbids mount namespaces")
    assert "other/mounted" in opened(tree, ["unshare", "-m", "sh", "-c", inside])


# --- processes


def test_hundreds_of_processes_at_once(tree: Path) -> None:
    for number in range(300):
        (tree / f"n{number}").write_text("")
    command = "i=0; while [ $i -lt 300 ]; do cat n$i & i=$((i + 1)); done; wait"
    assert sorted(opened(tree, ["sh", "-c", command])) == sorted(f"n{number}" for number in range(300))


def test_many_threads(tree: Path) -> None:
    for number in range(400):
        (tree / f"n{number}").write_text("")
    code = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(40) as pool:
    list(pool.map(lambda n: os.close(os.open(f'n{n}', 0)), range(400)))
"""
    assert sorted(python(tree, code)) == sorted(f"n{number}" for number in range(400))


def test_recorders_in_several_threads(tree: Path) -> None:
    results: dict[str, list[str]] = {}
    work = [
        threading.Thread(target=lambda n=name: results.update({n: opened(tree, ["cat"] + [n] * 10)}))
        for name in ("a", "b", "sub/c", "other/e")
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join(60)
    assert results == {name: [name] for name in ("a", "b", "sub/c", "other/e")}


@pytest.fixture
def gate(tree: Path) -> Iterator[Path]:
    """A pipe that a process waits at until somebody writes to it."""
    os.mkfifo(tree / "gate")
    yield tree / "gate"


def test_what_outlives_the_command_is_recorded(tree: Path, gate: Path) -> None:
    def open_gate() -> None:
        gate.write_text("go\n")

    opener = threading.Thread(target=open_gate)
    opener.start()  # blocks until the process that is left behind reads
    recorded = estargz.record(["sh", "-c", "(read x < gate; cat sub/c) & exit 3"], root=tree, cwd=tree)
    opener.join(20)
    assert recorded == estargz.Recorded(["sub/c"], 3)


@pytest.mark.timeout(60)
def test_what_outlives_the_command_goes_on_unrecorded(tree: Path, gate: Path) -> None:
    command = "(read x < gate; cat sub/c > result.part; mv result.part result) > /dev/null 2>&1 & cat a; exit 3"
    recorded = estargz.record(["sh", "-c", command], root=tree, cwd=tree, until_exit=True)
    assert recorded == estargz.Recorded(["a"], 3)
    gate.write_text("go\n")
    wait_for((tree / "result").exists)
    assert (tree / "result").read_text() == "sub/c\n"


def test_orphans_of_the_command_line(tree: Path, gate: Path) -> None:
    """A daemon, whose parents have gone, is still looked into, and its exit status is taken by nobody else."""
    command = "(setsid sh -c 'read x < gate; cat sub/c' &) ; exit 0"
    with subprocess.Popen([*COMMAND, "-o", tree / "list", "--root", tree, "sh", "-c", command], cwd=tree) as process:
        gate.write_text("go\n")
        assert process.wait(30) == 0
    assert listed(tree / "list") == ["sub/c"]


@pytest.mark.timeout(60)
def test_a_process_killed_while_it_waits(tree: Path) -> None:
    """The recorder stands still, a process waits for it and is killed; the recorder goes on without it."""
    code = """
import os, signal, sys
child = os.fork()
if child == 0:
    sys.stdin.readline()
    os.open('a', 0)
    os._exit(1)
print(child, flush=True)
ended = os.waitpid(child, 0)[1]
os.open('b', 0)
os._exit(0 if os.WTERMSIG(ended) == signal.SIGKILL else 1)
"""
    command = [*COMMAND, "-o", tree / "list", "--root", tree, sys.executable, "-S", "-c", code]
    with subprocess.Popen(command, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: Path(f"/proc/{process.pid}/stat").read_text().rsplit(")")[-1].split()[0] == "T")
        process.stdin.write(b"go\n")
        process.stdin.close()
        wait_for(lambda: Path(f"/proc/{child}/syscall").read_text().startswith(("257 ", "56 ")))
        os.kill(child, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{child}").exists())
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == 0
    assert listed(tree / "list") == ["b"]


def test_processes_killed_at_any_moment(tree: Path) -> None:
    code = """
import signal, time
for round in range(60):
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            while True: os.close(os.open('a', 0))
        children.append(child)
    time.sleep(0.001 * (round % 5))
    for child in children: os.kill(child, signal.SIGKILL)
    for child in children: os.waitpid(child, 0)
"""
    assert python(tree, code) == ["a"]


# --- signals


def waiting(tree: Path, code: str, *options: str) -> subprocess.Popen[bytes]:
    """The recorder of a shell that has come to its end of `code`, which makes the file `ready`."""
    command = [*COMMAND, "-o", tree / "list", "--root", tree, *options, "sh", "-c", code]
    process = subprocess.Popen(command, cwd=tree, start_new_session=True)
    wait_for((tree / "ready").exists)
    return process


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]
)
@pytest.mark.timeout(60)
def test_signals_are_passed_on(tree: Path, gate: Path, number: signal.Signals) -> None:
    name = number.name[3:]
    code = f"trap 'cat a; exit 5' {name}; : > ready; while :; do read x < gate || :; done"
    with waiting(tree, code) as process:
        process.send_signal(number)
        assert process.wait(30) == 5
    assert listed(tree / "list") == ["a"]


@pytest.mark.timeout(60)
def test_a_terminal_interrupts_the_command_once(tree: Path) -> None:
    """The terminal tells everybody in its foreground; the recorder must not tell the command again."""
    code = """
import signal
count = 0
def interrupted(number, frame):
    global count
    count += 1
    print('interrupted', flush=True)
signal.signal(signal.SIGINT, interrupted)
print('ready', flush=True)
while input() != 'end':
    pass
print(f'{count} times')
"""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(COMMAND[0], [*COMMAND, "-o", str(tree / "list"), sys.executable, "-S", "-c", code])
    output = b""

    def seen(text: bytes) -> bool:
        nonlocal output
        output += os.read(terminal, 1000)
        return text in output

    wait_for(lambda: seen(b"ready"))
    os.write(terminal, b"\x03")
    wait_for(lambda: seen(b"interrupted"))
    os.write(terminal, b"end\n")
    wait_for(lambda: seen(b"1 times"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(terminal)


@pytest.mark.timeout(60)
def test_a_signal_ends_the_command(tree: Path) -> None:
    with waiting(tree, "cat a; : > ready; exec sleep 1000") as process:
        process.terminate()
        assert process.wait(30) == 143
    assert listed(tree / "list") == ["a"]


@pytest.mark.timeout(60)
def test_a_signal_after_the_command_ends_the_recording(tree: Path, gate: Path) -> None:
    left = "trap '' TERM; : > ready; read x < gate; cat sub/c > result.part; mv result.part result"
    with waiting(tree, f"echo $$ > pid; ({left}) & cat a; exit 4") as process:
        command = Path("/proc", (tree / "pid").read_text().strip())
        wait_for(lambda: not command.exists())
        process.terminate()
        assert process.wait(30) == 4
    assert listed(tree / "list") == ["a"]
    gate.write_text("go\n")
    wait_for((tree / "result").exists)


def test_a_python_handler_that_raises_stops_the_command(tree: Path) -> None:
    def give_up(number: int, frame: object) -> None:
        raise TimeoutError("enough")

    previous = signal.signal(signal.SIGALRM, give_up)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(TimeoutError, match="enough"):
            estargz.record(["sh", "-c", "echo $$ > pid; exec sleep 1000"], cwd=tree)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert not Path(f"/proc/{(tree / 'pid').read_text().strip()}").exists()


def test_the_callers_signals_are_as_before(tree: Path) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    estargz.record(["true"])
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == handlers


def test_nothing_leaks(tree: Path) -> None:
    def kept() -> tuple[int, int, str]:
        children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), children

    estargz.record(["true"])
    before = kept()
    for _ in range(20):
        estargz.record(["sh", "-c", "cat /etc/passwd > /dev/null"])
        with pytest.raises(UsageError):
            estargz.record(["./nowhere"], cwd=tree)
        with pytest.raises(UsageError):
            estargz.record(["true"], cwd=tree / "nowhere")
    assert kept() == before


# --- what cannot be recorded


def test_commands_that_do_not_exist(tree: Path) -> None:
    for name in ("no-such-command-anywhere", "./nowhere", "", "a/b"):
        with pytest.raises(UsageError, match="cannot be executed: No such file or directory; check") as raised:
            estargz.record([name], cwd=tree)
        assert raised.value.exit_code == 127
    done = run("-o", tree / "list", "no-such-command-anywhere")
    assert (done.returncode, done.stdout) == (127, b"")
    assert b"estargz: error: no-such-command-anywhere: cannot be executed" in done.stderr
    assert not (tree / "list").exists()


def test_commands_that_cannot_be_executed(tree: Path) -> None:
    script(tree / "garbage", "\0\1\2")
    for name, cause in (
        ("./a", "Permission denied"),
        ("./sub", "Permission denied"),
        ("./garbage", "Exec format error"),
    ):
        with pytest.raises(UsageError, match=cause) as raised:
            estargz.record([name], cwd=tree)
        assert raised.value.exit_code == 126
    assert run("-o", tree / "list", "./a", cwd=tree).returncode == 126


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ([], {}, "there is no command"),
        ("true", {}, "sequence of strings"),
        (["true\0"], {}, "NUL byte"),
        (["true"], {"cwd": "/nowhere"}, "/nowhere: cannot be entered: No such file"),
        (["true"], {"root": "/nowhere"}, "/nowhere: cannot be the root: No such file"),
        (["true"], {"root": "/etc/passwd"}, "/etc/passwd: cannot be the root: it is no directory"),
        (["true"], {"cwd": "/etc\0"}, "NUL byte"),
        (["true"], {"root": "/etc\0"}, r"'/etc\\x00' has a NUL byte"),
        (["true"], {"root": "/\ud800"}, "has a lone surrogate"),
        (
            ["true"],
            {"env": {"A": "x\0secret"}},
            "the variable 'A' has a NUL byte, which a command cannot be given; leave it out",
        ),
        (["true"], {"env": {"A\0": "x"}}, "has a NUL byte"),
        (["true"], {"env": {"A": "\ud800"}}, "the variable 'A' has a lone surrogate"),
        (["echo", "\ud800"], {}, r"'\\ud800' has a lone surrogate"),
    ],
)
def test_wrong_usage(command: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        estargz.record(command, **options)


def test_a_recorder_within_a_recorder(tree: Path) -> None:
    """The kernel has one such supervisor for a process; the error says what else there is."""
    done = run("-o", tree / "outer", "--", *COMMAND, "-o", tree / "inner", "--", "true")
    assert done.returncode == 1
    assert b"another supervisor" in done.stderr
    assert b"strace -f -y -e trace=%file,%process,fchdir -o LOG COMMAND" in done.stderr
    assert not (tree / "inner").exists()


def test_old_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*known[:2], "5.4.0-generic", *known[3:])))
    with pytest.raises(EstargzError, match="needs Linux 5.9 or newer, and this is 5.4.0-generic; let strace"):
        estargz.record(["true"])


def test_kernels_without_notifications(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason, text in ((38, "no such notifications"), (1, "may forbid the seccomp call"), (22, "Invalid argument")):
        answer = ([], 127, 0, _record.NO_FILTER, reason)
        monkeypatch.setattr(_record, "run", lambda *_, answer=answer, **__: answer)
        with pytest.raises(EstargzError, match=f"opens cannot be recorded.*{text}.*strace -f"):
            estargz.record(["true"])


# --- the command line


def test_lines_as_ctr_remote_writes_them(tree: Path) -> None:
    assert run("-o", tree / "list", "--root", tree, "cat", "a", "to-sub/c", cwd=tree).returncode == 0
    assert (tree / "list").read_bytes() == b'{"path":"a"}\n{"path":"sub/c"}\n'


def test_plain_lines_mean_the_same_paths(tree: Path) -> None:
    names = ["[", "x*", "#c", "{j}", "q?", "back\\slash", " space", "ü", "\udcff"]
    for name in names:
        (tree / name).write_text("")
    run("-o", tree / "list", "--root", tree, "cat", *names, cwd=tree)
    run("-o", tree / "plain", "--plain", "--root", tree, "cat", *names, cwd=tree)
    assert listed(tree / "list") == names
    for file in ("list", "plain"):
        patterns = estargz.read_access_log(tree / file)
        assert [estargz.match(pattern, names) for pattern in patterns] == [[name] for name in names]
    assert (tree / "plain").read_bytes().splitlines()[:3] == [b"\\[", b"x\\*", b"\\#c"]


def test_options_end_at_the_command(tree: Path) -> None:
    assert run("-o", tree / "list", "sh", "-c", "exit $#", "x", "-o", "--root", "--plain").returncode == 3


def test_outputs_that_cannot_be_written(tree: Path) -> None:
    done = run("-o", tree / "nowhere" / "list", "touch", tree / "ran")
    assert done.returncode == 1
    assert b"cannot be written" in done.stderr
    assert not (tree / "ran").exists()
    assert b"standard output belongs to the command" in run("-o", "-", "true").stderr
    assert run("true").returncode == 2
    assert b"No such option" in run("--nonsense", "-o", tree / "list", "true").stderr
    assert run("-o", tree / "list").returncode == 2


def test_an_old_list_stays_when_there_is_no_new_one(tree: Path) -> None:
    (tree / "list").write_text("old")
    run("-o", tree / "list", "./nowhere", cwd=tree)
    assert (tree / "list").read_text() == "old"
    assert not [name for name in os.listdir(tree) if "tmp" in name]


def test_a_list_is_the_same_every_time(tree: Path) -> None:
    command = ["sh", "-c", "cat a b; sh -c 'cat sub/c'; cat to-a other/e"]
    lists = [estargz.record(command, cwd=tree).paths for _ in range(5)]
    assert all(paths == lists[0] for paths in lists)


def test_sockets_are_no_content(tree: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tree / "socket"))
        assert estargz.record(["cat", "socket"], root=tree, cwd=tree).paths == []
