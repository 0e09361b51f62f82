"""What is wrong with a blob beyond its digests: two readers that would see different things, runtimes that would refuse it.

    TOC rows, tree of names --.
    tar rows, end of archive --+-> checks -> findings
    gzip members -------------'
    spelling of the JSON

Each check names the source it follows. SS is containerd/stargz-snapshotter, CS containers/storage, CD containerd.
"""

from __future__ import annotations

import re
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from estargz._index import FLAG_CHUNK_DIGEST
from estargz._inflate import InflateReader
from estargz.digest import sha256
from estargz.errors import BlobError
from estargz.reading.blob import OPAQUE, WHITEOUT, Blob, begins_like_tar
from estargz.reading.findings import BBOLT, CONTAINERS_STORAGE, FULL_PULL, MEMORY, RUNTIMES, Finding, Findings
from estargz.reading.members import MemberReader
from estargz.reading.scan import Scan
from estargz.reading.source import blob_errors
from estargz.reading.toc import LANDMARKS, TOC_NAME
from estargz.reading.toc_text import TOCText, read_text

__all__ = ["examine"]

SNAPSHOTTER = (MEMORY, BBOLT)
LAZY = (MEMORY, BBOLT, CONTAINERS_STORAGE)
_PIECE = 1 << 20
_SKIP = 1 << 18
_LINKS_MAX = 40  # Linux's own limit of symbolic links on a way
_NAME_MAX, _PATH_MAX = 255, 4095  # bytes of a component and of a path, Linux
_CS_TOC_MAX = 150 << 20  # maxTocSize in pkg/chunked/compression_linux.go of containers/storage

Numbers = NDArray[np.int64]


def examine(blob: Blob, scan: Scan, members: MemberReader, required: frozenset[str]) -> Findings:
    """Run every check on a blob whose TOC and tar were found to be equal.

    members: has read all of the blob's tar; required: of findings.FAMILIES
    """
    facts = Facts(blob, scan, members)
    findings = Findings(required)
    for check in CHECKS:
        findings.add(check(facts))
    return findings


