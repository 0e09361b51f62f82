"""Recording which files a command opens: what a layer's prefetch list is made of.

Nothing is traced: a seccomp filter stops only the calls that open or execute files, until their paths were looked at, and
then lets them go on unchanged. No privilege, no container and no daemon is needed; Linux 5.9 or newer is.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from estargz import _record
from estargz.errors import EstargzError, UsageError
from estargz.writing.access_log import plain_line

__all__ = ["Recorded", "json_lines", "plain_lines", "record"]

_OLDEST_KERNEL = (5, 9)  # tells when the last recorded process has gone

_INSTEAD = "let strace write the log instead: strace -f -y -e trace=%file,%process,fchdir -o LOG COMMAND"


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a command opened, and how it ended."""

    paths: list[str]
    """Regular files below the root that were opened for reading or executed, in order of first opening, each once.

    Relative to the root, symbolic links resolved: a link's own entry is in the table of contents, which is there before
    any file, and only what it leads to has content to fetch. Bytes that are no UTF-8 are surrogate escapes (PEP 383).
    """
    status: int
    """The command's exit status; 128 and the signal's number when a signal ended it; 255 when another part of this process
    took it, or SIGCHLD is ignored."""
    unread: int = 0
    """Calls whose files are not known, because their process may not be looked into or their path leads through another
    process's descriptors."""


def record(
    command: Sequence[str | os.PathLike[str]],
    *,
    root: str | os.PathLike[str] = "/",
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    until_exit: bool = False,
    adopt_orphans: bool = False,
) -> Recorded:
    """Run ``command`` and list the files that it and all processes it starts open.

    The command has this process's standard streams, and ``env`` and ``cwd`` where they are given. Files outside ``root``
    are left out, and so are files of /proc, /sys and the like. What a call opens is looked up just before it goes on, so
    that a file which exists but may not be read is listed too. Opens that are for writing only, for a directory or a mere
    handle (O_PATH), that empty the file or must create it, read no content and are not listed; programs that run scripts,
    and dynamic loaders, are. Opens by io_uring or by another architecture's calls (i386 on x86-64) are not seen.

    The recording lasts until the last of those processes has ended; with ``until_exit``, until the command itself has: what
    it leaves behind then goes on unrecorded, which takes a small process that lives as long. SIGHUP, SIGINT, SIGQUIT,
    SIGTERM, SIGUSR1 and SIGUSR2 that arrive in the meantime are passed on to the command (what a terminal sends, it gets by
    itself) and end the recording once the command has ended. An exception of a Python signal handler kills the command.
    When this process is killed, all further opens of the command fail with ENOSYS.

    Without the right to install filters (CAP_SYS_ADMIN), the command runs under no_new_privs: setuid programs then run
    without their owner's rights. An open that a signal handler without SA_RESTART interrupts may fail with EINTR, though
    hardly ever on Linux 5.19 or newer.

    ``adopt_orphans`` makes processes whose parents have ended children of this one, and takes the exit status of all its
    children: for a process that has no others. Where Yama restricts ptrace, their opens cannot be read otherwise.

    Raises:
        UsageError: the command or the folder does not exist or cannot be executed or entered; ``exit_code`` is then a
            shell's, 127 or 126. An argument, a variable or a path holds what none can hold.
        EstargzError: the kernel or a filter around this process does not allow recording.
    """
    arguments = _encoded(command)
    if not arguments:
        raise UsageError("there is no command to record; name a program")
    _check_kernel()
    environment = os.environb if env is None else _environment(env)
    paths, status, unread, stage, reason = _record.run(
        _programs(arguments[0], environment),
        arguments,
        [key + b"=" + value for key, value in environment.items()],
        None if cwd is None else _encoded([cwd])[0],
        _root(root),
        until_exit=until_exit,
        adopt_orphans=adopt_orphans,
    )
    if stage:
        raise _not_started(stage, reason, os.fsdecode(arguments[0]), cwd)
    return Recorded([path.decode("utf-8", "surrogateescape") for path in paths], status, unread)


