"""Pairs of trees, one per thing that a differ can get wrong, with the entries that the changeset must hold."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from trees import CAPABILITY, OTHER_CAPABILITY, SECOND, TIME, WHOLE, Tree

Make = Callable[[Tree, Tree], None]


@dataclass(frozen=True, slots=True)
class Pair:
    """``make`` fills the lower and the upper tree; ``entries``: the changeset as trees.entries shows it."""

    make: Make
    entries: tuple[str, ...] | None
    needs_root: bool


PAIRS: dict[str, Pair] = {}


def pair(*entries: str, listed: bool = True, root: bool = False) -> Callable[[Make], Make]:
    """Registers a pair under its function's name. ``listed=False``: the entries are too many to write down."""

    def register(make: Make) -> Make:
        PAIRS[make.__name__] = Pair(make, entries if listed else None, root)
        return make

    return register


# ---------------------------------------------------------------------------------------------- the plain changes


@pair()
def both_empty(lower: Tree, upper: Tree) -> None:
    pass


@pair(".wh.d", ".wh.f")
def upper_empty(lower: Tree, upper: Tree) -> None:
    lower.file("d/x")
    lower.file("f")


@pair("d/", "d/x", "f")
def lower_empty(lower: Tree, upper: Tree) -> None:
    upper.file("d/x")
    upper.file("f")


@pair()
def identical(lower: Tree, upper: Tree) -> None:
    for tree in (lower, upper):
        tree.file("d/x")
        tree.symlink("s", "d/x")
        tree.fifo("p")
        tree.link("linked", "d/x")


@pair("d/", "d/added", "d/changed", "d/.wh.deleted")
def adds_changes_deletes(lower: Tree, upper: Tree) -> None:
    for tree in (lower, upper):
        tree.file("d/kept")
    lower.file("d/deleted")
    lower.file("d/changed", b"old")
    upper.file("d/changed", b"longer")
    upper.file("d/added")


@pair("a/", "a/b/", "a/b/c/", "a/b/c/x", "a/b/c/z/", "a/b/c/z/.wh.gone")
def unmodified_parents_of_changes(lower: Tree, upper: Tree) -> None:
    for tree in (lower, upper):
        tree.file("a/b/c/x", b"old!")
        tree.file("a/b/c/z/kept")
        tree.file("a/b/other/kept")
    lower.file("a/b/c/z/gone")
    upper.file("a/b/c/x", b"different")


@pair("d/")
def only_the_mode_of_a_directory(lower: Tree, upper: Tree) -> None:
    lower.dir("d", 0o755)
    upper.dir("d", 0o700)
    for tree in (lower, upper):
        tree.file("d/x")


@pair()
def only_the_time_of_a_directory(lower: Tree, upper: Tree) -> None:
    lower.dir("d", time=TIME)
    upper.dir("d", time=TIME + 7 * SECOND)


@pair("d/", "d/inner/", "d/inner/new", "e")
def changed_directory_comes_before_what_is_in_it(lower: Tree, upper: Tree) -> None:
    for tree in (lower, upper):
        tree.file("d/inner/kept")
    upper.file("d/inner/new")
    upper.dir("d", 0o711)
    upper.file("e")


@pair(listed=False)
def special_bits(lower: Tree, upper: Tree) -> None:
    for name, mode in (("sgid", 0o2755), ("sticky", 0o1777)):
        lower.dir(name, 0o755)
        upper.dir(name, mode)
    lower.file("suid", mode=0o755)
    upper.file("suid", mode=0o4755)
    upper.file("none", b"", mode=0)  # never opened


@pair(listed=False, root=True)
def owners(lower: Tree, upper: Tree) -> None:
    for name, owner in (("gid", (0, 7)), ("largest", (2**32 - 2, 2**32 - 2)), ("limit", (2_097_151, 2_097_152))):
        lower.file(name)
        upper.file(name, owner=owner)
    upper.dir("d", owner=(3_000_000, 4_000_000))
    upper.symlink("s", "target", owner=(3_000_000, 1))


# ---------------------------------------------------------------------------------------------- one kind for another


@pair("d", "dir.x", "e")
def directory_becomes_file(lower: Tree, upper: Tree) -> None:
    lower.file("d/inner/x")
    lower.file("d/y")
    for tree, data in ((lower, b"old"), (upper, b"changed")):
        tree.file("dir.x", data)
    upper.file("d")
    upper.file("e")