class Facts:
    """What the checks look at. Entries are numbered without chunks, in the order that the TOC and the tar share.

    rows, kinds, offset:  of each entry: its row in the TOC, its type there, where its payload stands in the tar stream
    """

    def __init__(self, blob: Blob, scan: Scan, members: MemberReader) -> None:
        self.blob = blob
        self.scan = scan
        self.members = members
        self.rows: Numbers = np.flatnonzero(blob.entries["type"] != b"chunk")
        self.kinds = blob.entries["type"][self.rows]

    def name(self, entry: int) -> str:
        return self.blob.toc.tree.texts(int(self.rows[entry]))[0]

    def link(self, entry: int) -> str:
        return self.blob.toc.tree.texts(int(self.rows[entry]))[1]

    def tar_names(self) -> Iterator[bytes]:
        """As the tar has them, which the TOC may not be able to."""
        rows, strings = self.scan.rows, self.scan.strings
        for first in range(0, len(rows), _SKIP):
            part = rows[first : first + _SKIP]
            for at, size in zip(part["strings_at"].tolist(), part["name_len"].tolist(), strict=True):
                yield strings[at : at + size]

    def entries_of(self, kind: bytes) -> list[int]:
        found: list[int] = np.flatnonzero(self.kinds == kind).tolist()
        return found

    @cached_property
    def chunks(self) -> Numbers:
        """How many rows each entry takes in the TOC."""
        return np.diff(np.append(self.rows, len(self.blob.toc)))

    # The tree of names: a node is a path, cleaned; node 0 is the root.

    @cached_property
    def nodes(self) -> NDArray[np.int32]:
        """Of each entry."""
        tree = self.blob.toc.tree
        found = (tree.find(tree.texts(row)[0]) for row in self.rows.tolist())
        return np.fromiter(found, np.int32, len(self.rows))

    @cached_property
    def parents(self) -> NDArray[np.int32]:
        """The node above each node, -1 above the root."""
        found = array("i")
        describe = self.blob.toc.tree.describe
        try:
            while True:
                found.append(describe(len(found))[1])
        except IndexError:
            return np.array(found, np.int32)

    @cached_property
    def times(self) -> Numbers:
        """How many entries each node has."""
        return np.bincount(self.nodes, minlength=len(self.parents))

    @cached_property
    def first(self) -> Numbers:
        """The first entry of each node, -1 for a directory that is only implied."""
        found = np.full(len(self.parents), -1, np.int64)
        found[self.nodes[::-1]] = np.arange(len(self.nodes))[::-1]
        return found

    @cached_property
    def last(self) -> Numbers:
        """The last entry of each node, likewise."""
        found = np.full(len(self.parents), -1, np.int64)
        found[self.nodes] = np.arange(len(self.nodes))
        return found

    @cached_property
    def below(self) -> tuple[list[int], list[int]]:
        """Of each node: the first and the last entry below it.

        Where nothing is below, the first one is the number of all entries and the last one -1. Nodes are numbered so that
        a child comes behind its parent.
        """
        count = len(self.parents)
        first, last = [len(self.nodes)] * count, [-1] * count
        own_first, own_last, parents = self.first.tolist(), self.last.tolist(), self.parents.tolist()
        for node in range(count - 1, 0, -1):
            parent = parents[node]
            first[parent] = min(first[parent], first[node], own_first[node] if own_first[node] >= 0 else first[node])
            last[parent] = max(last[parent], last[node], own_last[node])
        return first, last

    def node(self, path: str) -> int:
        return self.blob.toc.tree.find(path)

    def path(self, node: int) -> str:
        parts: list[str] = []
        while node > 0:
            name, node, _ = self.blob.toc.tree.describe(node)
            parts.append(name)
        return "/".join(reversed(parts))

    def entries_at(self, node: int) -> list[int]:
        found: list[int] = np.flatnonzero(self.nodes == node).tolist() if node >= 0 else []
        return found

    def text(self) -> TOCText:
        """How the JSON is spelled, read from the blob once more."""
        reader = InflateReader(self.blob.raw(self.blob.toc_offset, self.blob.toc_end), "gzip", name="TOC", single=True)
        reader.read(512)
        left = self.blob.toc_size

        def pieces() -> Iterator[bytes]:
            nonlocal left
            while left and (piece := reader.read(min(left, _PIECE))):
                left -= len(piece)
                yield piece

        try:
            with blob_errors():
                return read_text(pieces(), name=f"{self.blob.name}: TOC")
        except (ValueError, RecursionError) as error:
            raise BlobError(f"{self.blob.name}: TOC: malformed JSON: {error}; build the blob again") from error


# --------------------------------------------------------------------------------------------------------------------
# the blob's end: footer, TOC


def check_footer(facts: Facts) -> Iterator[Finding]:
    """CS pkg/chunked/compression_linux.go, readEstargzChunkedManifest: takes every footer for one of 51 bytes."""
    if facts.blob.footer.format == "legacy":
        message = "a footer of 47 bytes; containers/storage takes it for one of 51 and cuts the TOC short by four"
        yield Finding("warning", "legacy-footer", None, message, (CONTAINERS_STORAGE,))


def check_toc_size(facts: Facts) -> Iterator[Finding]:
    """CS pkg/chunked/compression_linux.go, maxTocSize: of the compressed member and of the JSON."""
    compressed = facts.blob.size - facts.blob.footer.size - facts.blob.toc_offset
    size = max(compressed, facts.blob.toc_size)
    if size > _CS_TOC_MAX:
        message = f"the TOC takes {size} bytes, over {_CS_TOC_MAX}; fewer chunks or entries make it smaller"
        yield Finding("warning", "large-toc", None, message, (CONTAINERS_STORAGE,))


