"""The changeset of an overlayfs upperdir, byte for byte as BuildKit's overlay differ writes it."""

from __future__ import annotations

import io
import os
import random
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from trees import (
    CAPABILITY,
    SECOND,
    TIME,
    WHOLE,
    RandomTree,
    Tree,
    difference,
    entries,
    go_overlay_tar,
    go_tar,
    is_whiteout,
    our_tar,
    overlay_mount,
    run,
)

import estargz
from estargz import SourceError

SEEDS = range(25)
PLAIN = ",redirect_dir=off,metacopy=off"


def check(peer: Path, upper: Path, lowers: Sequence[Path]) -> list[str]:
    """The entries, once the stream is known to be Go's."""
    ours = our_tar(upper, overlay_lower=lowers)
    assert not difference(ours, go_overlay_tar(peer, upper, lowers))
    assert our_tar(upper, overlay_lower=lowers, threads=1) == ours
    return entries(ours)


# ---------------------------------------------------------------------------------------------- what overlayfs makes

Operate = Callable[[Tree], None]


@dataclass(frozen=True, slots=True)
class Step:
    """Something done in the merged view, and the entries that come of it."""

    operate: Operate
    entries: tuple[str, ...]


STEPS: dict[str, Step] = {}


def step(*entries: str) -> Callable[[Operate], Operate]:
    def register(operate: Operate) -> Operate:
        STEPS[operate.__name__] = Step(operate, entries)
        return operate

    return register


def lower_tree(tree: Tree) -> None:
    """What every mount below has in its lower directory."""
    for name in ("d/one", "d/sub/two", "d/sub/three", "e/x", "file", "whole"):
        tree.file(name)
    tree.file("linked/a")
    tree.link("linked/b", "linked/a")
    tree.link("linked/c", "linked/a")
    tree.symlink("symlink", "file")
    tree.meta("whole", time=WHOLE)
    tree.file("capable", capability=CAPABILITY)


@step()
def nothing(merged: Tree) -> None:
    pass


@step("d/", "d/new", "new/", "new/sub/", "new/sub/x")
def added(merged: Tree) -> None:
    merged.file("d/new")
    merged.file("new/sub/x")


@step("d/", "d/.wh.one", "d/.wh.sub", ".wh.file")
def removed(merged: Tree) -> None:
    merged.remove("d/one")
    merged.remove("d/sub")
    merged.remove("file")


@step("capable", "d/", "d/one", "file", "symlink")
def changed(merged: Tree) -> None:
    merged.file("d/one", b"changed")
    merged.meta("capable", time=TIME + 1)
    (merged.root / "file").chmod(0o600)
    merged.remove("symlink")
    merged.symlink("symlink", "elsewhere")


@step()
def copied_up_but_the_same(merged: Tree) -> None:
    """Renaming there and back copies a file up; nothing of it has changed."""
    for name in ("d/one", "whole"):
        (merged.root / name).rename(merged.root / "aside")
        (merged.root / "aside").rename(merged.root / name)
        merged.meta(name, time=WHOLE if name == "whole" else TIME)


@step("whole")
def same_second_other_content(merged: Tree) -> None:
    merged.file("whole", b"DATA", time=WHOLE)


@step("d/", "d/.wh.one", "d/sub/", "d/sub/.wh.three", "d/sub/.wh.two", "d/x")
def directory_made_anew(merged: Tree) -> None:
    """It is opaque; the layer says one by one what is gone."""
    merged.remove("d")
    merged.dir("d", 0o700)
    merged.dir("d/sub", 0o700)
    merged.file("d/x")


@step("d/", "d/.wh.sub", "d/x")
def directory_made_anew_with_a_name_unchanged(merged: Tree) -> None:
    merged.remove("d")
    merged.dir("d", 0o700)
    merged.file("d/one")
    merged.file("d/x")


@step("d/", "d/one", "d/sub/", "d/sub/.wh.three", "d/sub/.wh.two", "d/sub/x")
def directory_made_anew_inside(merged: Tree) -> None:
    merged.remove("d/sub")
    merged.dir("d/sub", 0o711)
    merged.file("d/sub/x")
    merged.file("d/one", b"changed")