@pair("d/", "d/inner/", "d/inner/x")
def file_becomes_directory(lower: Tree, upper: Tree) -> None:
    lower.file("d")
    upper.file("d/inner/x")


@pair("d", ".wh.d-", "d.x", ".wh.d0")
def directory_becomes_file_among_names_that_begin_alike(lower: Tree, upper: Tree) -> None:
    for name in ("d/x", "d-", "d0/y"):
        lower.file(name)
    upper.file("d")
    upper.file("d.x")


@pair("d")
def directory_becomes_symlink(lower: Tree, upper: Tree) -> None:
    lower.file("d/x")
    lower.file("other/x")
    upper.file("other/x")
    upper.symlink("d", "other")


@pair("d/", "d/x")
def symlink_becomes_directory(lower: Tree, upper: Tree) -> None:
    lower.file("other/x")
    upper.file("other/x")
    lower.symlink("d", "other")
    upper.file("d/x")


@pair("f", "p", "s")
def file_symlink_and_fifo_trade_places(lower: Tree, upper: Tree) -> None:
    lower.file("f")
    lower.symlink("s", "f")
    lower.fifo("p")
    upper.symlink("f", "p")
    upper.fifo("s")
    upper.file("p")


@pair(".wh.d", "d.x", ".wh.d0")
def deleted_directory_among_names_that_begin_alike(lower: Tree, upper: Tree) -> None:
    for name in ("d/x", "d/d/x", "d0/x"):
        lower.file(name)
    upper.file("d.x")


# ---------------------------------------------------------------------------------------------- links and specials


@pair("newer", "target")
def symlink_targets(lower: Tree, upper: Tree) -> None:
    for name, old, new, time in (
        ("newer", "same", "same", TIME),
        ("same", "other", "xxxxx", TIME),
        ("target", "other", "xxxxx", WHOLE),
        ("whole", "same", "same", WHOLE),
    ):
        lower.symlink(name, old, time=time)
        upper.symlink(name, new, time=time + SECOND * (name == "newer"))


@pair("dangling", "exact", "long", "long-é", "up")
def odd_symlink_targets(lower: Tree, upper: Tree) -> None:
    upper.symlink("dangling", "no such thing\n")
    upper.symlink("exact", "e" * 100)
    upper.symlink("long", "l/" * 300 + "x")
    upper.symlink("long-é", "é" * 60)
    upper.symlink("up", "../../../etc/passwd")


@pair("p")
def fifos(lower: Tree, upper: Tree) -> None:
    for tree in (lower, upper):
        tree.fifo("same")
        tree.fifo("whole", time=WHOLE)
    upper.fifo("p")


@pair("d/", "d/x", ".wh.gone")
def sockets(lower: Tree, upper: Tree) -> None:
    """A socket is never in a layer, not even as the whiteout of what it replaced."""
    for name in ("replaced", "d/replaced"):
        lower.file(name)
        upper.socket(name)
    lower.socket("gone")
    upper.socket("added")
    upper.socket("only/added")
    lower.dir("only")
    lower.socket("d/x")
    upper.file("d/x")


@pair("d/")
def sockets_alone_in_a_new_directory(lower: Tree, upper: Tree) -> None:
    upper.socket("d/added")


@pair("block", "char", "file", "high", "number", root=True)
def devices(lower: Tree, upper: Tree) -> None:
    for tree in (lower, upper):
        tree.char("same", 1, 3)
        tree.block("whole", 7, 1, time=WHOLE)
    lower.char("number", 1, 3)
    upper.char("number", 1, 5)
    upper.char("char", 5, 1)
    upper.block("block", 8, 17)
    upper.char("high", 4000, 1_000_000)
    lower.block("file", 8, 1)
    upper.file("file")


@pair("zero", root=True)
def char_device_zero(lower: Tree, upper: Tree) -> None:
    """A whiteout of an overlay means nothing to the walking differ."""
    upper.whiteout("zero")


# ---------------------------------------------------------------------------------------------- hard links


@pair("a", "b => a", "c", "d/", "d/x => a")
def links_within_added(lower: Tree, upper: Tree) -> None:
    upper.file("a")
    upper.link("b", "a")
    upper.file("c")
    upper.link("d/x", "a")