def check_toc_text(facts: Facts) -> Iterator[Finding]:
    """Spellings that decoders take differently.

    Go's encoding/json (SS estargz/estargz.go) and the field names of CS (pkg/chunked/cache_linux.go, unmarshalToc) fold
    case, others do not. Of a key that comes twice the last one counts, or the first, or both are merged. The bbolt store
    (SS cmd/containerd-stargz-grpc/db/reader.go, initNodes) takes the first array that it sees for the entries, and finds
    none in a null. The memory store hashes only what its decoder has buffered when the last brace comes.
    """
    text = facts.text()
    if text.version != 1:
        yield Finding("error", "toc-version", None, f'"version" is {text.version!r}, not 1')
    if text.null_entries:
        yield Finding("warning", "null-entries", None, '"entries" is no list, as for an empty layer', (BBOLT,))
    if text.array_in_front:
        yield Finding("warning", "array-before-entries", None, 'an array stands in front of "entries"', (BBOLT,))
    if text.trailing:
        message = f"{text.trailing} characters follow the JSON; its digest depends on the reader's buffer"
        yield Finding("warning", "text-after-toc", None, message, (MEMORY,))
    for entry, key in text.twice:
        yield Finding("error", "key-twice", entry, f"the key {key!r} comes more than once in one object of the TOC")
    for entry, key in text.folded:
        yield Finding("warning", "key-case", entry, f"the key {key!r} is known only to readers that fold case")
    for entry, key in text.unknown:
        yield Finding("note", "key-unknown", entry, f"the key {key!r} is none of the format's")
    for kind, (severity, code) in _KEYS_NOT_LISTED.items():
        for _ in range(len(getattr(text, kind)), text.counts[kind]):
            yield Finding(severity, code, None, "more of the same")


_KEYS_NOT_LISTED = {
    "twice": ("error", "key-twice"),
    "folded": ("warning", "key-case"),
    "unknown": ("note", "key-unknown"),
}
_GO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)")


def check_modtimes(facts: Facts) -> Iterator[Finding]:
    """RFC 3339 as Go parses it. CS (unmarshalToc) refuses others, SS (estargz.go, initFields) shows the year 1."""
    for _, entry in sorted(facts.blob.toc.tree.apart.items()):
        if entry.modtime and not _GO_TIME.fullmatch(entry.modtime):
            message = f"modtime {entry.modtime!r} has no year of four digits"
            yield Finding("warning", "modtime-format", entry.name, message, LAZY)


# --------------------------------------------------------------------------------------------------------------------
# content: digests, chunks, members


def check_chunk_digests(facts: Facts) -> Iterator[Finding]:
    """SS db/reader.go has no other digest to check a chunk by; metadata/memory/reader.go takes the file's for its first."""
    entries = facts.blob.entries
    files = facts.blob.files_of_rows
    payload = entries["end"] > 0
    several = np.bincount(files[payload], minlength=len(entries)) > 1
    lacking = payload & (entries["flags"] & FLAG_CHUNK_DIGEST == 0)
    for file in np.unique(files[lacking]).tolist():
        runtimes = SNAPSHOTTER if several[file] else (BBOLT,)
        message = "a part of it has no chunkDigest and cannot be read before it was checked"
        yield Finding("warning", "no-chunk-digest", facts.blob.toc.tree.texts(file)[0], message, runtimes)


def check_inner_offsets(facts: Facts) -> Iterator[Finding]:
    """CS pkg/chunked/internal/minimal/compression.go knows no innerOffset; SS does since 0.13."""
    entries = facts.blob.entries
    for row in np.flatnonzero((entries["end"] > 0) & (entries["inner_offset"] > 0)).tolist():
        message = (
            f"begins {entries['inner_offset'][row]} bytes inside the member at {entries['offset'][row]}: "
            "wrong bytes for containers/storage, and for snapshotters before 0.13"
        )
        yield Finding("warning", "inner-offset", facts.blob.toc.tree.texts(row)[0], message, (CONTAINERS_STORAGE,))


