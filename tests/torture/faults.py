"""One fault in every system call, allocation and thread start of small builds and all else that the package does.

For each scenario (fault_scenarios.py) all calls are counted once. Then each of them fails in each way that it can, one at a
time, in a process of its own: a clear error, or the right result; nothing left behind, nothing torn, no descriptor or thread
lost, no hang; and the same once more, without a fault, succeeds. Interrupted calls and short counts must not be noticed at all.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import gc
import hashlib
import json
import os
import random
import re
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outcome import ROOT, Outcome, parser

OWN_ALLOCATION, ANY_ALLOCATION, THREAD_START = 1000, 1001, 1002  # kinds that are no system calls (injector.c)
KINDS = 1024
EVERYBODYS = 400  # allocations that are refused to the interpreter, spread evenly, of some thousand in a scenario
PATIENCE = 10  # seconds for what takes some milliseconds
PATIENCE_OF_SQLITE = 60  # which asks for a lock a hundred times and more
AT_ONCE = min(2, os.cpu_count() or 1)
FOR_EVER = 1 << 62

# call -> how it can fail. "+": from this one on, all of them. one, half: it does a part of what it was asked for.
OUTCOMES: dict[str, str] = {
    name: outcomes
    for names, outcomes in {
        "openat": "EINTR EACCES EMFILE EMFILE+ ENFILE ENOMEM EIO EIO+ ENOSPC EOPNOTSUPP",
        "open": "EINTR EACCES EMFILE EIO",
        "openat2": "EINTR EACCES EMFILE EMFILE+ ENOMEM EIO EAGAIN ENOSYS ENOSYS+",
        "read pread64 readv preadv preadv2": "EINTR EIO EIO+ ENOMEM one half half+",
        "write pwrite64 writev pwritev pwritev2": "EINTR EIO ENOMEM ENOSPC ENOSPC+ EDQUOT one half half+",
        "copy_file_range": "EINTR EIO ENOSPC EXDEV EXDEV+ ENOSYS+ EOPNOTSUPP+ one half half+",
        "sendfile": "EINTR EIO EINVAL+ ENOMEM one half",
        "sendto sendmsg": "EINTR ECONNRESET ECONNRESET+ EPIPE ENOBUFS ENOMEM one half half+",
        "recvfrom recvmsg": "EINTR ECONNRESET ECONNRESET+ ETIMEDOUT ENOMEM one half half+",
        "connect": "EINTR ECONNREFUSED ECONNREFUSED+ ECONNRESET ENETUNREACH ETIMEDOUT EADDRNOTAVAIL",
        "shutdown": "ENOTCONN",
        "getsockopt setsockopt getsockname getpeername bind": "ENOBUFS ENOBUFS+ ENOMEM",
        "sync_file_range": "EIO ENOSPC ENOSYS+",
        "fsync fdatasync": "EINTR EIO EIO+ ENOSPC EDQUOT",
        "close": "EINTR EIO ENOSPC",
        "ftruncate truncate": "EINTR EIO ENOSPC",
        "fallocate": "EINTR EIO ENOSPC EOPNOTSUPP+",
        "linkat link": "EIO ENOSPC EDQUOT EMLINK EACCES EPERM ENOENT+",
        "rename renameat renameat2": "EIO ENOSPC EDQUOT EACCES EIO+",
        "unlink unlinkat rmdir": "EIO EACCES EIO+",
        "mkdir mkdirat symlink symlinkat mknod mknodat": "EIO ENOSPC EDQUOT EACCES",
        "stat lstat fstat newfstatat statx access faccessat faccessat2": "EACCES ENOMEM EIO EIO+",
        "getdents64": "EIO ENOMEM half",
        "readlink readlinkat": "EACCES ENOMEM EIO",
        "getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr": "EACCES ENOMEM EIO",
        "getxattrat listxattrat setxattrat": "EACCES ENOMEM EIO ENOSYS ENOSYS+",
        "setxattr lsetxattr fsetxattr removexattr fremovexattr": "EIO ENOSPC EDQUOT",
        "chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utimensat": "EIO EPERM EROFS",
        "mmap": "ENOMEM ENOMEM+",
        "mprotect munmap mremap brk": "ENOMEM",
        "pipe2 dup eventfd2": "EMFILE ENFILE",
        "socket": "EMFILE EMFILE+ ENFILE ENOBUFS ENOMEM EACCES",
        "fcntl": "EMFILE EMFILE+ ENOLCK",
        "flock": "EINTR ENOLCK",
        "poll ppoll select pselect6 epoll_wait": "EINTR ENOMEM",
        "lseek ioctl": "EIO",
        "getrandom": "EINTR ENOSYS half",
        "statfs fstatfs": "EINTR EIO ENOSYS",
        "getcwd": "ENOENT ENOMEM",
    }.items()
    for name in names.split()
}

# Calls that do not fail, or cannot be trapped: glibc makes some with all signals blocked.
SPARED = (
    "futex clone clone3 fork vfork exit exit_group rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall "
    "set_robust_list set_tid_address rseq madvise sched_yield gettid getpid getppid getuid geteuid getgid getegid umask kill "
    "tgkill setpgid getpgrp wait4 clock_gettime clock_nanosleep nanosleep getrusage times uname prctl seccomp "
    "sched_getaffinity prlimit64 sysinfo"
).split()

UNNOTICED = ("EINTR", "one", "half")


# ------------------------------------------------------------------------------------------------------------- injector


def system_calls() -> dict[str, int]:
    """Numbers by name, as the compiler's headers have them."""
    command = [*compiler(), "-E", "-dM", "-include", "sys/syscall.h", "-x", "c", "/dev/null"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"^#define __NR_(\w+) (\d+)$", text, re.MULTILINE)}
    return NEW_CALLS | found