def changed_inode(lower: Tree, upper: Tree, *names: str) -> None:
    """Names of one unmodified file in both trees."""
    for tree in (lower, upper):
        tree.file(names[0])
        for name in names[1:]:
            tree.link(name, names[0])


@pair("z", "a => z")
def unmodified_name_before_the_new_one(lower: Tree, upper: Tree) -> None:
    changed_inode(lower, upper, "a")
    upper.link("z", "a")


@pair("a", "z => a")
def unmodified_name_after_the_new_one(lower: Tree, upper: Tree) -> None:
    changed_inode(lower, upper, "z")
    upper.link("a", "z")


@pair("m", "a => m", "b => m", "c => m", "d => m", "x => m", "y => m")
def many_names_wait(lower: Tree, upper: Tree) -> None:
    changed_inode(lower, upper, "a", "b", "c", "d", "x", "y")
    upper.link("m", "a")


@pair("m/", "m/new", "a/", "a/b/", "a/b/x => m/new", "c/", "c/y => m/new", "m/z => m/new", "n/", "n/w => m/new")
def waiting_names_bring_parents_that_were_passed(lower: Tree, upper: Tree) -> None:
    changed_inode(lower, upper, "a/b/x", "c/y", "m/z", "n/w")
    upper.link("m/new", "c/y")


@pair("b", "a => b", "c", "d")
def link_is_broken_up(lower: Tree, upper: Tree) -> None:
    """One of four names gets an inode of its own; two new names share another."""
    changed_inode(lower, upper, "a", "x")
    upper.link("b", "a")
    upper.remove("x")
    upper.file("c")
    upper.file("d")
    lower.remove("x")


@pair("a", "b => a")
def links_of_a_changed_file(lower: Tree, upper: Tree) -> None:
    changed_inode(lower, upper, "a", "b")
    upper.file("a", b"changed!")


@pair("m", "a => m", "p", "b => p", "s", "c => s")
def links_of_fifos_and_symlinks(lower: Tree, upper: Tree) -> None:
    for tree in (lower, upper):
        tree.fifo("b")
        tree.symlink("c", "t" * 120)
        tree.file("a")
    upper.link("m", "a")
    upper.link("p", "b")
    upper.link("s", "c")


@pair("a", "b => a", "c", "d => c", "x", "w => x", root=True)
def links_of_devices(lower: Tree, upper: Tree) -> None:
    upper.char("a", 1, 3)
    upper.link("b", "a")
    upper.block("c", 7, 9)
    upper.link("d", "c")
    for tree in (lower, upper):
        tree.char("w", 5, 5)
    upper.link("x", "w")


@pair()
def links_of_sockets(lower: Tree, upper: Tree) -> None:
    upper.socket("a")
    upper.link("b", "a")


@pair(".wh.b")
def deleted_link(lower: Tree, upper: Tree) -> None:
    changed_inode(lower, upper, "a", "b", "c")
    upper.remove("b")


@pair("l", "a => l", "m => l", root=True)
def links_with_capability(lower: Tree, upper: Tree) -> None:
    changed_inode(lower, upper, "a")
    for tree in (lower, upper):
        tree.meta("a", capability=CAPABILITY)
    upper.link("m", "a")
    upper.link("l", "a")


@pair("n" * 120, f"{'a' * 130} => {'n' * 120}", f"é => {'n' * 120}")
def links_with_long_names(lower: Tree, upper: Tree) -> None:
    changed_inode(lower, upper, "a" * 130)
    upper.link("n" * 120, "a" * 130)
    upper.link("é", "a" * 130)


@pair()
def trees_that_share_their_inodes(lower: Tree, upper: Tree) -> None:
    """The same inode on both sides is the same file, and has other names, too."""
    for name in ("a", "d/b"):
        lower.file(name)
        os.link(lower.root / name, upper.at(name))


# ---------------------------------------------------------------------------------------------- capabilities


@pair("added", "changed", "d/", "dropped", "new", root=True)
def capabilities(lower: Tree, upper: Tree) -> None:
    for name, old, new in (
        ("added", None, CAPABILITY),
        ("changed", CAPABILITY, OTHER_CAPABILITY),
        ("dropped", CAPABILITY, None),
        ("same", CAPABILITY, CAPABILITY),
    ):
        lower.file(name, capability=old)
        upper.file(name, capability=new)
    lower.dir("d")
    upper.dir("d", capability=CAPABILITY)
    upper.file("new", b"payload", capability=CAPABILITY)


