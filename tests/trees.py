"""Makers of directory trees, and the two streams that a pair of trees gives: this package's and Go's."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import estargz

SECOND = 1_000_000_000
TIME = 1_600_000_000 * SECOND + 123_456_789  # with a fraction: equal times then mean equal files
WHOLE = 1_600_000_000 * SECOND  # without: content decides
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")  # net_bind_service, effective
OTHER_CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")


# ---------------------------------------------------------------------------------------------- streams


def our_tar(upper: Path, lower: Path | None = None, **options: Any) -> bytes:
    """The uncompressed layer that this package builds, without a landmark."""
    sink = io.BytesIO()
    estargz.build(upper, sink, lower=lower, compression="uncompressed", landmark=False, **options)
    return sink.getvalue()


def go_tar(peer: Path, upper: Path, lower: Path | None = None, *, epoch: int | None = None) -> bytes:
    """containerd's walking differ."""
    command: list[str | Path] = [peer, "diff"]
    command += ["-lower", lower] if lower is not None else []
    command += ["-epoch", str(epoch)] if epoch is not None else []
    return run([*command, upper, "-"])


def go_overlay_tar(peer: Path, upper: Path, lowers: Sequence[Path]) -> bytes:
    """BuildKit's overlay differ."""
    flags = [part for lower in lowers for part in ("-lower", lower)]
    return run([peer, "overlay-diff", *flags, upper, "-"])


def run(command: Sequence[str | Path]) -> bytes:
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def entries(tar: bytes) -> list[str]:
    """Names in order; a hard link shows what it links to."""
    with tarfile.open(fileobj=io.BytesIO(tar), encoding="utf-8", errors="surrogateescape") as archive:
        return [entry_text(info) for info in archive]


def entry_text(info: tarfile.TarInfo) -> str:
    if info.islnk():
        return f"{info.name} => {info.linkname}"
    return info.name + ("/" if info.isdir() else "")


def difference(ours: bytes, theirs: bytes) -> str:
    """What to print when the streams are not equal: the first byte, and the entries on both sides."""
    if ours == theirs:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return (
        f"first difference at byte {at} of {len(ours)} and {len(theirs)}\n"
        f"ours:   {ours[at - at % 512 :][:128]!r}\ntheirs: {theirs[at - at % 512 :][:128]!r}\n"
        f"ours:   {entries(ours)}\ntheirs: {entries(theirs)}"
    )


# ---------------------------------------------------------------------------------------------- trees


class Tree:
    """A directory that is filled with what a test needs; every path gets the same modification time unless told."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)

    def at(self, name: str) -> Path:
        """The path of a name, whose parents now exist."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def dir(self, name: str, mode: int = 0o755, **meta: Any) -> None:
        self.at(name).mkdir(exist_ok=True)
        self.meta(name, mode=mode, **meta)

    def file(self, name: str, data: bytes = b"data", mode: int = 0o644, **meta: Any) -> None:
        """Writes a file, in place if there is one."""
        self.at(name).write_bytes(data)
        self.meta(name, mode=mode, **meta)

    def symlink(self, name: str, target: str, **meta: Any) -> None:
        self.at(name).symlink_to(target)
        self.meta(name, **meta)

    def link(self, name: str, first: str) -> None:
        os.link(self.root / first, self.at(name), follow_symlinks=False)

    def fifo(self, name: str, **meta: Any) -> None:
        self.node(name, stat.S_IFIFO | 0o640, **meta)

    def socket(self, name: str, **meta: Any) -> None:
        self.node(name, stat.S_IFSOCK | 0o640, **meta)

    def char(self, name: str, major: int, minor: int, **meta: Any) -> None:
        self.node(name, stat.S_IFCHR | 0o640, major, minor, **meta)

    def block(self, name: str, major: int, minor: int, **meta: Any) -> None:
        self.node(name, stat.S_IFBLK | 0o640, major, minor, **meta)

    def whiteout(self, name: str) -> None:
        """What overlayfs leaves for a deleted name."""
        self.node(name, stat.S_IFCHR)

    def node(self, name: str, mode: int, major: int = 0, minor: int = 0, **meta: Any) -> None:
        os.mknod(self.at(name), mode, os.makedev(major, minor))
        self.meta(name, mode=stat.S_IMODE(mode), **meta)

    def remove(self, name: str) -> None:
        path = self.root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

    def meta(
        self,
        name: str,
        *,
        time: int = TIME,
        mode: int | None = None,
        owner: tuple[int, int] | None = None,
        capability: bytes | None = None,
        xattrs: dict[str, bytes] | None = None,
    ) -> None:
        path = self.root / name
        if owner is not None:
            os.chown(path, *owner, follow_symlinks=False)
        if mode is not None:
            path.chmod(mode)
        for key, value in {**({"security.capability": capability} if capability else {}), **(xattrs or {})}.items():
            os.setxattr(path, key, value, follow_symlinks=False)
        os.utime(path, ns=(time, time), follow_symlinks=False)