# Those that headers may not have yet; the same on all machines.
NEW_CALLS = {"fchmodat2": 452, "setxattrat": 463, "getxattrat": 464, "listxattrat": 465, "removexattrat": 466}


def compiler() -> list[str]:
    return (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[:1]


def compiled() -> Path:
    """The injector, made where the results are."""
    source = Path(__file__).with_name("injector.c")
    made = ROOT / "build" / "torture" / f"injector-{zlib.crc32(source.read_bytes()):08x}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            built = Path(folder, made.name)
            flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
            subprocess.run([*compiler(), *flags, "-o", built, source], check=True)
            built.rename(made)
    return made


class Injector:
    """The object that was preloaded into this process."""

    def __init__(self) -> None:
        self._numbers = system_calls()
        self._names = {number: name for name, number in self._numbers.items()}
        self._names |= {OWN_ALLOCATION: "allocation", ANY_ALLOCATION: "any allocation", THREAD_START: "thread start"}
        self._kinds = {name: number for number, name in self._names.items()}
        self._library = ctypes.CDLL(None)
        spared = [self._numbers[name] for name in SPARED if name in self._numbers]
        self._spared = (ctypes.c_int * len(spared))(*spared)
        self._arm = self._library.injector_arm
        self._arm.argtypes = [ctypes.c_long] * 6
        self._counts = (ctypes.c_long * KINDS).in_dll(self._library, "injector_counts")
        self._fired = ctypes.c_long.in_dll(self._library, "injector_fired")
        self._closed = ctypes.c_long.in_dll(self._library, "injector_closed")

    def install(self) -> None:
        """For the rest of this process's life."""
        failed = self._library.injector_install(self._spared, len(self._spared))
        if failed:
            raise OSError(failed, f"system calls cannot be trapped here: {os.strerror(failed)}")

    def arm(self, fault: Fault | None, shown: bool = False) -> None:
        if fault is None:
            self._arm(-1, 0, 0, 0, 0, 0)
            return
        action = {"one": 1, "half": 2}.get(fault.how, 0)
        error = getattr(errno, fault.how, 0)
        self._arm(self._kinds[fault.call], fault.index, fault.last, action, error, shown)

    def disarm(self) -> None:
        self._library.injector_disarm()

    def counts(self) -> dict[str, int]:
        return {self._names.get(kind, str(kind)): count for kind, count in enumerate(self._counts) if count}

    @property
    def fired(self) -> int:
        return self._fired.value

    @property
    def closed(self) -> int:
        """Calls with a descriptor that was not open."""
        return self._closed.value


@dataclass(frozen=True)
class Fault:
    """What goes wrong: which call of a kind, and how."""

    call: str
    index: int
    outcome: str

    @property
    def how(self) -> str:
        return self.outcome.rstrip("+")

    @property
    def last(self) -> int:
        return FOR_EVER if self.outcome.endswith("+") else self.index

    @property
    def unnoticed(self) -> bool:
        return self.how in UNNOTICED

    def __str__(self) -> str:
        return f"{self.call}:{self.index}:{self.outcome}"


# --------------------------------------------------------------------------------------------------------------- judging


@dataclass
class Verdict:
    """What one fault, or none, led to."""

    wrong: list[str] = field(default_factory=list)
    fired: int = 0
    error: str = ""
    fact: Any = None
    tree: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


def census() -> tuple[dict[str, str], int]:
    """Open descriptors with what they lead to, and the number of threads."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    found = {name: target for name, target in found.items() if target != "/dev/urandom"}  # which Python keeps open
    return found, len(os.listdir("/proc/self/task"))


def settled_census(threads: int) -> tuple[dict[str, str], int]:
    """When threads that were joined, or have been told to end, are gone."""
    until = time.monotonic() + 2
    while (now := census())[1] > threads and time.monotonic() < until:
        time.sleep(0.002)
    return now


def tree_of(folder: Path) -> dict[str, str]:
    """Everything in a directory, with its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        else:
            found[name] = "directory" if path.is_dir() else "special"
    return found


def left_at(place: Any) -> dict[str, str]:
    """Everything that a scenario has made, here and in a registry."""
    return tree_of(place.out) | {f"pushed {name}": digest for name, digest in place.pushed().items()}


def unclear(error: BaseException, fault: Fault) -> str | None:
    """Why an error is no clear one; None if it is."""
    from estargz import EstargzError

    text = str(error)
    what = f"{type(error).__name__}: {text}"
    if isinstance(error, MemoryError):
        return None if fault.how == "ENOMEM" else f"wrong error, {what}"
    if isinstance(error, ValueError) and ("digital envelope routines" in text or text == "no reason supplied"):
        return None  # how Python says that OpenSSL has no memory, or not even enough to say so
    named = isinstance(error, EstargzError) or (
        isinstance(error, OSError) and (error.filename is not None or len(error.args) == 1)
    )
    if not named or not text:
        return f"unclear error, {what}"
    causes = [os.strerror(getattr(errno, fault.how)) if hasattr(errno, fault.how) else what]
    causes += ["out of memory"] if fault.how == "ENOMEM" else []
    causes += [os.strerror(errno.EAGAIN)] if fault.call in ("mmap", "mprotect") else []  # says pthread_create() for it
    causes += ["the connection broke"] if fault.call == "sendto" else []  # then urllib3 tells only how the answer ended
    said = any(cause in text for cause in (*causes, *WORDS_OF_OTHERS))
    return None if said else f"error without its cause, {what}"


# SQLite has codes of its own for what went wrong, click no causes.
WORDS_OF_OTHERS = (
    "' is not readable.",
    "index.sqlite: disk I/O error",
    "index.sqlite: unable to open",
    "index.sqlite: database or disk is full",
    "index.sqlite: attempt to write a readonly database",
    "index.sqlite: database is locked",
    "index.sqlite: database disk image is malformed",
    "index.sqlite: locking protocol",
)


def of_others(error: BaseException) -> bool:
    """Whether an interruption got out of SQLite, or of Python's listdir() and scandir(), which do not try again."""
    cause = error.__cause__ or error
    listed = (
        isinstance(cause, InterruptedError) and isinstance(cause.filename, str | Path) and Path(cause.filename).is_dir()
    )
    return listed or any(words in str(error) for words in WORDS_OF_OTHERS)


def lost(before: tuple[dict[str, str], int], after: tuple[dict[str, str], int]) -> Iterator[str]:
    for number in after[0].keys() - before[0].keys():
        yield f"descriptor left: {after[0][number]}"
    for number in before[0].keys() - after[0].keys():
        yield f"descriptor closed that is somebody else's: {before[0][number]}"
    if after[1] > before[1]:
        yield f"threads left: {[thread.name for thread in threading.enumerate()]}"


def judge(
    scenario: Any, fault: Fault, error: BaseException | None, fact: object, place: Any, before: Any
) -> Iterator[str]:
    """What is wrong with how a fault ended."""
    after = left_at(place)
    if error is None:
        if fact != scenario.fact:
            yield f"wrong result, {fact!r:.200} instead of {scenario.fact!r:.200}"
        if not scenario.complete(after):
            yield f"incomplete: {different(after, scenario.after)}"
        if fault.call == "fsync" and not fault.unnoticed:  # fdatasync is SQLite's
            yield "not noticed: what is not on the disk may be lost"
    else:
        if fault.call != "any allocation":
            reason = unclear(error, fault)
            yield from [reason] if reason else []
            if fault.unnoticed and not of_others(error):
                yield f"noticed, {type(error).__name__}: {error}"
        hopeless = fault.call in ("unlink", "unlinkat", "rmdir") or (
            fault.outcome[-1] == "+" and scenario.name == "extract_new"
        )
        if not hopeless and not scenario.untouched(before, after):
            yield f"left behind: {different(after, before)}"
    left = [] if scenario.keeps_cache else sorted(os.listdir(place.tmp))
    if left:
        yield f"left in TMPDIR: {left}"


def different(one: dict[str, str], other: dict[str, str]) -> str:
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return ", ".join(f"{name} ({other.get(name)} -> {one.get(name)})" for name in names[:5])


# ---------------------------------------------------------------------------------------------------------------- trials


@dataclass
class Scenario:
    """Something to run, and what it gives when nothing goes wrong."""

    name: str
    prepare: Any
    fact: Any = None
    after: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def keeps_cache(self) -> bool:
        return self.name == "read_cached"

    def complete(self, tree: dict[str, str]) -> bool:
        return self._shown(tree) == self._shown(self.after)

    def untouched(self, before: dict[str, str], after: dict[str, str]) -> bool:
        """Whether an error left all as it was, or, by a hair's breadth, as it was to be."""
        if self.name in ("variants", "image_layout", "pull"):  # blobs, and what makes a layout of a directory, may stay
            return not any(name.endswith(".tmp") for name in after)
        if self.name in ("extract_two", "pool"):  # what is complete may stay
            return all(self.after.get(name) == content for name, content in after.items())
        return after == before or self.complete(after)

    def _shown(self, tree: dict[str, str]) -> dict[str, str]:
        """Without what differs from time to time."""
        if self.name != "variants":
            return tree
        return {name: content for name, content in tree.items() if "index.sqlite" not in name and "locks/" not in name}


def attempt(
    scenario: Scenario, fault: Fault | None, given: Path, folder: Path, injector: Injector, shown: bool
) -> Verdict:
    """In a process that ends afterwards: runs a scenario with a fault, and judges."""
    from fault_scenarios import Place

    verdict = Verdict()
    sys.unraisablehook = lambda what: verdict.wrong.append(f"ignored exception, {what.exc_value!r} in {what.object!r}")
    threading.excepthook = lambda what: verdict.wrong.append(f"exception of a thread, {what.exc_value!r}")
    place, error, fact = Place.made(given, folder), None, None
    injector.install()
    with ExitStack() as stack:
        run = scenario.prepare(place, stack)
        before, tree = census(), left_at(place)
        gc.disable()
        injector.arm(fault, shown)
        try:
            fact = run()
        except BaseException as raised:
            error = raised
        while True:
            try:
                injector.disarm()
                break
            except MemoryError:  # the call itself takes some
                continue
        fact = fact() if callable(fact) else fact
        fact = json.loads(json.dumps(fact))  # as it is compared
        verdict.counts, verdict.fired = injector.counts(), injector.fired
        after = settled_census(before[1])
    verdict.fact, verdict.tree, verdict.error = fact, left_at(place), "" if error is None else repr(error)
    if error is not None and shown:
        sys.excepthook(type(error), error, error.__traceback__)
    if fault is not None and fault.call == "any allocation":  # nor does the interpreter itself get over that
        verdict.wrong.clear()
    else:
        verdict.wrong += lost(before, after)
    if injector.closed and scenario.name != "variants":  # SQLite
        verdict.wrong.append("a descriptor was used that was not open")
    if fault is not None:
        verdict.wrong += judge(scenario, fault, error, fact, place, tree)
    return verdict


def once_more(scenario: Scenario, given: Path, folder: Path) -> Iterator[str]:
    """In the same process, without a fault."""
    from fault_scenarios import Place

    place = Place.made(given, folder)
    try:
        with ExitStack() as stack:
            fact = scenario.prepare(place, stack)()
            fact = json.loads(json.dumps(fact() if callable(fact) else fact))
    except BaseException as error:
        yield f"and does not work again, {error!r}"
    else:
        if fact != scenario.fact or not scenario.complete(left_at(place)):
            yield "and gives a wrong result again"


@dataclass
class Trial:
    """A process that tries one fault."""

    scenario: Scenario
    fault: Fault | None
    folder: Path
    patience: float = PATIENCE
    pid: int = 0
    answer: int = -1
    until: float = 0.0
    shown: bool = False

    def start(self, given: Path, injector: Injector) -> None:
        self.answer, write = os.pipe()
        self.folder.mkdir()
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            os.close(self.answer)
            self._be_tried(given, injector, write)
        os.close(write)
        self.until = time.monotonic() + self.patience

    def _be_tried(self, given: Path, injector: Injector, write: int) -> None:
        from fault_scenarios import UNSHARED

        UNSHARED.append(write)  # who feeds a pipe does not keep us waiting
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if not self.shown:
            os.dup2(log, 2)
        faulthandler.enable(log)
        try:
            verdict = attempt(self.scenario, self.fault, given, self.folder / "1", injector, self.shown)
            gc.enable()
            if self.fault is not None:
                verdict.wrong += once_more(self.scenario, given, self.folder / "2")
        except BaseException as error:
            verdict = Verdict([f"the trial itself failed, {error!r}"])
        with open(write, "w") as pipe:
            json.dump(vars(verdict), pipe, default=str)
        os._exit(0)

    def end(self) -> Verdict:
        """What it found, once it has answered, died, or had its time."""
        late = time.monotonic() >= self.until
        with suppress(ProcessLookupError):
            if late:
                os.kill(self.pid, signal.SIGABRT)  # tells where it hangs
                time.sleep(0.5)
            os.killpg(self.pid, signal.SIGKILL if late else signal.SIGCONT)
        with open(self.answer, "rb") as pipe:
            answer = b"" if late else pipe.read()
        _, status = os.waitpid(self.pid, 0)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # who still feeds a pipe
        log = (self.folder / "log").read_text(errors="replace")
        shutil.rmtree(self.folder, ignore_errors=True)
        if late and re.search(r'threading\.py", line \d+ in start\b', log):
            return Verdict([STARTING], 1)
        if late and re.search(r'threading\.py", line \d+ in __enter__\s+File "[^"]*/queue\.py"', log):
            return Verdict([QUEUEING], 1)
        if late:
            return Verdict([f"hangs: {where(log)}"], 1)
        if status or not answer:
            return Verdict([f"died, status {os.waitstatus_to_exitcode(status)}: {where(log)}"], 1)
        verdict = Verdict(**json.loads(answer))
        return verdict

    def __str__(self) -> str:
        return f"{self.scenario.name}:{self.fault}"


# threading.Thread.start() waits for a thread that has begun, and one that finds no memory for its first call of Python does
# not. That is the interpreter's; what the package starts by itself does not wait so (Pipeline.start_threads).
STARTING = "hangs in Python's own Thread.start()"

# queue.Queue, which urllib3 keeps its connections in, leaves by a call of Python that makes a tuple of its arguments, and keeps
# its lock for ever where there is no memory for that.
QUEUEING = "hangs in Python's own queue.Queue"


# How others end when an allocation of theirs fails, as no package can prevent: what is told of the end, and whose it is.
ENDS_OF_OTHERS = {
    f"^{re.escape(QUEUEING)}": "hangs of Python's own queues",
    r"^hangs: .*(thread\.py\", line \d+ in (_worker|run)|_base\.py\", line \d+ in result)": "hangs of Python's own executors",
    r"^died, status -11: toc\.py\", line \d+ in _encoded": "crashes of msgspec's encoder",
}


def end_of_others(trial: Trial, verdict: Verdict) -> str | None:
    """Whose end it was, if an allocation of the interpreter or of a library failed and that is how they take it."""
    if trial.fault is None or trial.fault.how != "ENOMEM":
        return None
    if verdict.wrong == [STARTING]:
        return "hangs of Python's own Thread.start()"
    ends = ENDS_OF_OTHERS if trial.fault.call == "any allocation" else {}
    return next((whose for end, whose in ends.items() if any(re.search(end, wrong) for wrong in verdict.wrong)), None)


def where(log: str) -> str:
    """The places that a crash report names."""
    return " < ".join(re.findall(r'File "\S*?([^/"]+", line \d+ in \w+)', log)[:6]) or log[-300:]


def tried(trials: Iterator[Trial], given: Path, injector: Injector) -> Iterator[tuple[Trial, Verdict]]:
    """Runs them, some at once."""
    with selectors.DefaultSelector() as running:
        while True:
            while len(running.get_map()) < AT_ONCE and (trial := next(trials, None)) is not None:
                trial.start(given, injector)
                running.register(trial.answer, selectors.EVENT_READ, trial)
            if not running.get_map():
                return
            first = min(key.data.until for key in running.get_map().values())
            ready = {key.data.pid for key, _ in running.select(max(0.0, first - time.monotonic()))}
            for key in list(running.get_map().values()):
                if key.data.pid in ready or time.monotonic() >= key.data.until:
                    running.unregister(key.fd)
                    yield key.data, key.data.end()


# ------------------------------------------------------------------------------------------------------------------ runs


def faults_of(counts: dict[str, int], everybodys: int) -> Iterator[Fault]:
    for call, count in sorted(counts.items()):
        if call == "any allocation" and not everybodys:
            continue
        step = -(-count // everybodys) if call == "any allocation" else 1
        for index in range(0, count, step):
            for outcome in OUTCOMES_OF_OTHERS.get(call) or OUTCOMES[call].split():
                yield Fault(call, index, outcome)


OUTCOMES_OF_OTHERS = {
    "allocation": ["ENOMEM", "ENOMEM+"],
    "any allocation": ["ENOMEM"],
    "thread start": ["EAGAIN", "EAGAIN+"],
}


def sample(faults: Sequence[Fault], share: int) -> list[Fault]:
    """About so many, the same each time: of every call and outcome some, the rare ones first."""
    rng = random.Random(41)
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        groups.setdefault((fault.call, fault.outcome), []).append(fault)
    for group in groups.values():
        rng.shuffle(group)
    chosen: list[Fault] = []
    while len(chosen) < share and groups:
        for key in sorted(groups):
            chosen.append(groups[key].pop())
            if not groups[key]:
                del groups[key]
    rng.shuffle(chosen)
    return chosen[:share]


class Run:
    """All trials of one call of the program."""

    def __init__(self, outcome: Outcome, folder: Path, shown: bool) -> None:
        self.outcome, self.folder, self.shown = outcome, folder, shown
        self.given = folder / "given"
        self.injector = Injector()
        self.number = 0
        self.table: dict[str, dict[str, int]] = {}

    def trial(self, scenario: Scenario, fault: Fault | None) -> Trial:
        self.number += 1
        patience = PATIENCE_OF_SQLITE if scenario.name == "variants" else PATIENCE
        return Trial(scenario, fault, self.folder / str(self.number), patience, shown=self.shown)

    def alone(self, scenario: Scenario, fault: Fault | None) -> Verdict:
        return next(tried(iter([self.trial(scenario, fault)]), self.given, self.injector))[1]

    def count_calls(self, scenario: Scenario) -> None:
        """Runs a scenario here, so that all is loaded, and in a process that counts."""
        from fault_scenarios import Place

        with ExitStack() as stack:
            scenario.prepare(Place.made(self.given, self.folder / scenario.name), stack)()
        verdict = self.alone(scenario, None)
        scenario.fact, scenario.after, scenario.counts = verdict.fact, verdict.tree, verdict.counts
        for wrong in verdict.wrong or ([verdict.error] if verdict.error else []):
            self.outcome.defect(f"{scenario.name}, without a fault: {wrong}")
        for call in scenario.counts.keys() - OUTCOMES.keys() - OUTCOMES_OF_OTHERS.keys():
            self.outcome.defect(f"{scenario.name}: makes the call {call}, and nothing is known of how it can fail")
            del scenario.counts[call]

    def check_itself(self) -> None:
        """Careless functions must be found out, each by what it does wrong."""
        from fault_scenarios import CARELESS

        for prepare, text, wanted in CARELESS:
            scenario = Scenario(prepare.__name__, prepare)
            self.count_calls(scenario)
            call, index, outcome = text.split(":")
            trial = self.trial(scenario, Fault(call, int(index), outcome))
            trial.patience = 4
            verdict = next(tried(iter([trial]), self.given, self.injector))[1]
            if not any(wanted in wrong for wrong in verdict.wrong):
                self.outcome.defect(f"{scenario.name}:{text}: not found out, {verdict.wrong}")
            self.outcome.count("careless functions found out")

    def try_all(self, scenario: Scenario, faults: Sequence[Fault]) -> None:
        trials = (self.trial(scenario, fault) for fault in faults)
        for trial, verdict in tried(trials, self.given, self.injector):
            self.note(trial, verdict)

    def note(self, trial: Trial, verdict: Verdict) -> None:
        if not verdict.fired and not verdict.wrong:
            self.outcome.count("calls that were not made again")
            return
        assert trial.fault is not None
        self.outcome.count("fault points")
        if whose := end_of_others(trial, verdict):
            self.outcome.count(whose)
            return
        self.outcome.count("clear errors" if verdict.error else "right results", not verdict.wrong)
        row = self.table.setdefault(trial.scenario.name, {})
        row[trial.fault.call] = row.get(trial.fault.call, 0) + 1
        if verdict.wrong:
            self.outcome.defect(f"{trial}: {'; '.join(verdict.wrong)}")


def main() -> int:
    arguments = parser("faults", __doc__)
    arguments.add_argument("--only", action="append", default=[], metavar="SCENARIO[:CALL[:INDEX[:OUTCOME]]]")
    arguments.add_argument("--show", action="store_true", help="where the fault happens, and what is raised")
    arguments.add_argument("--share", type=int, default=40, help="faults a scenario, with --quick")
    arguments.add_argument("--check-itself", action="store_true", help="no more than what a run begins with")
    chosen = arguments.parse_args()
    if "injector" not in os.environ.get("LD_PRELOAD", ""):
        start_preloaded()
    subprocess.run([ROOT / "scripts/tools", "docker-registry:docker-registry"], check=True)
    if chosen.show:
        global AT_ONCE
        AT_ONCE = 1
    del os.environ["LD_PRELOAD"]  # what is started from here on is not under it
    outcome = Outcome("faults", chosen.quick)
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="estargz-faults-", dir=place) as folder, ExitStack() as stack:
        run = Run(outcome, Path(folder), chosen.show)
        run_all(run, chosen, stack)
    print_table(run.table)
    return outcome.close()


def run_all(run: Run, chosen: Any, stack: ExitStack) -> None:
    import fault_scenarios as known

    run.given.mkdir()
    known.give(run.given, stack)
    if not chosen.only:
        run.check_itself()
    if chosen.check_itself:
        return
    for scenario in [Scenario(prepare.__name__, prepare) for prepare in known.SCENARIOS]:
        if chosen.only and not any(wanted.split(":")[0] == scenario.name for wanted in chosen.only):
            continue
        run.count_calls(scenario)
        everybodys = 0 if chosen.quick else EVERYBODYS
        if any(":" in only for only in chosen.only):  # one of them is asked for
            everybodys = FOR_EVER
        faults = list(faults_of(scenario.counts, everybodys))
        if chosen.only:
            wanted = [f"{only}:" for only in chosen.only]
            faults = [fault for fault in faults if f"{scenario.name}:{fault}:".startswith(tuple(wanted))]
        if chosen.quick:
            faults = sample(faults, chosen.share)
        run.try_all(scenario, faults)


def start_preloaded() -> None:
    """This program anew, with the injector in it, small stacks that glibc keeps, and every object of Python's allocated."""
    limit = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, limit[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    settings = {
        "LD_PRELOAD": str(compiled()),
        "PYTHONMALLOC": "malloc",
        "OPENBLAS_NUM_THREADS": "1",
        "SOURCE_DATE_EPOCH": "1",
    }
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


def print_table(table: dict[str, dict[str, int]]) -> None:
    for scenario, row in table.items():
        calls = ", ".join(f"{call} {count}" for call, count in sorted(row.items()))
        print(f"  {scenario}: {sum(row.values())} ({calls})")


if __name__ == "__main__":
    sys.exit(main())