@pair("d/", "d/x", "s", root=True)
def capabilities_of_parents_and_symlinks(lower: Tree, upper: Tree) -> None:
    for tree in (lower, upper):
        tree.dir("d", capability=CAPABILITY)
    upper.file("d/x", capability=OTHER_CAPABILITY)
    upper.symlink("s", "d", capability=CAPABILITY)


@pair("f")
def other_attributes_are_dropped(lower: Tree, upper: Tree) -> None:
    for tree in (lower, upper):
        tree.file("same")
        tree.file("f")
    upper.meta("same", xattrs={"user.comment": b"new"})
    upper.file("f", b"new content", xattrs={"user.comment": b"new"})


# ---------------------------------------------------------------------------------------------- names


@pair("ord/", "ord/z", ".wh.ord-a", "ord.b")
def names_around_the_slash(lower: Tree, upper: Tree) -> None:
    for name in ("ord/z", "ord-a", "ord.b"):
        lower.file(name, b"old")
    for name in ("ord/z", "ord.b"):
        upper.file(name, b"new content")


@pair("d/", "d/\x01", "d/x/", "d/x/1", "d/x\x01", "d/x\x01y", "d/x!", "d/x\x7f", "d\x01/", "d\x01/x")
def control_characters(lower: Tree, upper: Tree) -> None:
    for name in ("d/x/1", "d/x\x01", "d/x\x01y", "d/x!", "d/x\x7f", "d\x01/x", "d/\x01"):
        upper.file(name)


@pair(listed=False)
def names_that_need_escaping(lower: Tree, upper: Tree) -> None:
    for name in ("new\nline", "quote\"'", "tab\t", "\\", "<&>", " ", "-", "=", "\u2028", "*"):
        upper.file(name)
        lower.file(f"gone{name}")


@pair("z", "é/", "é/ü", ".wh.ö", "日本語", "😀")
def names_outside_ascii(lower: Tree, upper: Tree) -> None:
    for name in ("é/ü", "日本語", "😀", "z"):
        upper.file(name)
    lower.file("ö")


@pair("a\udcc3", ".wh.gone\udcff", "\udc80/", "\udc80/x", "\udcc3(", "\udcff => a\udcc3")
def names_that_are_no_utf8(lower: Tree, upper: Tree) -> None:
    upper.file("a\udcc3")
    upper.file("\udcc3(")
    upper.file("\udc80/x")
    upper.link("\udcff", "a\udcc3")
    lower.file("gone\udcff")


@pair(listed=False)
def long_names(lower: Tree, upper: Tree) -> None:
    """Around every border of the header's name and prefix fields."""
    for size in (98, 99, 100, 101, 154, 155, 156, 157, 255):
        upper.file("f" * size)
        upper.dir("d" * (size - 1) + "x")
        upper.file("p" * min(size, 250) + "/" + "q" * 99)
        upper.file("r" * min(size, 250) + "/" + "q" * 100)
        upper.file("r" * min(size, 250) + "/" + "q" * 101)
        upper.symlink("s" * size, "t" * size)