def check_first_member(facts: Facts) -> Iterator[Finding]:
    """SS estargz/estargz.go, initFields and fileReader.ReadAt: an entry that states no offset seems to be at 0.

    So an empty file counts as a part of the member there, in front of which it is then looked for.
    """
    entries = facts.blob.entries
    at_zero = np.flatnonzero((entries["end"] > 0) & (entries["offset"] == 0))
    empty = np.flatnonzero((entries["type"] == b"reg") & (entries["size"] == 0))
    if len(at_zero) and len(empty) and empty[0] < at_zero[-1]:
        name = facts.blob.toc.tree.texts(int(at_zero[-1]))[0]
        message = (
            f"lies in the member at offset 0, of which {facts.blob.toc.tree.texts(int(empty[0]))[0]!r} seems a part"
        )
        yield Finding("warning", "payload-at-zero", name, message, (MEMORY,))


def check_places(facts: Facts) -> Iterator[Finding]:
    """Every chunk lies where the tar has this very part of this very file, not where something equal happens to stand.

    This includes that a chunk that is not its file's last fills its member exactly, as CS (pkg/chunked/storage_linux.go,
    storeMissingFiles) and eStargz's specification want it.
    """
    entries = facts.blob.entries
    rows = np.flatnonzero(entries["end"] > 0)
    if not len(rows):
        return
    offsets = np.array(facts.members.offsets, np.int64)
    positions = np.array(facts.members.positions, np.int64)
    member = np.searchsorted(offsets, entries["offset"][rows], "right") - 1
    begins = (member >= 0) & (offsets[member] == entries["offset"][rows])
    found = positions[member] + entries["inner_offset"][rows]
    number = np.searchsorted(facts.rows, facts.blob.files_of_rows[rows])
    wanted = facts.scan.rows["offset"][number] + entries["chunk_offset"][rows]
    for i in np.flatnonzero(~begins).tolist():
        name = facts.blob.toc.tree.texts(int(rows[i]))[0]
        message = f"its offset {entries['offset'][rows[i]]} is not where a gzip member of the stream begins"
        yield Finding("error", "no-member", name, message)
    for i in np.flatnonzero(begins & (found != wanted)).tolist():
        name = facts.blob.toc.tree.texts(int(rows[i]))[0]
        message = (
            f"its chunk at {entries['chunk_offset'][rows[i]]} leads to byte {found[i]} of the tar, "
            f"where the tar has it at byte {wanted[i]}"
        )
        yield Finding("error", "other-place", name, message)


def check_member_headers(facts: Facts) -> Iterator[Finding]:
    """RFC 1952, 2.3.1: fields that no writer of layers needs, and that only the blob's own digest covers."""
    toc = facts.blob.raw(facts.blob.toc_offset, facts.blob.toc_end)
    header = bytearray(4)
    adorned, first = facts.members.adorned, facts.members.first_adorned
    if toc.readinto(memoryview(header)) == 4 and header[3]:
        adorned, first = adorned + 1, first if adorned else facts.blob.toc_offset
    if adorned:
        message = (
            f"{adorned} gzip members have a name, a comment or extra fields in their header, the first at byte {first}"
        )
        yield Finding("warning", "member-header", None, message)


# --------------------------------------------------------------------------------------------------------------------
# the tar's end


def check_archive_end(facts: Facts) -> Iterator[Finding]:
    """POSIX pax, "ustar Interchange Format": two zero blocks end an archive.

    With one, Go's archive/tar (Reader.readHeader) reports the TOC's header behind it as an error.
    """
    ending = facts.scan.ending
    if ending.zero_blocks == 0:
        message = f"the tar has no end: whoever does not know eStargz goes on to a file {TOC_NAME}"
        yield Finding("note", "no-archive-end", None, message)
    elif ending.zero_blocks == 1:
        message = f"the tar ends in one zero block instead of two, at byte {ending.at}"
        yield Finding("error", "half-archive-end", None, message, (FULL_PULL,))
    if ending.hidden_at >= 0:
        another = begins_like_tar(_inflated(facts, ending.hidden_at, 512))
        what = "another tar" if another else "data"
        message = f"{what} at byte {ending.hidden_at} of the stream, behind the end of the tar, where few readers look"
        yield Finding("error", "second-archive" if another else "hidden-data", None, message)