def deep_directory(root: Path, names: Sequence[str]) -> int:
    """Makes directories inside each other, however long the path becomes; a handle of the innermost one."""
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for name in names:
        os.mkdir(name, 0o755, dir_fd=handle)
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=handle)
        os.close(handle)
        handle = inner
    return handle


@contextlib.contextmanager
def overlay_mount(lowers: Sequence[Path], upper: Path, options: str = "") -> Iterator[Path]:
    """The merged view of an overlay while it is mounted."""
    work, merged = upper.with_name(f"{upper.name}.work"), upper.with_name(f"{upper.name}.merged")
    for place in (upper, work, merged):
        place.mkdir(exist_ok=True)
    layers = ":".join(map(str, lowers))
    settings = f"lowerdir={layers},upperdir={upper},workdir={work},index=off{options}"
    run(["mount", "-t", "overlay", "overlay", "-o", settings, merged])
    try:
        yield merged
    finally:
        run(["umount", merged])


# ---------------------------------------------------------------------------------------------- random trees

NAMES = ["a", "a-b", "a.b", "a\x01b", "ab", "b", "c", "é", "\udcff", "l" * 101, "m" * 200, ".wh.a", "x y", "z"]
TIMES = [TIME, WHOLE, WHOLE + SECOND, WHOLE + 1, -5 * SECOND, -5 * SECOND + 3]
PAYLOADS = [b"", b"one", b"two", b"three", bytes(513), b"x" * 700, b"y" * 700]
MODES = [0o644, 0o755, 0o4755, 0o2711, 0o1777, 0o600, 0]
OWNERS = [(0, 0), (1, 2), (3_000_000, 5)]


