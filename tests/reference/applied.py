"""Layers applied to a tree, plainly: a dictionary of paths. The rules are those of the OCI image specification's layer.md.

Names are clean and lead through directories only; entries are (path, Node), whiteouts among them by their names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace


@dataclass(eq=False)
class Node:
    """Something in a tree. Two paths with the same Node are hard links."""

    kind: str
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    data: bytes = b""
    link: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)


Tree = dict[str, Node]


def parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def below(tree: Tree, path: str) -> list[str]:
    prefix = f"{path}/" if path else ""
    return [name for name in tree if name.startswith(prefix) and name != path]


def remove(tree: Tree, path: str) -> None:
    for name in [*below(tree, path), path]:
        tree.pop(name, None)


def hide(tree: Tree, path: str, ours: set[str], *, itself: bool) -> None:
    """Takes away what lower layers have at a path and below it."""
    for name in [*below(tree, path), *([path] if itself else [])]:
        if name not in ours:
            tree.pop(name, None)


def apply(tree: Tree, layer: Iterable[tuple[str, Node]]) -> None:
    ours: set[str] = set()
    for path, node in layer:
        folder, _, name = path.rpartition("/")
        if name == ".wh..wh..opq":
            hide(tree, folder, ours, itself=False)
            continue
        if name.startswith(".wh."):
            hide(tree, f"{folder}/{name[4:]}".lstrip("/"), ours, itself=True)
            continue
        for parent in parents(path):
            tree.setdefault(parent, Node("dir"))
        ours.update(parents(path))
        ours.add(path)
        if node.kind == "hardlink":
            target = tree[node.link]
            if node.link != path:
                remove(tree, path)
                tree[path] = target
        elif node.kind == "dir" and path in tree and tree[path].kind == "dir":
            tree[path] = replace(node)
        else:
            remove(tree, path)
            tree[path] = node