@step("d", "file/", "file/x")
def file_and_directory_trade_places(merged: Tree) -> None:
    merged.remove("d")
    merged.file("d")
    merged.remove("file")
    merged.file("file/x")


@step("d/", "d/moved", ".wh.file")
def file_moved(merged: Tree) -> None:
    (merged.root / "file").rename(merged.root / "d/moved")


@step("linked/", "linked/new")
def new_link_to_an_unmodified_file(merged: Tree) -> None:
    """The old names stay unmentioned: the upperdir does not show that they are links of it."""
    merged.link("linked/new", "linked/a")


@step("linked/", "linked/a", "linked/b", "new", "newer => new")
def links_broken_by_copying_up(merged: Tree) -> None:
    merged.file("linked/a", b"changed")
    merged.file("linked/b", b"changed")
    merged.file("new")
    merged.link("newer", "new")


@step("char", "p", ".wh.symlink")
def specials(merged: Tree) -> None:
    merged.char("char", 1, 3)
    merged.fifo("p")
    merged.remove("symlink")
    merged.socket("symlink")
    merged.remove("symlink")


@step()
def whiteouts_are_of_no_use(merged: Tree) -> None:
    merged.file("fresh")
    merged.remove("fresh")
    merged.file("fresh/x")
    merged.remove("fresh")


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", STEPS)
def test_mount_equals_buildkit(name: str, layers: int, overlay: None, peer: Path, scratch: Path) -> None:
    """With several lower directories, the content lies in the lowest; the others hide and add something."""
    bottom = Tree(scratch / "l0")
    lower_tree(bottom)
    lowers = [bottom.root]
    if layers == 3:
        bottom.file("e/hidden")
        bottom.file("gone/x")
        for number, change in enumerate((hide_some, bring_back), 1):
            with overlay_mount(lowers, scratch / f"l{number}", PLAIN) as merged:
                change(Tree(merged))
            lowers.insert(0, scratch / f"l{number}")
    with overlay_mount(lowers, scratch / "upper", PLAIN) as merged:
        STEPS[name].operate(Tree(merged))
    assert check(peer, scratch / "upper", lowers) == list(STEPS[name].entries)


def hide_some(merged: Tree) -> None:
    merged.remove("e")
    merged.remove("gone")
    merged.remove("d/sub/two")
    merged.remove("d/sub/three")


def bring_back(merged: Tree) -> None:
    merged.file("e/x")
    merged.file("d/sub/two")
    merged.file("d/sub/three")


@pytest.mark.parametrize("seed", SEEDS)
def test_random_mounts_equal_buildkit(seed: int, overlay: None, peer: Path, scratch: Path) -> None:
    """Layers upon layers of random changes; every other time with marks that no mount would have left like that."""
    chance = random.Random(seed)
    RandomTree(scratch / "l0", chance, as_root=True).grow(40)
    lowers = [scratch / "l0"]
    for number in range(1, chance.choice([1, 2, 3])):
        with overlay_mount(lowers, scratch / f"l{number}", PLAIN) as merged:
            RandomTree(merged, chance, as_root=True).disturb(chance.randrange(1, 20))
        lowers.insert(0, scratch / f"l{number}")
    with overlay_mount(lowers, scratch / "upper", PLAIN) as merged:
        RandomTree(merged, chance, as_root=True).disturb(chance.randrange(1, 25))
    if seed % 2:
        RandomTree(scratch / "upper", chance, as_root=True, meddle=True).disturb(chance.randrange(1, 15))
        remove_stray_whiteouts(scratch / "upper", lowers)
    check(peer, scratch / "upper", lowers)


def remove_stray_whiteouts(upper: Path, lowers: Sequence[Path]) -> None:
    """Whiteouts in opaque directories, and of names whose parent is no directory in a lower: overlayfs never leaves
    such, and BuildKit fails at them."""
    for whiteout in [path for path in upper.rglob("*") if is_whiteout(path)]:
        for folder in list(whiteout.relative_to(upper).parents)[:-1]:
            opaque = "trusted.overlay.opaque" in os.listxattr(upper / folder)
            if opaque or any(is_no_directory(lower / folder) for lower in lowers):
                whiteout.unlink()
                break