def _inflated(facts: Facts, at: int, size: int) -> bytes:
    """Bytes of the stream, from the last member in front of them that is known."""
    member = int(np.searchsorted(np.array(facts.members.positions, np.int64), at, "right")) - 1
    begin = facts.members.offsets[member]
    left = at - facts.members.positions[member]
    reader = InflateReader(facts.blob.raw(begin, facts.blob.toc_offset), "gzip", name=facts.blob.name, strict=True)
    with blob_errors():
        while left:
            left -= len(reader.read(min(left, _SKIP)))
        return reader.read(size)


# --------------------------------------------------------------------------------------------------------------------
# names

_ODD_NAME = re.compile(rb"[\0-\x1f\x7f-\xff]|[^/]{256}|^/|//|/\.(?:/|$)|(?:^|/)\.\.(?:/|$)|^$")


def check_names(facts: Facts) -> Iterator[Finding]:
    """Names that mean the same as others, leave the root, or cannot be told.

    The TOC is JSON, so bytes that are no UTF-8 become U+FFFD there. Runtimes keep a name that leads out of the root inside
    it (CD pkg/archive/tar.go, applyNaive), other unpackers need not. What is too long for Linux cannot be unpacked at all.
    """
    for entry, name in enumerate(facts.tar_names()):
        if _ODD_NAME.search(name) or len(name) > _PATH_MAX:
            yield from _odd_name(name, facts.name(entry))


def _odd_name(name: bytes, text: str) -> Iterator[Finding]:
    if not _is_utf8(name):
        message = f"its name is {name!r} in the tar, which is no UTF-8 and so not what the TOC says"
        yield Finding("warning", "name-not-utf8", text, message, LAZY)
    if any(byte < 0x20 or byte == 0x7F for byte in name):
        yield Finding("warning", "name-control", text, "its name has control characters")
    if len(name) > _PATH_MAX or max(map(len, name.split(b"/"))) > _NAME_MAX:
        yield Finding(
            "error", "name-long", text, "its name is longer than Linux allows", (CONTAINERS_STORAGE, FULL_PULL)
        )
    if _leaves_root(name):
        yield Finding("error", "name-outside", text, "its name leads out of the root")
    elif re.search(rb"^/|//|/\.(?:/|$)|(?:^|/)\.\.(?:/|$)|^$", name):
        yield Finding("warning", "name-unclean", text, "its name is absolute, empty, or has empty, . or .. parts")


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _leaves_root(name: bytes) -> bool:
    depth = 0
    for part in name.split(b"/"):
        depth += 0 if part in (b"", b".") else -1 if part == b".." else 1
        if depth < 0:
            return True
    return False


def check_link_names(facts: Facts) -> Iterator[Finding]:
    """As names: a target that is no UTF-8 is another one in the TOC."""
    rows, strings = facts.scan.rows, facts.scan.strings
    for entry in np.flatnonzero(rows["link_len"] > 0).tolist():
        begin = int(rows["strings_at"][entry]) + int(rows["name_len"][entry])
        link = strings[begin : begin + int(rows["link_len"][entry])]
        if not _is_utf8(link):
            message = f"its target is {link!r} in the tar, which is no UTF-8 and so not what the TOC says"
            yield Finding("warning", "name-not-utf8", facts.name(entry), message, LAZY)


def check_reserved_names(facts: Facts) -> Iterator[Finding]:
    """eStargz's specification: no entry of the layer itself may have the TOC's name."""
    for entry in facts.entries_at(facts.node(TOC_NAME)):
        yield Finding("error", "reserved-name", facts.name(entry), f"an entry of the layer is called {TOC_NAME}")


def check_duplicates(facts: Facts) -> Iterator[Finding]:
    """CS pkg/chunked/filesystem_linux.go makes files with O_EXCL and symlinks anew; directories may come again.

    The others take the last one, but SS estargz.go (initFields) keeps the chunks of the one before if that one alone has
    several, and CD pkg/archive/tar.go (applyNaive) sets the times of directories last, also of those that are gone.
    """
    again = np.flatnonzero(facts.times[facts.nodes] > 1)
    order = again[np.argsort(facts.nodes[again], kind="stable")]
    borders = np.flatnonzero(np.diff(facts.nodes[order], prepend=-1, append=-1)).tolist() if len(order) else []
    for begin, end in pairwise(borders):
        group = order[begin:end]
        name = facts.name(int(group[-1]))
        if (facts.kinds[group] == b"dir").all():
            yield Finding("note", "directory-again", name, f"{len(group)} entries for one directory")
        else:
            yield _name_again(facts, group.tolist(), name)