@pair(listed=False)
def whiteouts_of_long_and_odd_names(lower: Tree, upper: Tree) -> None:
    for size in (95, 96, 97, 100, 101, 250, 251):
        lower.file("w" * size)
        lower.file("é" * (size // 2))
        lower.file("d" * 150 + "/" + "v" * size)
    upper.dir("d" * 150)


@pair(listed=False)
def path_over_255(lower: Tree, upper: Tree) -> None:
    for tree in (lower, upper):
        tree.file("/".join(["component"] * 40) + "/kept")
    lower.file("/".join(["component"] * 40) + "/gone")
    upper.file("/".join(["component"] * 40) + "/new")
    upper.file("/".join(["c" * 50] * 6) + "/x")


@pair(listed=False)
def path_near_the_limit(lower: Tree, upper: Tree) -> None:
    """As long as a path may be that the peer gives to the system."""
    room = 4095 - max(len(str(tree.root)) for tree in (lower, upper)) - len("/.wh.gone/x") - 8
    path = "/".join(["n" * 199] * (room // 200))
    for tree in (lower, upper):
        tree.file(f"{path}/kept")
    lower.file(f"{path}/gone")
    upper.file(f"{path}/new/x")


@pair(listed=False)
def directories_350_deep(lower: Tree, upper: Tree) -> None:
    """More levels than handles are kept; on the way up names are left that need them again."""
    for tree, last in ((lower, b"old"), (upper, b"changed")):
        for depth in range(0, 350, 3):
            tree.file("d/" * depth + "kept")
            tree.file("d/" * depth + "z", last)
        tree.file("d/" * 350 + "innermost", last)
    for depth in (5, 100, 120, 200, 300, 349):
        lower.file("d/" * depth + "gone")
        upper.file("d/" * depth + "e/new")


@pair(listed=False)
def directory_of_20000_names(lower: Tree, upper: Tree) -> None:
    for number in range(20_000):
        (lower.root / f"{number * 7919 % 20_000:x}").touch()
    for number in range(20_000):
        if number % 1000:
            os.link(lower.root / f"{number:x}", upper.root / f"{number:x}")
    upper.file("zz")


@pair(listed=False)
def names_that_look_like_whiteouts(lower: Tree, upper: Tree) -> None:
    for name in (".wh.old", ".wh.", ".wh..wh..opq", "d/.wh.x"):
        lower.file(name)
    for name in (".wh.new", "d/.wh.y", "e/.wh..wh..opq", "d/x"):
        upper.file(name)


# ---------------------------------------------------------------------------------------------- times and content


@pair("content", "fraction", "one-sided", "seconds")
def times_below_the_second(lower: Tree, upper: Tree) -> None:
    for name, old, new, data in (
        ("fraction", TIME, TIME + 1, b"data"),
        ("unread", TIME, TIME, b"DATA"),  # equal fractions: not looked into
        ("content", WHOLE, WHOLE, b"DATA"),
        ("equal", WHOLE, WHOLE, b"data"),
        ("one-sided", WHOLE, TIME, b"data"),
        ("seconds", WHOLE, WHOLE + SECOND, b"data"),
    ):
        lower.file(name, time=old)
        upper.file(name, data, time=new)


@pair("first", "last", "size")
def content_is_compared_to_the_end(lower: Tree, upper: Tree) -> None:
    """Sizes around the compare buffer's, and a difference in the last byte."""
    size = 3 << 17
    lower.file("last", bytes(size), time=WHOLE)
    upper.file("last", bytes(size - 1) + b"\1", time=WHOLE)
    lower.file("first", bytes(size + 1), time=WHOLE)
    upper.file("first", b"\1" + bytes(size), time=WHOLE)
    lower.file("size", bytes(size), time=WHOLE)
    upper.file("size", bytes(size + 1), time=WHOLE)
    for tree in (lower, upper):
        tree.file("equal", bytes(size), time=WHOLE)
        tree.file("equal-odd", bytes(size - 1), time=WHOLE)
        tree.file("empty", b"", time=WHOLE)


@pair("before", "before-fraction", "future", "zero", "zero-fraction")
def times_far_away(lower: Tree, upper: Tree) -> None:
    upper.file("before", time=-SECOND)
    upper.file("before-fraction", time=-SECOND - 1)
    upper.file("future", time=10_000_000_000 * SECOND + 5)
    upper.file("zero", time=0)
    upper.file("zero-fraction", time=999_999_999)


@pair("big", "border", "border+1", "border-1", "empty")
def files_of_several_chunks(lower: Tree, upper: Tree) -> None:
    chunk = 4 << 20
    pattern = bytes(range(251)) * 17_000
    for name, size in (("border", chunk), ("border+1", chunk + 1), ("border-1", chunk - 1), ("big", 2 * chunk + 77)):
        upper.file(name, (pattern * 3)[:size])
    upper.file("empty", b"")


@pair(listed=False)
def payloads_around_the_block_size(lower: Tree, upper: Tree) -> None:
    for size in (0, 1, 511, 512, 513, 1023, 1024, 1025, 4096):
        upper.file(f"f{size}", b"x" * size)


@pair("sparse")
def sparse_file(lower: Tree, upper: Tree) -> None:
    with upper.at("sparse").open("wb") as file:
        file.truncate(3 << 20)
        file.seek(1 << 20)
        file.write(b"island")