class RandomTree:
    """Changes a tree at random. The same seed makes the same tree and the same changes.

    ``meddle``: also make what only a handcrafted overlay has: whiteouts and opaque directories.
    """

    def __init__(self, root: Path, chance: random.Random, *, as_root: bool, meddle: bool = False) -> None:
        self.tree = Tree(root)
        self.chance = chance
        self.as_root = as_root
        self.meddle = meddle

    def paths(self, *, only: Callable[[int], bool] = lambda _: True) -> list[str]:
        found = []
        for folder, directories, files in os.walk(self.tree.root):
            directories.sort()
            for name in sorted([*directories, *files]):
                path = Path(folder, name)
                if only(path.lstat().st_mode):
                    found.append(str(path.relative_to(self.tree.root)))
        return sorted(found)

    def new_name(self) -> str:
        folders = ["", *self.paths(only=stat.S_ISDIR)]
        folder = self.chance.choice(folders)
        name = self.chance.choice(NAMES)
        return f"{folder}/{name}" if folder else name

    def random_mode(self) -> int:
        mode = self.chance.choice(MODES)
        return mode if self.as_root else mode | 0o600  # others cannot read what they may not

    def random_meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = {"time": self.chance.choice(TIMES)}
        if self.as_root and self.chance.random() < 0.3:
            meta["owner"] = self.chance.choice(OWNERS)
        if self.as_root and self.chance.random() < 0.15:
            meta["capability"] = self.chance.choice([CAPABILITY, OTHER_CAPABILITY])
        return meta

    def add(self) -> None:
        name = self.new_name()
        if os.path.lexists(self.tree.root / name):
            if self.chance.random() < 0.5:
                return
            self.tree.remove(name)
        kind = self.chance.choices(
            ["dir", "file", "symlink", "link", "fifo", "socket", "device", "whiteout"],
            [5, 8, 2, 5, 1, 1, 1 if self.as_root else 0, 3 if self.meddle else 0],
        )[0]
        meta = self.random_meta()
        if kind == "dir":
            self.tree.dir(name, mode=self.random_mode() | 0o700, **meta)
            if self.meddle and self.chance.random() < 0.4:
                os.setxattr(self.tree.root / name, "trusted.overlay.opaque", b"y")
        elif kind == "file":
            self.tree.file(name, self.chance.choice(PAYLOADS), mode=self.random_mode(), **meta)
        elif kind == "symlink":
            self.tree.symlink(name, self.chance.choice(["to", "so", "t" * 101, "é"]), **meta)
        elif kind == "link":
            self.link_at(name)
        elif kind == "whiteout":
            self.tree.whiteout(name)
        elif kind == "device":
            self.tree.char(name, 1, self.chance.choice([3, 5]), **meta)
        else:
            self.tree.node(name, (stat.S_IFIFO if kind == "fifo" else stat.S_IFSOCK) | 0o640, **meta)

    def link_at(self, name: str) -> None:
        others = self.paths(only=lambda mode: not stat.S_ISDIR(mode))
        others = [other for other in others if not is_whiteout(self.tree.root / other)]
        if others:
            self.tree.link(name, self.chance.choice(others))

    def link(self) -> None:
        name = self.new_name()
        if not os.path.lexists(self.tree.root / name):
            self.link_at(name)

    def change(self) -> None:
        names = self.paths()
        if not names:
            return
        name = self.chance.choice(names)
        path = self.tree.root / name
        mode = path.lstat().st_mode
        if is_whiteout(path):
            return
        how = self.chance.choice(["content", "content", "meta", "mode", "touch"])
        if how == "content" and stat.S_ISREG(mode):
            self.tree.file(name, self.chance.choice(PAYLOADS), stat.S_IMODE(mode), time=path.lstat().st_mtime_ns)
        elif how == "mode" and not stat.S_ISLNK(mode):
            kept = path.lstat().st_mtime_ns
            self.tree.meta(name, mode=self.random_mode() | (0o700 if stat.S_ISDIR(mode) else 0), time=kept)
        elif how == "meta":
            self.tree.meta(name, **self.random_meta())
        else:
            self.tree.meta(name, time=self.chance.choice(TIMES))

    def remove(self) -> None:
        names = self.paths()
        if names:
            self.tree.remove(self.chance.choice(names))

    def move(self) -> None:
        """Renames something that is no directory: overlayfs copies those only on demand."""
        names = self.paths(only=lambda mode: not stat.S_ISDIR(mode))
        target = self.new_name()
        if names and not (self.tree.root / target).is_dir():
            (self.tree.root / self.chance.choice(names)).rename(self.tree.root / target)

    def replace(self) -> None:
        """Takes a directory away and makes it anew, which overlayfs marks as opaque."""
        names = self.paths(only=stat.S_ISDIR)
        if names:
            name = self.chance.choice(names)
            self.tree.remove(name)
            self.tree.dir(name, **self.random_meta())
            for child in self.chance.sample(NAMES, self.chance.randrange(4)):
                self.tree.file(f"{name}/{child}", self.chance.choice(PAYLOADS), **self.random_meta())

    def grow(self, count: int) -> None:
        for _ in range(count):
            self.add()

    def disturb(self, count: int) -> None:
        steps = [self.add, self.change, self.change, self.link, self.link, self.remove, self.move, self.replace]
        for _ in range(count):
            self.chance.choice(steps)()


def is_whiteout(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0