def _name_again(facts: Facts, group: list[int], name: str) -> Finding:
    kinds = facts.kinds[group].tolist()
    if b"dir" in kinds and (facts.below[1][facts.nodes[group[-1]]] >= 0 or kinds[-1] == b"symlink"):
        return _directory_and_file(name)
    message = f"{len(group)} entries have this name; the last one counts"
    chunks = [int(facts.chunks[entry]) for entry in group]
    if max(chunks[:-1]) > 1 == chunks[-1] and facts.scan.rows["size"][group[-1]] > 0:
        runtimes = (MEMORY, CONTAINERS_STORAGE)
        return Finding("warning", "name-again", name, f"{message}, but with the chunks of another", runtimes)
    return Finding("warning", "name-again", name, message, (CONTAINERS_STORAGE,))


def _directory_and_file(name: str) -> Finding:
    message = "is a directory at first or in the end, and else none: what is below it depends on who reads"
    return Finding("error", "directory-and-file", name, message, RUNTIMES)


def check_parents(facts: Facts) -> Iterator[Finding]:
    """What lies below something that is no directory, and directories that nothing describes.

    CD pkg/archive/tar.go: applyNaive follows symbolic links of a path's parents inside the root, mkparent refuses other
    files, and the times of directories are set last, also of those that are gone. SS estargz.go (getOrCreateDir) and
    db/reader.go hang children below whatever has the name, where nobody sees them.
    """
    above = facts.parents
    implied = facts.last < 0
    implied[0] = False
    # Of those inside each other the outermost: the paths of all would be longer than the names in the table.
    for node in np.flatnonzero(implied & ~implied[above]).tolist():
        message = "is in no entry, but something below it is; runtimes make it with mode 0755"
        yield Finding("note", "no-parent", facts.path(node) + "/", message)
    folders = np.zeros(len(above), bool)
    folders[facts.nodes[facts.kinds == b"dir"]] = True
    ends = LinkEnds(facts)
    odd = np.unique(above[(above > 0) & ~implied[above] & ~folders[above]])
    for node in odd.tolist():
        yield _file_as_parent(facts, node, ends)


def _file_as_parent(facts: Facts, node: int, ends: LinkEnds) -> Finding:
    entry = int(facts.last[node])
    kind = facts.kinds[entry].decode()
    name = facts.name(entry)
    if facts.below[0][node] < entry:
        return _directory_and_file(name)
    if kind == "symlink" and ends.find(facts.path(node)) != ends.BLOCKED:
        return Finding("warning", "below-symlink", name, "is a symbolic link, and something lies below it", SNAPSHOTTER)
    return Finding("error", "below-file", name, f"is of type {kind}, and something lies below it", RUNTIMES)


