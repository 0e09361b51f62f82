"""estargz ls: the table of contents, one entry a line."""

from __future__ import annotations

import stat
import unicodedata

import click
import msgspec

from estargz.reading import blob as blobs
from estargz.reading.toc import TOCEntry, owners

_TYPE_BITS = {
    "dir": stat.S_IFDIR,
    "reg": stat.S_IFREG,
    "hardlink": stat.S_IFREG,
    "symlink": stat.S_IFLNK,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
}
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\"}


@click.command("ls")
@click.argument("blob", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: every TOC entry, chunks included.")
def command(blob: str, as_json: bool) -> None:
    """List the entries of BLOB as its table of contents states them.

    Control characters in names are escaped. The listing is what lazily pulling runtimes serve; `estargz verify` tells
    whether the tar inside says the same.
    """
    with blobs.open(blob) as opened:
        if as_json:
            for entry in opened.toc:
                click.echo(msgspec.json.encode(entry))
            return
        for entry, (user, group) in zip(opened.toc, owners(opened.toc), strict=True):
            if entry.type != "chunk":
                click.echo(line(entry, user, group))


def line(entry: TOCEntry, user: str, group: str) -> str:
    """The entry as tar's verbose listing prints it."""
    mode = stat.filemode(_TYPE_BITS[entry.type] | entry.mode & 0o7777)
    if entry.type == "hardlink":
        mode = "h" + mode[1:]
    owner = f"{escape(user) or entry.uid}/{escape(group) or entry.gid}"
    size = f"{entry.dev_major},{entry.dev_minor}" if entry.type in ("char", "block") else str(entry.size)
    time = escape(entry.modtime or "1970-01-01T00:00:00Z")[:16].replace("T", " ")
    return f"{mode} {owner} {size:>{max(20 - len(owner), 1)}} {time} {escape(entry.name)}{_target(entry)}"


def _target(entry: TOCEntry) -> str:
    if entry.type == "symlink":
        return f" -> {escape(entry.link_name)}"
    return f" link to {escape(entry.link_name)}" if entry.type == "hardlink" else ""


def escape(text: str) -> str:
    """Text without anything that could move the cursor, hide text or end the line."""
    return text if text.isprintable() and "\\" not in text else "".join(map(_escape_one, text))


def _escape_one(char: str) -> str:
    if char in _SHORT:
        return _SHORT[char]
    if char.isprintable() or unicodedata.category(char) in ("Zs", "Co", "Cn"):
        return char
    return char.encode("unicode_escape").decode()
