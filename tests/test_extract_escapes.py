"""Layers that try to get out of the directory, and people who meddle meanwhile: nothing outside ever changes."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from applied import END, hardlink, item, snapshot, symlink, tar
from conftest import IS_ROOT, missing
from reference.tar_headers import meta, plain_header, seal

from estargz import EstargzError, SinkError, TarError, extract

pytestmark = pytest.mark.timeout(60)


class Place(NamedTuple):
    """out: to extract to. outside: what nobody may touch, in the same directory."""

    out: Path
    outside: Path


@pytest.fixture
def place(scratch: Path) -> Iterator[Place]:
    outside = scratch / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "folder" / "inner").write_text("secret")
    (outside / "file").write_text("secret")
    (outside / "link").symlink_to("file")
    if IS_ROOT:
        os.setxattr(outside / "file", "user.mark", b"mine")
    for path in (*outside.rglob("*"), outside):
        os.utime(path, ns=(1, 987_654_321), follow_symlinks=False)
    os.chmod(outside / "file", 0o600)
    before = snapshot(outside)
    names = sorted(os.listdir(scratch))
    yield Place(scratch / "out", outside)
    assert snapshot(outside) == before
    assert set(os.listdir(scratch)) <= {*names, "out"}


class Case(NamedTuple):
    """layers: made with the path of what is outside. found: files and links then in the directory, {outside} being that
    path without its first slash; or the error."""

    name: str
    layers: Callable[[str], list[bytes]]
    found: list[str]
    error: tuple[type[EstargzError], str] | None = None


CASES = [
    Case("absolute name", lambda o: [tar(item(f"{o}/file", b"evil"))], ["{outside}/file"]),
    Case("dots in front", lambda o: [tar(item(f"../../../../../../../..{o}/file", b"evil"))], ["{outside}/file"]),
    Case("dots within", lambda o: [tar(item("a/../../outside/file", b"evil"))], ["outside/file"]),
    Case("a directory of dots", lambda o: [tar(item("../", mode=0o777), item("x/../../", mode=0o777))], []),
    Case("empty and single dots", lambda o: [tar(item(".//a/.//./b//c", b"x"), item("./a/b/d"))], ["a/b/c", "a/b/d"]),
    Case("slash behind a file", lambda o: [tar(plain_header(b"a/", type=b"0"))], ["a"]),
    Case(
        "absolute link as a parent",
        lambda o: [tar(symlink("link", o), item("link/file", b"evil"))],
        ["link", "{outside}/file"],
    ),
    Case(
        "relative link as a parent",
        lambda o: [tar(symlink("link", "../../outside"), item("link/file", b"evil"))],
        ["link", "outside/file"],
    ),
    Case(
        "link below, up and out",
        lambda o: [tar(item("a/b/"), symlink("a/b/link", "../../../outside"), item("a/b/link/file", b"evil"))],
        ["a/b/link", "outside/file"],
    ),
    Case(
        "link to a link",
        lambda o: [tar(symlink("one", o), symlink("two", "one"), item("two/folder/inner", b"evil"))],
        ["one", "two", "{outside}/folder/inner"],
    ),
    Case(
        "links across layers",
        lambda o: [tar(symlink("a", "b")), tar(symlink("b", o)), tar(item("a/file", b"evil"))],
        ["a", "b", "{outside}/file"],
    ),
    Case(
        "link with a slash behind",
        lambda o: [tar(symlink("link/", o), item("link//file", b"evil"))],
        ["link", "{outside}/file"],
    ),
    Case(
        "link to the directory above",
        lambda o: [tar(symlink("up", ".."), symlink("up/up", "../.."), item("up/up/outside/file", b"evil"))],
        ["outside/file", "up"],
    ),
    Case("link named as the root", lambda o: [tar(symlink(".", o), item("file", b"evil"))], [], (TarError, "the root")),
    Case("link named as above", lambda o: [tar(symlink("..", o), item("file", b"evil"))], [], (TarError, "the root")),
    Case("link named as a way back", lambda o: [tar(symlink("a/..", o))], [], (TarError, "the root")),
    Case("link of no name", lambda o: [tar(symlink("", o))], [], (TarError, "the root")),
    Case("file of no name", lambda o: [tar(item("/", kind="fifo"))], [], (TarError, "the root")),
    Case(
        "loop of links",
        lambda o: [tar(symlink("a", "b"), symlink("b", "a"), item("a/file"))],
        ["a", "b"],
        (SinkError, "a/file: the directory .*Too many levels of symbolic links"),
    ),
    Case(
        "loop of a link with itself",
        lambda o: [tar(symlink("a", "x/a"), symlink("x", "."), item("a/file"))],
        ["a", "x"],
        (SinkError, "Too many levels of symbolic links"),
    ),
    Case(
        "forty links",
        lambda o: [tar(item("0/"), *(symlink(f"{i + 1}", f"{i}") for i in range(40)), item("40/file"))],
        ["0/file", *(f"{i + 1}" for i in range(40))],
    ),
    Case(
        "one link more",
        lambda o: [tar(item("0/"), *(symlink(f"{i + 1}", f"{i}") for i in range(41)), item("41/file"))],
        [*(f"{i + 1}" for i in range(41))],
        (SinkError, "Too many levels of symbolic links"),
    ),
    Case(
        "hard link to a file outside",
        lambda o: [tar(hardlink("x", f"{o}/file"), item("x", b"evil"))],
        [],
        (TarError, "target is not there"),
    ),
    Case(
        "hard link up and out",
        lambda o: [tar(hardlink("x", "../outside/file"), item("x", b"evil"))],
        [],
        (TarError, "target is not there"),
    ),
    Case(
        "hard link through a link",
        lambda o: [tar(symlink("link", o), hardlink("x", "link/file"), item("x", b"evil"))],
        ["link"],
        (TarError, "target is not there"),
    ),
    Case(
        "hard link through a link to what is inside",
        lambda o: [tar(symlink("link", o), item(f"{o}/file", b"mine"), hardlink("x", "link/file"))],
        ["link", "x", "{outside}/file"],
    ),
    Case(
        "hard link to a link, then written to",
        lambda o: [tar(symlink("s", f"{o}/file"), hardlink("h", "s"), item("h", b"evil"), item("s", b"evil"))],
        ["h", "s"],
    ),
    Case(
        "hard link to a link, then entered",
        lambda o: [tar(symlink("s", o), hardlink("h", "s"), item("h/file", b"evil"))],
        ["h", "s", "{outside}/file"],
    ),
    Case(
        "hard link named as a link to a directory",
        lambda o: [tar(item("a", b"x"), symlink("s", f"{o}/folder"), hardlink("s/inner", "a"))],
        ["a", "s", "{outside}/folder/inner"],
    ),
    Case("file over a link", lambda o: [tar(symlink("s", f"{o}/file"), item("s", b"evil"))], ["s"]),
    Case(
        "large file over a link",
        lambda o: [tar(symlink("s", f"{o}/file"), item("s", b"evil" * 1_000_000))],
        ["s"],
    ),
    Case("fifo over a link", lambda o: [tar(symlink("s", f"{o}/file"), item("s", kind="fifo"))], ["s"]),
    Case("file over a fifo", lambda o: [tar(item("s", kind="fifo"), item("s", b"x"))], ["s"]),
    Case(
        "directory over a link",
        lambda o: [tar(symlink("s", o), item("s/", mode=0o777, mtime_s=5), item("s/file", b"evil"))],
        ["s/file"],
    ),
    Case(
        "directory over a link of a lower layer",
        lambda o: [tar(symlink("s", f"{o}/folder")), tar(item("s/", mode=0o777), item("s/inner", b"evil"))],
        ["s/inner"],
    ),
    Case(
        "link over a directory whose metadata waits",
        lambda o: [tar(item("d/", mode=0o777, mtime_s=7), item("d/a"), symlink("d", o), item("d/file", b"evil"))],
        ["d", "{outside}/file"],
    ),
    Case(
        "link over a directory, by a whiteout",
        lambda o: [
            tar(item("d/e/", mode=0o777, mtime_s=7)),
            tar(item(".wh.d"), symlink("d", f"{o}"), item("d/folder/", mode=0o777, mtime_s=7)),
        ],
        ["d"],
    ),
    Case(
        "metadata of a link",
        lambda o: [
            tar(
                symlink("s", f"{o}/file", uid=5, gid=5, mode=0o777, mtime_s=5, xattrs={b"user.mark": b"evil"}),
                symlink("t", o, mode=0o777, mtime_s=5),
            )
        ],
        ["s", "t"],
    ),
    Case("whiteout through a link", lambda o: [tar(symlink("s", o)), tar(item("s/.wh.file"))], ["s"]),
    Case("whiteout of a directory through a link", lambda o: [tar(symlink("s", o)), tar(item("s/.wh.folder"))], ["s"]),
    Case("opaque through a link", lambda o: [tar(symlink("s", o)), tar(item("s/.wh..wh..opq"))], ["s"]),
    Case("whiteout of a link", lambda o: [tar(symlink("s", o)), tar(item(".wh.s"))], []),
    Case(
        "whiteout up and out",
        lambda o: [tar(item("a")), tar(item("../outside/.wh.file"), item(f"{o}/.wh.file"))],
        ["a"],
    ),
    Case("whiteout of above", lambda o: [tar(item("d/a")), tar(item("d/.wh..."))], ["d/a"], (TarError, "of no file")),
    Case("whiteout of itself", lambda o: [tar(item("d/a")), tar(item("d/.wh.."))], ["d/a"], (TarError, "of no file")),
    Case("whiteout of the root", lambda o: [tar(item("d/a")), tar(item(".wh.."))], ["d/a"], (TarError, "of no file")),
    Case("whiteout of nothing", lambda o: [tar(item("d/a")), tar(item("d/.wh./"))], ["d/a"], (TarError, "of no file")),
    Case(
        "whiteout of a tree with links",
        lambda o: [tar(symlink("d/s", o), symlink("d/e/t", "../../../outside/folder")), tar(item(".wh.d"))],
        [],
    ),
    Case(
        "opaque directory with links",
        lambda o: [tar(symlink("d/s", o), item("d/e/f"), symlink("d/e/t", f"{o}/folder")), tar(item("d/.wh..wh..opq"))],
        [],
    ),
    Case(
        "file over a tree with links",
        lambda o: [tar(symlink("d/s", o), symlink("d/e/t", f"{o}/folder"), item("d", b"x"))],
        ["d"],
    ),
    Case(
        "below a file",
        lambda o: [tar(item("a", b"x"), item("a/b", b"y"))],
        ["a"],
        (SinkError, "a/b: the directory it belongs in cannot be reached .*Not a directory"),
    ),
    Case(
        "link to a target too long",
        lambda o: [tar(symlink("s", "x/" * 3000))],
        [],
        (SinkError, "s: cannot be created .*too long"),
    ),
    Case("NUL in a long name", lambda o: [meta(b"a\0/../../evil", b"L") + plain_header(b"x") + END], ["a"]),
    Case(
        "NUL in a PAX name",
        lambda o: [meta(b"13 path=a\0b\n\n"[:12].replace(b"13", b"12"), b"x") + plain_header(b"x") + END],
        [],
        (TarError, "PAX"),
    ),
]


def files_in(folder: Path) -> list[str]:
    """What is no directory."""
    return sorted(os.fsdecode(name) for name, entry in snapshot(folder).items() if name and entry.kind != stat.S_IFDIR)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layer_stays_inside(place: Place, case: Case, threads: int) -> None:
    place.out.mkdir()
    layers = case.layers(str(place.outside))
    if case.error is None:
        extract(layers, place.out, threads=threads)
    else:
        with pytest.raises(case.error[0], match=case.error[1]):
            extract(layers, place.out, threads=threads)
    wanted = sorted(name.format(outside=str(place.outside)[1:]) for name in case.found)
    found = files_in(place.out)
    assert found == wanted
    for name in found:
        assert (
            "secret" not in (place.out / name).read_text() if stat.S_ISREG((place.out / name).lstat().st_mode) else True
        )


def test_a_way_beyond_path_max(place: Place) -> None:
    """Who resolves it as one string gives up in the middle, and believes that the rest is harmless."""
    long = ["d" * 247 + letter for letter in "abcdefghijklmnop"]
    items, folder = [], ""
    for number, name in enumerate(long):
        items += [item(f"{folder}{name}/"), symlink(f"{folder}{number:x}", name)]
        folder += f"{name}/"
    short = "/".join(f"{number:x}" for number in range(len(long)))
    items.append(symlink(f"{short}/{'l' * 254}", "../" * len(long)))
    items.append(symlink("escape", f"{short}/{'l' * 254}/../../..{place.outside}"))
    items.append(item("escape/file", b"evil"))
    extract(tar(*items), place.out)
    assert (place.out / str(place.outside)[1:] / "file").read_text() == "evil"


@pytest.mark.parametrize("target", ["{o}", "../outside", "inner/../../outside"])
def test_links_that_were_there_before(place: Place, target: str) -> None:
    (place.out / "inner").mkdir(parents=True)
    (place.out / "s").symlink_to(target.format(o=place.outside))
    extract(tar(item("s/file", b"evil"), item("s/.wh.folder"), item("s/.wh..wh..opq")), place.out)
    assert files_in(place.out) in (["s", f"{str(place.outside)[1:]}/file"], ["outside/file", "s"])


def test_the_directory_itself_may_be_a_link(place: Place) -> None:
    real = place.out.with_name("out")
    (real / "real").mkdir(parents=True)
    (real / "link").symlink_to("real")
    extract(tar(item("../file", b"1"), symlink("s", "/"), item("s/t", b"2")), real / "link")
    assert files_in(real) == ["link", "real/file", "real/s", "real/t"]


def test_devices_are_never_opened(root: None, place: Place) -> None:
    """A node, then a file of its name: the device would take the bytes."""
    terminal = item("tty", kind="char", dev_major=5, dev_minor=0)
    disk = item("disk", kind="block", dev_major=8, dev_minor=0)
    extract(tar(terminal, disk, item("tty", b"x"), item("disk", b"y" * 3_000_000)), place.out)
    assert all(stat.S_ISREG(path.lstat().st_mode) for path in place.out.iterdir())


@pytest.mark.parametrize("seed", range(4))
def test_damaged_headers(place: Place, seed: int) -> None:
    """Whatever they say: all is placed inside, or nothing is left."""
    chance = random.Random(seed)
    items = [item("d/"), item("d/a", b"x" * 700), symlink("s", "d"), item("s/b", b"1", xattrs={b"user.x": b"1"})]
    items += [
        hardlink("h", "d/a"),
        item("l" * 150, b"2"),
        item(".wh.x"),
        item("d/.wh..wh..opq"),
        item("f", kind="fifo"),
    ]
    whole = tar(*items)
    outcomes = set()
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(damaged))
            damaged[at] = chance.choice([*b"\0./012\xff", chance.randrange(256)])
            header = slice(at // 512 * 512, at // 512 * 512 + 512)
            if damaged[header][257:262] == b"ustar":
                damaged[header] = seal(bytes(damaged[header]))
        try:
            extract([whole, bytes(damaged)], place.out, threads=chance.choice([1, 2]))
            outcomes.add("done")
            shutil.rmtree(place.out)
        except EstargzError:
            outcomes.add("refused")
        assert not place.out.exists()
    assert outcomes == {"done", "refused"}


# ---------------------------------------------------------------------------------------- meddlers


@contextmanager
def meddling(step: Callable[[], None]) -> Iterator[list[int]]:
    """Calls step over and over until the end; how often, in the list."""
    done = threading.Event()
    count = [0]

    def loop() -> None:
        while not done.is_set():
            try:
                step()
            except OSError:
                continue
            count[0] += 1

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield count
    finally:
        done.set()
        thread.join()


def swapper(folder: Path, target: Path) -> Callable[[], None]:
    """A directory, then a link in its place, then the directory again."""

    def step() -> None:
        if folder.is_symlink():
            folder.unlink()
            folder.with_name("moved").rename(folder)
        elif folder.with_name("moved").exists() and not folder.exists():
            folder.with_name("moved").rename(folder)
        else:
            folder.rename(folder.with_name("moved"))
            folder.symlink_to(target)

    return step


@pytest.mark.parametrize("where", ["d", "d/e", "d/e/f"])
def test_a_directory_is_swapped_for_a_link(place: Place, where: str) -> None:
    """Whoever follows a path by its name writes outside, at some moment; a handle does not."""
    items = [item(f"d/e/f/g{i % 50}/file", b"evil", mode=0o777) for i in range(500)]
    items += [item(f"d/e/f/g{i}/", mode=0o777, mtime_s=9) for i in range(50)]
    items += [item("d/e/folder/inner", b"evil"), item("d/file", b"evil"), item("d/e/file"), item("d/e/f/file")]
    (place.out / where).mkdir(parents=True)
    outcomes = set()
    with meddling(swapper(place.out / where, place.outside)) as swaps:
        for round_ in range(200):
            try:
                extract(tar(*items), place.out, threads=2)
                outcomes.add("done")
            except EstargzError as error:
                assert isinstance(error, (SinkError, TarError))
                outcomes.add("refused")
            if swaps[0] > 100 and round_ > 2:
                break
    assert swaps[0] > 20
    assert outcomes


def test_a_directory_is_moved_away_while_it_is_removed(place: Place, tmp_path: Path) -> None:
    """Going back up through "..", one would be somewhere else, and go on removing there."""
    deep = "/".join(["d"] * 120)
    wide = "/".join(["d"] * 100)
    layer = tar(item(f"{deep}/file"), *(item(f"{wide}/e{i}/file") for i in range(400)))
    middle = place.out / "/".join(["d"] * 60)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "precious").write_text("secret")  # where ".." of what was moved leads to, by the next one's name

    def move() -> None:
        if not (place.out / deep).exists():  # the way down is over
            middle.rename(tmp_path / "moved")

    for _ in range(40):
        extract(layer, place.out)
        with meddling(move):
            try:
                extract(tar(item("d", b"a file")), place.out)
                message = ""
            except SinkError as error:
                message = str(error)
        assert (tmp_path / "d" / "precious").exists()
        extract(tar(item(".wh.d")), place.out)
        extract(tar(item(".wh.moved")), tmp_path)
        if "d: what stands there cannot be removed (at byte 0): Stale file handle" in message:
            return
    pytest.fail("nothing was ever moved at the right moment")


# ---------------------------------------------------------------------------------------- old kernels


NUMBER = {"x86_64": 437, "aarch64": 437}.get(os.uname().machine)

WITHOUT_OPENAT2 = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
error, number = int(sys.argv.pop(1)), 437
# load the call's number; if it is openat2, fail with the error; else allow
code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | error), (0x06, 0, 0, 0x7FFF0000)]
filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *part) for part in code))
program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    sys.exit(f"no filter: {os.strerror(ctypes.get_errno())}")
assert libc.syscall(number, -1, b"x", b"\\0" * 24, 24) == -1 and ctypes.get_errno() == error
from estargz.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("error", [38, 1], ids=["ENOSYS", "EPERM"])
def test_without_openat2(place: Place, error: int) -> None:
    """A hundred directories deep with few handles, so that they have to be found again; and links on the way."""
    if NUMBER is None:
        missing("the kernel's call numbers are not known for this CPU")
    deep = "/".join(f"d{i}" for i in range(100))
    items = [item(f"{deep}/a{i}/b{i}/file", b"%d" % i) for i in range(60)]
    items += [item(f"e{i}/file", b"%d" % i) for i in range(60)]
    items += [item(f"{deep}/a{i}/b{i}/other", b"%d" % i) for i in range(60)]
    items += [symlink("link", f"../../{deep}"), symlink("out", str(place.outside))]
    items += [item("link/a5/through", b"5"), item("out/file", b"evil"), item("out/.wh.folder")]
    layer = place.out.parent / "out"
    layer.mkdir()
    (layer / "layer").write_bytes(tar(*items))
    command = ["prlimit", "--nofile=64", sys.executable, "-c", WITHOUT_OPENAT2, str(error), "extract"]
    done = subprocess.run([*command, layer / "layer", layer / "old"], capture_output=True, text=True, check=False)
    if "no filter" in done.stderr:
        pytest.skip(f"the kernel has no filters for calls: {done.stderr}")
    assert done.returncode == 0, done.stderr
    extract(tar(*items), layer / "new")
    assert snapshot(layer / "old") == snapshot(layer / "new")
    assert (layer / "old" / deep / "a5" / "through").read_text() == "5"