class LinkEnds:
    """Where paths lead through symbolic links inside the layer. Each link's target is walked once, whoever comes by it."""

    MISSING = -1  # it may be in another layer
    BLOCKED = -2  # by what is no directory, a circle or too many links

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._ends: dict[int, tuple[int, int]] = {}  # node of a link -> its end, links on the way with itself

    def find(self, path: str) -> int:
        """The node of the directory that a path leads to, its last part followed too; MISSING, BLOCKED."""
        # A link is blocked as long as it is not known better: whoever meets it by then goes in a circle. And whoever has
        # so many links open that it falls out of the deque is blocked by their number.
        asked = -1
        self._ends[asked] = self.BLOCKED, 1
        open_walks = deque([(asked, self._walk(0, path))], maxlen=_LINKS_MAX + 1)
        while open_walks:
            link, walk = open_walks[-1]
            try:
                met = next(walk)
            except StopIteration as done:
                end, links = done.value
                self._ends[link] = end, links + 1
                open_walks.pop()
            else:
                self._ends[met] = self.BLOCKED, 1
                target = self._facts.link(int(self._facts.last[met]))
                parent = 0 if target.startswith("/") else int(self._facts.parents[met])
                open_walks.append((met, self._walk(parent, target)))
        return self._ends[asked][0]

    def _walk(self, node: int, path: str) -> Generator[int, None, tuple[int, int]]:
        """The end and the links on the way. Yields links whose end must be known before it goes on."""
        facts, links = self._facts, 0
        for part in map(re.Match.group, re.finditer("[^/]+", path)):
            if part == "..":
                node = max(int(facts.parents[node]), 0)
            elif part != ".":
                node = facts.blob.toc.tree.find_below(node, part)
                kind = facts.kinds[facts.last[node]] if node >= 0 and facts.last[node] >= 0 else b"dir"
                if kind == b"symlink":
                    if node not in self._ends:
                        yield node
                    node, more = self._ends[node]
                    links += more
                elif kind != b"dir":
                    node = self.BLOCKED
                if node < 0 or links > _LINKS_MAX:
                    return (self.BLOCKED if links > _LINKS_MAX else node), links
        return node, links


# --------------------------------------------------------------------------------------------------------------------
# links, whiteouts, landmarks


def check_hard_links(facts: Facts) -> Iterator[Finding]:
    """The target is in this layer, in front of the link, and no directory.

    SS estargz.go, getSource: anywhere in the TOC, the last of that name, no loops. SS db/reader.go: in front. CD
    pkg/archive/tar.go, createTarFile: there already, in this layer or a lower one. CS storage_linux.go: links are made
    last, to what was made by then, which devices and fifos are not.
    """
    links = facts.entries_of(b"hardlink")
    target = np.arange(len(facts.rows))
    dangling = np.zeros(len(facts.rows), bool)
    for entry in links:
        node = facts.node(facts.link(entry))
        dangling[entry] = node < 0 or facts.last[node] < 0 or node == facts.nodes[entry]
        if not dangling[entry]:
            target[entry] = facts.last[node]
        yield from _link_target(facts, entry, node)
    # Where chains of links end: twice as many steps each time.
    ends = target
    for _ in range(len(links).bit_length()):
        ends = ends[ends]
    for entry in links:
        yield from _link_end(facts, entry, int(ends[entry]), bool(dangling[ends[entry]]))


def _link_target(facts: Facts, entry: int, node: int) -> Iterator[Finding]:
    link = facts.link(entry)
    if node == facts.nodes[entry]:
        yield Finding("error", "link-loop", facts.name(entry), "is a hard link to itself", RUNTIMES)
    elif node < 0 or facts.last[node] < 0:
        message = f"is a hard link to {link!r}, which is not in this layer"
        yield Finding("warning", "link-target-missing", facts.name(entry), message, LAZY)
    elif facts.first[node] >= entry:
        message = f"is a hard link to {link!r}, which does not come in front of it"
        yield Finding("error", "link-target-behind", facts.name(entry), message, (BBOLT, FULL_PULL))
    elif facts.last[node] > entry:
        message = f"is a hard link to {link!r}, which another entry replaces behind it"
        yield Finding("warning", "link-target-replaced", facts.name(entry), message, (MEMORY, CONTAINERS_STORAGE))


def _link_end(facts: Facts, entry: int, end: int, dangling: bool) -> Iterator[Finding]:
    kind = facts.kinds[end].decode()
    if kind == "hardlink" and not dangling:
        yield Finding("error", "link-loop", facts.name(entry), "is a hard link that leads back to itself", RUNTIMES)
    elif kind == "dir":
        yield Finding("error", "link-to-directory", facts.name(entry), "is a hard link to a directory", RUNTIMES)
    elif kind in ("char", "block", "fifo"):
        message = f"is a hard link to {facts.name(end)!r}, of type {kind}, which containers/storage does not make"
        yield Finding("warning", "link-to-device", facts.name(entry), message, (CONTAINERS_STORAGE,))