def is_no_directory(path: Path) -> bool:
    try:
        return not stat.S_ISDIR(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


# ---------------------------------------------------------------------------------------------- handcrafted upperdirs


@pytest.fixture
def trees(scratch: Path) -> tuple[Tree, Tree]:
    return Tree(scratch / "lower"), Tree(scratch / "upper")


def test_no_lower(overlay: None, peer: Path, trees: tuple[Tree, Tree]) -> None:
    upper = trees[1]
    upper.file("d/x")
    upper.whiteout("d/gone")
    upper.dir("opaque", xattrs={"trusted.overlay.opaque": b"y"})
    assert check(peer, upper.root, []) == ["d/", "d/x", "opaque/"]


@pytest.mark.parametrize("mark", ["trusted.overlay.opaque", "user.overlay.opaque"])
@pytest.mark.parametrize("value", [b"y", b"x", b"n", b"", b"yes", b"y" * 20])
def test_only_y_makes_opaque(mark: str, value: bytes, overlay: None, peer: Path, trees: tuple[Tree, Tree]) -> None:
    lower, upper = trees
    lower.file("d/gone")
    upper.file("d/x")
    upper.dir("d", xattrs={mark: value})
    assert check(peer, upper.root, [lower.root]) == ["d/", *(["d/.wh.gone"] if value == b"y" else []), "d/x"]


def nested_opaque_directories(lower: Tree, upper: Tree) -> None:
    for name in ("d/a/x", "d/b", "d/c/y", "d/c/z/1", "d/same"):
        lower.file(name)
    upper.file("d/c/new")
    upper.file("d/same")
    for name in ("d", "d/c"):
        upper.dir(name, xattrs={"trusted.overlay.opaque": b"y"})


NESTED_OPAQUE = ["d/", "d/.wh.a", "d/.wh.b", "d/c/", "d/c/new", "d/c/.wh.y", "d/c/.wh.z"]


def test_opaque_directory_in_an_opaque_directory(overlay: None, peer: Path, trees: tuple[Tree, Tree]) -> None:
    nested_opaque_directories(*trees)
    trees[1].dir("d", 0o700)
    assert check(peer, trees[1].root, [trees[0].root]) == NESTED_OPAQUE


def test_whiteouts_in_an_opaque_directory(root: None, trees: tuple[Tree, Tree]) -> None:
    """BuildKit gives up here, as the kernel lists them in its view; they delete what is deleted anyway."""
    lower, upper = trees
    nested_opaque_directories(lower, upper)
    for name in ("d/a", "d/never", "d/c/z"):
        upper.whiteout(name)
    upper.dir("d", 0o700)
    assert entries(our_tar(upper.root, overlay_lower=[lower.root])) == NESTED_OPAQUE


def test_links_in_and_around_an_opaque_directory(overlay: None, peer: Path, trees: tuple[Tree, Tree]) -> None:
    """Unmodified names are known as links only below the opaque directory."""
    lower, upper = trees
    lower.file("d/a")
    lower.file("z")
    upper.file("d/a")
    upper.link("d/new", "d/a")
    upper.link("z", "d/a")
    upper.link("a", "d/a")
    upper.dir("d", xattrs={"trusted.overlay.opaque": b"y"})
    assert check(peer, upper.root, [lower.root]) == ["a", "d/", "d/a => a", "d/new => a"]


def test_upper_that_shares_inodes_with_the_lower(overlay: None, peer: Path, trees: tuple[Tree, Tree]) -> None:
    lower, upper = trees
    lower.file("a", time=WHOLE)
    lower.file("d/b")
    os.link(lower.root / "a", upper.at("a"))
    os.link(lower.root / "d/b", upper.at("d/b"))
    os.link(lower.root / "d/b", upper.at("d/c"))
    assert check(peer, upper.root, [lower.root]) == ["d/", "d/c"]


def test_one_lower_directory_is_taken_as_it_is(overlay: None, peer: Path, trees: tuple[Tree, Tree]) -> None:
    """A lowest layer may hold whiteouts of nothing; BuildKit looks at it without an overlay."""
    lower, upper = trees
    for name in ("d/x", "y", "z"):
        lower.whiteout(name)
    lower.file("e/x")
    lower.dir("e", xattrs={"trusted.overlay.opaque": b"y"})
    upper.dir("d", 0o755, xattrs={"trusted.overlay.opaque": b"y"})
    upper.whiteout("y")
    upper.file("z")
    upper.file("e/new")
    assert check(peer, upper.root, [lower.root]) == ["d/", "d/.wh.x", "e/", "e/new", ".wh.y", "z"]


def test_marks_in_several_lower_directories(overlay: None, peer: Path, scratch: Path) -> None:
    top, middle, bottom, upper = (Tree(scratch / name) for name in ("top", "middle", "bottom", "upper"))
    for name in ("d/bottom", "d/hidden", "e/x", "f/x", "g/deep/bottom", "h"):
        bottom.file(name)
    middle.file("d/middle")
    middle.whiteout("d/hidden")
    middle.whiteout("e")
    middle.dir("f", xattrs={"trusted.overlay.opaque": b"y"})
    middle.file("f/middle")
    middle.file("g/deep/middle")
    middle.file("h/x")
    top.file("e/top")
    top.dir("g/deep", xattrs={"trusted.overlay.opaque": b"y"})
    top.file("g/deep/top")
    top.file("d/top")
    top.whiteout("h")
    for name in ("d", "e", "f", "g", "g/deep", "h"):
        upper.dir(name, 0o750, xattrs={"trusted.overlay.opaque": b"y"})
    for name in ("hidden", "h/x"):
        upper.file(name)
    assert check(peer, upper.root, [top.root, middle.root, bottom.root]) == [
        *("d/", "d/.wh.bottom", "d/.wh.middle", "d/.wh.top"),
        *("e/", "e/.wh.top"),
        *("f/", "f/.wh.middle"),
        *("g/", "g/deep/", "g/deep/.wh.top"),
        *("h/", "h/x", "hidden"),
    ]


def test_file_of_an_upper_layer_hides_a_directory(overlay: None, peer: Path, scratch: Path) -> None:
    top, middle, bottom, upper = (Tree(scratch / name) for name in ("top", "middle", "bottom", "upper"))
    bottom.file("d/bottom")
    middle.file("d")
    top.file("d/top")
    upper.dir("d", 0o700, xattrs={"trusted.overlay.opaque": b"y"})
    assert check(peer, upper.root, [top.root, middle.root, bottom.root]) == ["d/", "d/.wh.top"]


def test_whiteout_below_what_is_a_file_in_the_lower(trees: tuple[Tree, Tree]) -> None:
    """BuildKit gives up here; there is nothing to delete."""
    lower, upper = trees
    lower.file("d")
    upper.whiteout("d/x")
    assert entries(our_tar(upper.root, overlay_lower=[lower.root])) == ["d/"]


def test_user_marks_need_no_root(trees: tuple[Tree, Tree]) -> None:
    lower, upper = trees
    lower.file("d/gone")
    lower.file("deleted")
    upper.file("d/x")
    upper.whiteout("deleted")
    try:
        upper.dir("d", xattrs={"user.overlay.opaque": b"y"})
    except OSError:
        pytest.skip("the file system of the scratch directory has no user attributes")
    assert entries(our_tar(upper.root, overlay_lower=[lower.root]))[-3:] == ["d/.wh.gone", "d/x", ".wh.deleted"]


def test_times_and_epoch(overlay: None, peer: Path, trees: tuple[Tree, Tree]) -> None:
    lower, upper = trees
    lower.file("gone")
    upper.whiteout("gone")
    for offset in (-1, 0, 1):
        upper.file(f"d/{offset}", time=WHOLE + offset * SECOND + 5)
    bounded = our_tar(upper.root, overlay_lower=[lower.root], source_date_epoch=WHOLE // SECOND)
    for name in ("d/0", "d/1", "d"):
        upper.meta(name, time=WHOLE)
    assert not difference(bounded, go_overlay_tar(peer, upper.root, [lower.root]))


def test_layer_gives_the_merged_tree(overlay: None, peer: Path, trees: tuple[Tree, Tree]) -> None:
    """Both differs agree on what has no hard links."""
    lower, upper = trees
    lower_tree(lower)
    shutil.rmtree(lower.root / "linked")
    with overlay_mount([lower.root], upper.root, PLAIN) as merged:
        for operate in (changed, directory_made_anew, added):
            operate(Tree(merged))
        assert our_tar(merged, lower.root) == go_tar(peer, merged, lower.root)
        walked = our_tar(merged, lower.root)
    assert walked == our_tar(upper.root, overlay_lower=[lower.root])


# ---------------------------------------------------------------------------------------------- what is refused


def refused(upper: Path, lowers: Sequence[Path]) -> str:
    with pytest.raises(SourceError) as caught:
        estargz.build(upper, io.BytesIO(), overlay_lower=lowers)
    return str(caught.value)


REDIRECT = (
    "is an overlayfs redirect, its content lies in another directory; "
    "mount the overlay with redirect_dir=off, or build from the merged tree with --lower"
)


def test_renamed_directory(overlay: None, trees: tuple[Tree, Tree]) -> None:
    lower, upper = trees
    lower_tree(lower)
    with overlay_mount([lower.root], upper.root, ",redirect_dir=on") as merged:
        (merged / "d").rename(merged / "moved")
    assert refused(upper.root, [lower.root]) == f"moved: {REDIRECT}"


def test_renamed_directory_inside_an_opaque_one(overlay: None, trees: tuple[Tree, Tree]) -> None:
    lower, upper = trees
    lower_tree(lower)
    with overlay_mount([lower.root], upper.root, ",redirect_dir=on") as merged:
        run(["rm", "-r", merged / "e"])
        (merged / "e").mkdir()
        (merged / "d/sub").rename(merged / "e/moved")
    assert refused(upper.root, [lower.root]) == f"e/moved: {REDIRECT}"


def test_renamed_directory_in_a_lower(overlay: None, scratch: Path) -> None:
    bottom, upper = Tree(scratch / "bottom"), Tree(scratch / "upper")
    lower_tree(bottom)
    with overlay_mount([bottom.root], scratch / "top", ",redirect_dir=on") as merged:
        (merged / "d").rename(merged / "moved")
    upper.dir("moved", 0o700)
    assert refused(upper.root, [scratch / "top", bottom.root]) == f"moved: {REDIRECT}"


def test_metadata_only_copy(overlay: None, trees: tuple[Tree, Tree]) -> None:
    lower, upper = trees
    lower.file("d/large", bytes(1 << 20))
    with overlay_mount([lower.root], upper.root, ",metacopy=on") as merged:
        (merged / "d/large").chmod(0o600)
    assert refused(upper.root, [lower.root]) == f"d/large: {REDIRECT}"


def test_metadata_only_copy_in_a_lower(overlay: None, scratch: Path) -> None:
    bottom, upper = Tree(scratch / "bottom"), Tree(scratch / "upper")
    bottom.file("large", bytes(1 << 20), time=WHOLE)
    with overlay_mount([bottom.root], scratch / "top", ",metacopy=on") as merged:
        (merged / "large").chmod(0o600)
        os.utime(merged / "large", ns=(WHOLE, WHOLE))
    upper.file("large", bytes(1 << 20), mode=0o600, time=WHOLE)
    assert refused(upper.root, [scratch / "top", bottom.root]) == f"large: {REDIRECT}"


@pytest.mark.parametrize("key", ["trusted.overlay.redirect", "user.overlay.redirect"])
def test_redirect_marks(key: str, root: None, trees: tuple[Tree, Tree]) -> None:
    trees[1].dir("d/e", xattrs={key: b"/other"})
    assert refused(trees[1].root, [trees[0].root]) == f"d/e: {REDIRECT}"


def test_missing_lower(trees: tuple[Tree, Tree]) -> None:
    lower, upper = trees
    assert "missing: cannot be opened: No such file" in refused(upper.root, [lower.root, lower.root / "missing"])