def json_lines(paths: Iterable[str]) -> Iterable[bytes]:
    """The lines of a record as ctr-remote writes it. Bytes that are no UTF-8 become escaped lone surrogates, which
    ``read_access_log`` turns back and Go's decoder reads as U+FFFD."""
    for path in paths:
        yield json.dumps({"path": path}, separators=(",", ":")).encode() + b"\n"


def plain_lines(paths: Iterable[str]) -> Iterable[bytes]:
    """The lines of a plain list, with what would be a glob or a comment escaped."""
    for path in paths:
        yield plain_line(path).encode("utf-8", "surrogateescape") + b"\n"


def _encoded(arguments: Iterable[str | os.PathLike[str]]) -> list[bytes]:
    if isinstance(arguments, str | bytes):
        raise UsageError(f"a command is a sequence of strings, not {arguments!r}; split it")
    return [_bytes_of(argument, repr(argument)) for argument in arguments]


def _environment(env: Mapping[str, str]) -> dict[bytes, bytes]:
    # No value is shown: it may be a secret.
    named = [(key, value, f"the variable {key!r}") for key, value in env.items()]
    return {_bytes_of(key, shown): _bytes_of(value, shown) for key, value, shown in named}


def _bytes_of(text: str | os.PathLike[str], shown: str) -> bytes:
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        raise UsageError(f"{shown} has a lone surrogate, which stands for no byte; correct it") from None
    if b"\0" in encoded:
        raise UsageError(f"{shown} has a NUL byte, which a command cannot be given; leave it out")
    return encoded


def _programs(name: bytes, environment: Mapping[bytes, bytes]) -> list[bytes]:
    """Where a shell would look for a program."""
    if b"/" in name or not name:
        return [name]
    path = environment.get(b"PATH", os.fsencode(os.defpath))
    return [(folder or b".") + b"/" + name for folder in path.split(b":")]


def _root(root: str | os.PathLike[str]) -> bytes:
    """The directory as the kernel names it, with a slash at its end."""
    _bytes_of(root, repr(root))
    try:
        resolved = Path(root).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{os.fspath(root)}: cannot be the root: {_cause(error)}; name a directory") from error
    if not resolved.is_dir():
        raise UsageError(f"{os.fspath(root)}: cannot be the root: it is no directory")
    return os.fsencode(resolved).rstrip(b"/") + b"/"


def _cause(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _check_kernel() -> None:
    release = os.uname().release
    version = re.match(r"(\d+)\.(\d+)", release)
    if version is not None and (int(version[1]), int(version[2])) < _OLDEST_KERNEL:
        raise EstargzError(f"recording needs Linux 5.9 or newer, and this is {release}; {_INSTEAD}")


def _not_started(stage: int, reason: int, name: str, cwd: str | os.PathLike[str] | None) -> EstargzError:
    cause = os.strerror(reason)
    if stage == _record.NO_PROGRAM:
        missing = reason == errno.ENOENT
        remedy = "check its name and PATH" if missing else "check its permissions and its first line"
        error = UsageError(f"{name}: cannot be executed: {cause}; {remedy}")
        error.exit_code = 127 if missing else 126
        return error
    if stage == _record.NO_FOLDER:
        return UsageError(f"{os.fspath(cwd or '')}: cannot be entered: {cause}; name a directory")
    if reason == errno.EBUSY:
        cause = "another supervisor, such as a recorder around this one, has a filter of this kind already"
    elif reason == errno.ENOSYS or stage == _record.NO_CONTINUE:
        cause = "the kernel has no such notifications for this architecture"
    elif reason in (errno.EPERM, errno.EACCES):
        cause = f"{cause}; the container's or service's own filter may forbid the seccomp call"
    return EstargzError(f"opens cannot be recorded: seccomp user notification: {cause}; {_INSTEAD}")