def check_whiteouts(facts: Facts) -> Iterator[Finding]:
    """A whiteout and what it removes, in one layer.

    OCI image specification, layer.md: whiteouts hide what lower layers have. CD pkg/archive/tar.go removes or replaces
    what is there when the whiteout comes, and refuses those that name no sibling (validateWhiteout). SS fs/layer/node.go
    shows an entry of the name and drops its whiteout. CS pkg/archive makes a device that nothing may replace.
    """
    tree = facts.blob.toc.tree
    for row in tree.with_prefix(WHITEOUT):
        entry = int(np.searchsorted(facts.rows, row))
        if facts.blob.entries["type"][row] == b"chunk":
            continue
        name, parent, _ = tree.describe(int(facts.nodes[entry]))
        hidden = name.removeprefix(WHITEOUT)
        if name == OPAQUE or hidden == name:
            continue
        if hidden in ("", ".", ".."):
            yield Finding("error", "whiteout-of-nothing", facts.name(entry), "names no file to remove", (FULL_PULL,))
            continue
        sibling = tree.find_below(parent, hidden)
        if sibling >= 0:
            yield _whiteout_beside(facts, entry, sibling)


def _whiteout_beside(facts: Facts, entry: int, sibling: int) -> Finding:
    path = facts.path(sibling)
    first = facts.below[0][sibling]
    if facts.first[sibling] >= 0:
        first = min(first, int(facts.first[sibling]))
    is_dir = facts.last[sibling] < 0 or facts.kinds[facts.last[sibling]] == b"dir"
    if first < entry:
        message = f"removes {path!r}, which stands in front of it in this layer"
        return Finding("error", "whiteout-behind", facts.name(entry), message, RUNTIMES)
    message = f"removes {path!r}, which this layer also has; an opaque marker says the same of a directory"
    runtimes = LAZY if is_dir else (CONTAINERS_STORAGE,)
    return Finding("warning", "whiteout-beside", facts.name(entry), message, runtimes)


_LANDMARK_DIGEST = sha256(b"\x0f")


def check_landmarks(facts: Facts) -> Iterator[Finding]:
    """eStargz's specification (docs/estargz.md) and its writer (SS estargz/build.go): one file at the root, one byte 0x0f.

    CS storage_linux.go, mustSkipFile, knows only the bare names. What a landmark has to follow is in no blob, but that of
    nothing comes first.
    """
    found = [(kind, entry) for name, kind in LANDMARKS.items() for entry in facts.entries_at(facts.node(name))]
    if len(found) > 1:
        names = ", ".join(repr(facts.name(entry)) for _, entry in found)
        yield Finding("error", "several-landmarks", facts.name(found[1][1]), f"more than one landmark: {names}")
    for kind, entry in found:
        toc = facts.blob.toc[int(facts.rows[entry])]
        if toc.type != "reg" or toc.size != 1 or toc.digest != _LANDMARK_DIGEST:
            yield Finding("error", "landmark-content", toc.name, "is a landmark whose content is not the byte 0f")
        if (toc.modtime, toc.mode, toc.uid, toc.gid, toc.user_name, toc.group_name, toc.xattrs) != (
            "",
            0,
            0,
            0,
            "",
            "",
            {},
        ):
            yield Finding("warning", "landmark-metadata", toc.name, "is a landmark with an owner, a mode or a time")
        if toc.name not in LANDMARKS:
            yield Finding(
                "warning", "landmark-spelling", toc.name, "is a landmark that containers/storage shows as a file"
            )
        if kind == "no-prefetch" and entry:
            yield Finding(
                "warning", "landmark-place", toc.name, f"is the landmark of no prefetch, but entry {entry}, not 0"
            )


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    check_footer,
    check_toc_size,
    check_toc_text,
    check_modtimes,
    check_chunk_digests,
    check_inner_offsets,
    check_first_member,
    check_places,
    check_member_headers,
    check_archive_end,
    check_names,
    check_link_names,
    check_reserved_names,
    check_duplicates,
    check_parents,
    check_hard_links,
    check_whiteouts,
    check_landmarks,
)
