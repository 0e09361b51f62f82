"""A table of contents as a reader wants it: flat rows, one arena of strings, and a tree of names.

    decoded entries, some thousands at a time -> add -> rows, strings -> check -> where members end
                                                          `-> find, children: a node per path, made on first use

A million entries take some 300 MB here, and nothing per entry is a Python object.
"""

from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

cdef extern from "<string.h>" nogil:
    size_t strnlen(const char *text, size_t most)

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8

from estargz._memory cimport buffer, buffer_append, buffer_free, buffer_reserve, byte_map, map_find, map_free, map_insert

from threading import Lock

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL

cdef enum:
    HAS_DIGEST = 1
    HAS_CHUNK_DIGEST = 2
    KEPT_APART = 4          # says something that a row has no place for: the entry itself is in TocIndex.apart
    DIGEST_TEXT = 71        # "sha256:" and 64 digits
    ROOT = 0
    XATTRS_MOST = 2 << 20   # bytes as encoded; a tar's extended header holds 1 MiB before it is base64

# 192 bytes, as ROW_FIELDS describes them; strings_at points at name, link, user name, group name, xattrs, back to back.
cdef struct entry_row:
    int64_t strings_at
    uint32_t name_len
    uint32_t link_len
    uint32_t user_name_len
    uint32_t group_name_len
    uint32_t xattrs_len
    uint16_t flags
    uint16_t reserved
    char type[8]
    int64_t size
    int64_t mtime
    int64_t mode
    int64_t uid
    int64_t gid
    int64_t dev_major
    int64_t dev_minor
    int64_t offset
    int64_t end
    int64_t inner_offset
    int64_t chunk_offset
    int64_t chunk_size
    uint8_t digest[32]
    uint8_t chunk_digest[32]

ROW_FIELDS = [
    ("strings_at", "<i8"), ("name_len", "<u4"), ("link_len", "<u4"), ("user_name_len", "<u4"), ("group_name_len", "<u4"),
    ("xattrs_len", "<u4"), ("flags", "<u2"), ("reserved", "<u2"), ("type", "S8"), ("size", "<i8"), ("mtime", "<i8"),
    ("mode", "<i8"), ("uid", "<i8"), ("gid", "<i8"), ("dev_major", "<i8"), ("dev_minor", "<i8"), ("offset", "<i8"),
    ("end", "<i8"), ("inner_offset", "<i8"), ("chunk_offset", "<i8"), ("chunk_size", "<i8"), ("digest", "u1", (32,)),
    ("chunk_digest", "u1", (32,)),
]  # fmt: skip

cdef object TYPES = frozenset(("dir", "reg", "symlink", "hardlink", "char", "block", "fifo", "chunk"))  # of 8 letters at most

FLAG_DIGEST = HAS_DIGEST
FLAG_CHUNK_DIGEST = HAS_CHUNK_DIGEST
FLAG_APART = KEPT_APART

# A path of the tree. Its name is the key in the map of names, behind the parent's number.
cdef struct node:
    int64_t name_at
    uint32_t name_len
    int32_t parent
    int32_t row             # the last entry of this name; -1: only implied by what lies below
    int32_t first_child
    int32_t last_child
    int32_t next_sibling

# What is wrong with a table.
cdef enum fault:
    BAD_NUMBER = 1
    STRAY_CHUNK
    CHUNK_RANGE
    CHUNK_SUM
    OVERLAP
    OUTSIDE
    MANY_CHUNKS

FAULTS = {
    BAD_NUMBER: "it states a size or offset that is negative or too large",
    STRAY_CHUNK: "a chunk that does not follow its file",
    CHUNK_RANGE: "its chunk at {} does not fit {} bytes of the file",
    CHUNK_SUM: "its chunks hold {} of {} bytes",
    OVERLAP: "its offset {} lies before the end of the payload in front of it",
    OUTSIDE: "its offset {} lies outside the payload, which ends at {}",
    MANY_CHUNKS: "it has more than {} chunks; raise the limit if you trust the blob",
}


cdef inline int hex_value(char digit) noexcept nogil:
    if c'0' <= digit <= c'9':
        return digit - c'0'
    if c'a' <= digit <= c'f':
        return digit - c'a' + 10
    return -1


cdef bint read_digest(const char *text, Py_ssize_t size, uint8_t *out) noexcept nogil:
    """The 32 bytes of "sha256:" and 64 lower-case digits; False for any other text."""
    cdef int i, high, low
    if size != DIGEST_TEXT or memcmp(text, b"sha256:", 7):
        return False
    for i in range(32):
        high = hex_value(text[7 + 2 * i])
        low = hex_value(text[8 + 2 * i])
        if high < 0 or low < 0:
            return False
        out[i] = high << 4 | low
    return True


cdef inline bint two_digits(const char *text, int64_t *value) noexcept nogil:
    value[0] = (text[0] - c'0') * 10 + text[1] - c'0'
    return c'0' <= text[0] <= c'9' and c'0' <= text[1] <= c'9'


cdef bint read_time(const char *text, Py_ssize_t size, int64_t *seconds) noexcept nogil:
    """Seconds since the epoch of YYYY-MM-DDTHH:MM:SSZ; False for any other form, which may be a time all the same."""
    cdef int64_t century, year, month, day, hour, minute, second, days
    if size != 20 or text[4] != c'-' or text[7] != c'-' or text[10] != c'T' or text[13] != c':' or text[16] != c':':
        return False
    if not (text[19] == c'Z' and two_digits(text, &century) and two_digits(text + 2, &year)
            and two_digits(text + 5, &month) and two_digits(text + 8, &day) and two_digits(text + 11, &hour)
            and two_digits(text + 14, &minute) and two_digits(text + 17, &second)):
        return False
    year += century * 100
    if not (year >= 1 and 1 <= month <= 12 and 1 <= day <= 28 + (day_more(year, month)) and hour < 24 and minute < 60 and second < 60):
        return False
    # Days since 1970-01-01 in the Gregorian calendar, counted from March so that the leap day comes last.
    if month <= 2:
        year -= 1
        month += 12
    days = 365 * year + year // 4 - year // 100 + year // 400 + (153 * (month - 3) + 2) // 5 + day - 1 - 719468
    seconds[0] = ((days * 24 + hour) * 60 + minute) * 60 + second
    return True


cdef inline int day_more(int64_t year, int64_t month) noexcept nogil:
    """Days of a month beyond its 28th."""
    if month == 2:
        return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    return 2 if month == 4 or month == 6 or month == 9 or month == 11 else 3


cdef bint clean(const uint8_t *name, size_t size, buffer *out, uint32_t *depth) noexcept nogil:
    """A name relative to the root into ``out``: no empty, "." or ".." components. False when memory ran out."""
    cdef size_t at = 0
    cdef size_t end
    out.size = 0
    depth[0] = 0
    if not buffer_reserve(out, size + 1):
        return False
    while at < size:
        end = at
        while end < size and name[end] != c'/':
            end += 1
        if end - at == 2 and name[at] == c'.' and name[at + 1] == c'.':
            while out.size and out.data[out.size - 1] != c'/':
                out.size -= 1
            out.size -= 1 if out.size else 0
            depth[0] -= 1 if depth[0] else 0
        elif end > at and not (end - at == 1 and name[at] == c'.'):
            if out.size:
                out.data[out.size] = c'/'
                out.size += 1
            memcpy(out.data + out.size, name + at, end - at)
            out.size += end - at
            depth[0] += 1
        at = end + 1
    return True


cdef uint32_t slashes(const uint8_t *name, size_t size) noexcept nogil:
    """One less than the most components that a name can have."""
    cdef uint32_t count = 0
    cdef size_t i
    for i in range(size):
        count += name[i] == c'/'
    return count


cdef bint last_begins(const uint8_t *name, size_t size, const uint8_t *prefix, size_t prefix_size) noexcept nogil:
    cdef size_t at
    while size and name[size - 1] == c'/':
        size -= 1
    at = size
    while at and name[at - 1] != c'/':
        at -= 1
    return size - at >= prefix_size and memcmp(name + at, prefix, prefix_size) == 0


cdef class TocIndex:
    """Rows, strings and names of one table. Filled by one thread; then it may be read from several.

    max_name, max_depth, max_nodes, max_chunks: limits of a name's bytes, of a path's components, of paths with those that
    are only implied, and of one file's chunks.
    """

    cdef buffer rows
    cdef buffer strings
    cdef readonly dict apart        # row -> the entry, where a row cannot hold all that it says
    cdef byte_map names             # parent's number and component -> node
    cdef buffer nodes
    cdef buffer scratch
    cdef bint planted
    cdef object lock
    cdef int64_t max_name, max_depth, max_nodes, max_chunks

    def __cinit__(self, *, int64_t max_name, int64_t max_depth, int64_t max_nodes, int64_t max_chunks):
        self.apart = {}
        self.lock = Lock()
        self.max_name, self.max_depth, self.max_nodes, self.max_chunks = max_name, max_depth, max_nodes, max_chunks

    def __dealloc__(self):
        buffer_free(&self.rows)
        buffer_free(&self.strings)
        buffer_free(&self.nodes)
        buffer_free(&self.scratch)
        map_free(&self.names)

    def __len__(self):
        return self.rows.size // sizeof(entry_row)

    cdef inline entry_row *row(self, int64_t index) noexcept nogil:
        return <entry_row *>self.rows.data + index

    # --------------------------------------------------------------------------------------------- filling

    def add(self, list entries, encode_xattrs):
        """Appends entries; ``encode_xattrs`` makes bytes of an entry's attributes.

        Raises ValueError((index in the list, message)) for what no reader could serve.
        """
        cdef entry_row row
        cdef object entry
        cdef Py_ssize_t i
        for i, entry in enumerate(entries):
            memset(&row, 0, sizeof(row))
            row.strings_at = self.strings.size
            try:
                self.add_strings(&row, entry, encode_xattrs)
                self.add_facts(&row, entry)
            except OverflowError:
                raise ValueError((i, "it states a size or offset that is negative or too large")) from None
            except ValueError as error:
                raise ValueError((i, str(error))) from None
            if row.flags & KEPT_APART:
                self.apart[len(self)] = entry
            if not buffer_append(&self.rows, &row, sizeof(row)):
                raise MemoryError

    cdef uint32_t add_text(self, str text) except? 0xffffffff:
        cdef Py_ssize_t size
        cdef const char *data = PyUnicode_AsUTF8AndSize(text, &size)
        if size > 0x7fffffff:
            raise ValueError("a text over 2 GiB")
        if not buffer_append(&self.strings, data, size):
            raise MemoryError
        return <uint32_t>size

    cdef int add_strings(self, entry_row *row, entry, encode_xattrs) except -1:
        cdef bytes xattrs
        cdef uint32_t depth
        row.name_len = self.add_text(entry.name)
        if row.name_len > self.max_name:
            raise ValueError(f"its name takes {row.name_len} bytes, over {self.max_name}; raise the limit if you trust the blob")
        depth = slashes(self.strings.data + row.strings_at, row.name_len)
        if depth >= self.max_depth and not clean(self.strings.data + row.strings_at, row.name_len, &self.scratch, &depth):
            raise MemoryError
        if depth > self.max_depth:
            raise ValueError(f"its path has {depth} components, over {self.max_depth}; raise the limit if you trust the blob")
        row.link_len = self.add_text(entry.link_name)
        row.user_name_len = self.add_text(entry.user_name)
        row.group_name_len = self.add_text(entry.group_name)
        if max(row.link_len, row.user_name_len, row.group_name_len) > self.max_name:
            raise ValueError(f"a link or owner of more than {self.max_name} bytes; raise the limit if you trust the blob")
        if entry.xattrs:
            xattrs = encode_xattrs(entry.xattrs)
            if PyBytes_GET_SIZE(xattrs) > XATTRS_MOST:
                raise ValueError("its extended attributes take more than 2 MiB")
            row.xattrs_len = <uint32_t>PyBytes_GET_SIZE(xattrs)
            if not buffer_append(&self.strings, PyBytes_AS_STRING(xattrs), row.xattrs_len):
                raise MemoryError
        return 0

    cdef int add_facts(self, entry_row *row, entry) except -1:
        cdef Py_ssize_t size
        cdef const char *text = PyUnicode_AsUTF8AndSize(entry.type, &size)
        if entry.type not in TYPES:
            raise ValueError(f"unknown type {entry.type!r}")
        memcpy(row.type, text, size)
        row.size = entry.size
        row.mode = entry.mode
        row.uid = entry.uid
        row.gid = entry.gid
        row.dev_major = entry.dev_major
        row.dev_minor = entry.dev_minor
        row.offset = entry.offset
        row.inner_offset = entry.inner_offset
        row.chunk_offset = entry.chunk_offset
        row.chunk_size = entry.chunk_size
        text = PyUnicode_AsUTF8AndSize(entry.modtime, &size)
        if size and not read_time(text, size, &row.mtime):
            row.flags |= KEPT_APART
        text = PyUnicode_AsUTF8AndSize(entry.digest, &size)
        if size:
            row.flags |= HAS_DIGEST if read_digest(text, size, row.digest) else KEPT_APART
        text = PyUnicode_AsUTF8AndSize(entry.chunk_digest, &size)
        if size:
            row.flags |= HAS_CHUNK_DIGEST if read_digest(text, size, row.chunk_digest) else KEPT_APART
        return 0

    # --------------------------------------------------------------------------------------------- layout

    def check(self, int64_t toc_offset):
        """Checks that every payload can be found, and notes where its compressed bytes end.

        None, or (row, what is wrong with it) of the first entry that is at fault.
        """
        cdef int64_t index = 0
        cdef int64_t number[2]
        cdef buffer cleaned
        cdef int found
        memset(&cleaned, 0, sizeof(cleaned))
        with nogil:
            found = check_chunks(self, &cleaned, &index, number)
            buffer_free(&cleaned)
            if not found:
                found = check_order(self, toc_offset, &index, number)
        return (index, FAULTS[found].format(number[0], number[1])) if found else None

    cdef bint same_name(self, const entry_row *chunk, const entry_row *file, buffer *cleaned) noexcept nogil:
        """Whether both names mean the same. ``cleaned`` keeps the file's from chunk to chunk; NULL data: not known yet."""
        cdef uint32_t depth
        if chunk.name_len == file.name_len and memcmp(self.strings.data + chunk.strings_at,
                                                      self.strings.data + file.strings_at, file.name_len) == 0:
            return True
        if cleaned.data == NULL and not clean(self.strings.data + file.strings_at, file.name_len, cleaned, &depth):
            return False
        return (clean(self.strings.data + chunk.strings_at, chunk.name_len, &self.scratch, &depth)
                and self.scratch.size == cleaned.size
                and memcmp(self.scratch.data, cleaned.data, cleaned.size) == 0)

    # --------------------------------------------------------------------------------------------- rows

    def __getbuffer__(self, Py_buffer *view, int flags):
        """The rows, read-only; fields as ROW_FIELDS. To be asked for when the last entry has been added."""
        PyBuffer_FillInfo(view, self, self.rows.data, self.rows.size, 1, flags)

    def texts(self, int64_t index):
        """(name, link name, user name, group name, xattrs as encoded) of a row; text as str, attributes as bytes."""
        if not 0 <= index < <int64_t>len(self):
            raise IndexError(index)
        cdef const entry_row *row = self.row(index)
        cdef const char *at = <const char *>self.strings.data + row.strings_at
        name = PyUnicode_DecodeUTF8(at, row.name_len, "strict")
        at += row.name_len
        link = PyUnicode_DecodeUTF8(at, row.link_len, "strict") if row.link_len else ""
        at += row.link_len
        user = PyUnicode_DecodeUTF8(at, row.user_name_len, "strict") if row.user_name_len else ""
        at += row.user_name_len
        group = PyUnicode_DecodeUTF8(at, row.group_name_len, "strict") if row.group_name_len else ""
        at += row.group_name_len
        return name, link, user, group, at[:row.xattrs_len] if row.xattrs_len else b""

    def facts(self, int64_t index):
        """All that a row says besides its texts, by the names of ROW_FIELDS; digests as bytes, the type as text."""
        if not 0 <= index < <int64_t>len(self):
            raise IndexError(index)
        cdef const entry_row *row = self.row(index)
        return {
            "type": row.type[:strnlen(row.type, 8)].decode(),
            "flags": row.flags,
            "size": row.size,
            "mtime": row.mtime,
            "mode": row.mode,
            "uid": row.uid,
            "gid": row.gid,
            "dev_major": row.dev_major,
            "dev_minor": row.dev_minor,
            "offset": row.offset,
            "end": row.end,
            "inner_offset": row.inner_offset,
            "chunk_offset": row.chunk_offset,
            "chunk_size": row.chunk_size,
            "digest": (<const char *>row.digest)[:32],
            "chunk_digest": (<const char *>row.chunk_digest)[:32],
        }

    def hard_links(self):
        """The rows that are hard links."""
        cdef int64_t index
        return [index for index in range(len(self)) if memcmp(self.row(index).type, b"hardlink", 8) == 0]

    def with_prefix(self, str prefix):
        """The rows whose last component, as the table spells it, begins so."""
        cdef Py_ssize_t size
        cdef const uint8_t *wanted = <const uint8_t *>PyUnicode_AsUTF8AndSize(prefix, &size)
        cdef int64_t index
        cdef list found = []
        for index in range(len(self)):
            if last_begins(self.strings.data + self.row(index).strings_at, self.row(index).name_len, wanted, size):
                found.append(index)
        return found

    # --------------------------------------------------------------------------------------------- names

    cdef inline node *at(self, int32_t index) noexcept nogil:
        return <node *>self.nodes.data + index

    cdef int plant(self) except -1:
        """Makes the tree of names, once."""
        cdef int64_t index
        cdef int64_t count = len(self)
        cdef int status = 0
        with self.lock:
            if self.planted:
                return 0
            with nogil:
                status = add_node(self, -1, NULL, 0)
                for index in range(count):
                    if status < 0:
                        break
                    if memcmp(self.row(index).type, b"chunk", 6):
                        status = plant_row(self, index)
            if status < 0:
                self.nodes.size = 0
                map_free(&self.names)
            if status == -2:
                raise ValueError(f"its names imply more than {self.max_nodes} paths; raise the limit if you trust the blob")
            if status < 0:
                raise MemoryError
            self.planted = True
        return 0

    def find(self, str path):
        """The node of a path, cleaned to be relative to the root; -1 when nothing has this name."""
        cdef Py_ssize_t size
        cdef const char *text
        cdef int32_t found
        self.plant()
        try:
            text = PyUnicode_AsUTF8AndSize(path, &size)
        except UnicodeEncodeError:  # no table holds a lone surrogate
            return -1
        with self.lock, nogil:
            found = find_path(self, <const uint8_t *>text, size)
        if found == -2:
            raise MemoryError
        return found

    def find_below(self, int32_t parent, str name):
        """The node of one component below a node, taken literally; -1 when there is none."""
        cdef Py_ssize_t size
        cdef const char *text
        self.plant()
        try:
            text = PyUnicode_AsUTF8AndSize(name, &size)
        except UnicodeEncodeError:
            return -1
        with self.lock:
            return child_of(self, parent, <const uint8_t *>text, size)

    def describe(self, int32_t index):
        """(name within its parent, parent or -1, row or -1) of a node."""
        cdef const node *n
        self.plant()
        if not 0 <= index < <int64_t>(self.nodes.size // sizeof(node)):
            raise IndexError(index)
        n = self.at(index)
        return PyUnicode_DecodeUTF8(<const char *>self.names.keys.data + n.name_at + 4, n.name_len, "strict") if index else "", n.parent, n.row

    def children(self, int32_t index):
        """The nodes right below a node, in the order in which the table first names them."""
        cdef int32_t at
        cdef list found = []
        self.plant()
        if not 0 <= index < <int64_t>(self.nodes.size // sizeof(node)):
            raise IndexError(index)
        at = self.at(index).first_child
        while at >= 0:
            found.append(at)
            at = self.at(at).next_sibling
        return found

    def below(self, int32_t index):
        """The rows of a node and of everything below it, in the order of the tree."""
        cdef int32_t at = index
        cdef list found = []
        self.plant()
        if not 0 <= index < <int64_t>(self.nodes.size // sizeof(node)):
            raise IndexError(index)
        while True:
            if self.at(at).row >= 0:
                found.append(self.at(at).row)
            if self.at(at).first_child >= 0:
                at = self.at(at).first_child
                continue
            while at != index and self.at(at).next_sibling < 0:
                at = self.at(at).parent
            if at == index:
                return found
            at = self.at(at).next_sibling


# ------------------------------------------------------------------------------------------------- layout, without Python

cdef inline bint is_type(const entry_row *row, const char *name, size_t size) noexcept nogil:
    return memcmp(row.type, name, size) == 0 and (size == 8 or row.type[size] == 0)


cdef int fail(int what, int64_t at, int64_t *index, int64_t *number, int64_t a, int64_t b) noexcept nogil:
    index[0] = at
    number[0] = a
    number[1] = b
    return what


cdef int check_chunks(TocIndex table, buffer *cleaned, int64_t *index, int64_t *number) noexcept nogil:
    """Whether chunks follow their files and cover them. Rows with a payload get an end of -1, others 0."""
    cdef int64_t count = table.rows.size // sizeof(entry_row)
    cdef int64_t file = -1
    cdef int64_t chunks = 0
    cdef int64_t covered = 0
    cdef int64_t total = 0
    cdef int64_t i, size
    cdef entry_row *row
    for i in range(count + 1):
        row = table.row(i)
        if i < count and min(min(row.size, row.offset, row.inner_offset), min(row.chunk_offset, row.chunk_size)) < 0:
            return fail(BAD_NUMBER, i, index, number, 0, 0)
        if i < count and is_type(row, b"chunk", 5):
            if file < 0 or not table.same_name(row, table.row(file), cleaned):
                return fail(STRAY_CHUNK, i, index, number, 0, 0)
        else:
            if file >= 0 and covered != table.row(file).size:
                return fail(CHUNK_SUM, file, index, number, covered, table.row(file).size)
            if i == count:
                break
            file = i if is_type(row, b"reg", 3) else -1
            chunks = covered = 0
            buffer_free(cleaned)
            row.end = 0
            if file < 0 or not (row.size or row.chunk_offset or row.chunk_size):
                continue
        size = row.chunk_size if row.chunk_size else table.row(file).size - row.chunk_offset
        if row.chunk_offset != covered or not 0 < size <= table.row(file).size - covered:
            return fail(CHUNK_RANGE, i, index, number, row.chunk_offset, table.row(file).size)
        if size > INT64_MAX - total:
            return fail(BAD_NUMBER, i, index, number, 0, 0)
        total += size
        covered += size
        chunks += 1
        if chunks > table.max_chunks:
            return fail(MANY_CHUNKS, file, index, number, table.max_chunks, 0)
        row.end = -1
    return 0


cdef int check_order(TocIndex table, int64_t toc_offset, int64_t *index, int64_t *number) noexcept nogil:
    """Whether payloads ascend inside the blob without overlap; fills in where each one's compressed bytes end."""
    cdef int64_t count = table.rows.size // sizeof(entry_row)
    cdef int64_t file_size = 0
    cdef int64_t size = 0
    cdef int64_t end = toc_offset
    cdef int64_t following = toc_offset
    cdef int64_t i
    cdef entry_row *row
    cdef entry_row *before = NULL
    for i in range(count):
        row = table.row(i)
        if is_type(row, b"reg", 3):
            file_size = row.size
        if not row.end:
            continue
        if before != NULL and (row.offset < before.offset
                               or (row.offset == before.offset and row.inner_offset - before.inner_offset < size)):
            return fail(OVERLAP, i, index, number, row.offset, 0)
        size = row.chunk_size if row.chunk_size else file_size - row.chunk_offset
        before = row
    for i in range(count - 1, -1, -1):
        row = table.row(i)
        if not row.end:
            continue
        if row.offset >= toc_offset:
            return fail(OUTSIDE, i, index, number, row.offset, toc_offset)
        if row.offset < following:
            end, following = following, row.offset
        row.end = end
    return 0


# ------------------------------------------------------------------------------------------------- names, without Python

cdef int32_t child_of(TocIndex table, int32_t parent, const uint8_t *name, size_t size) noexcept nogil:
    cdef int64_t *found
    table.scratch.size = 0
    if not (buffer_append(&table.scratch, &parent, 4) and buffer_append(&table.scratch, name, size)):
        return -2
    found = map_find(&table.names, table.scratch.data, table.scratch.size)
    return -1 if found == NULL else <int32_t>found[0]


cdef int32_t add_node(TocIndex table, int32_t parent, const uint8_t *name, size_t size) noexcept nogil:
    """A node behind its parent's other children; -1: no memory, -2: over the limit."""
    cdef node made
    cdef int32_t index = <int32_t>(table.nodes.size // sizeof(node))
    if index > table.max_nodes:
        return -2
    made.name_at = table.names.keys.size
    made.name_len = <uint32_t>size
    made.parent = parent
    made.row = made.first_child = made.last_child = made.next_sibling = -1
    if parent >= 0:
        table.scratch.size = 0
        if not (buffer_append(&table.scratch, &parent, 4) and buffer_append(&table.scratch, name, size)):
            return -1
        if map_insert(&table.names, table.scratch.data, table.scratch.size, index) == NULL:
            return -1
    if not buffer_append(&table.nodes, &made, sizeof(made)):
        return -1
    if parent >= 0:
        if table.at(parent).last_child >= 0:
            table.at(table.at(parent).last_child).next_sibling = index
        else:
            table.at(parent).first_child = index
        table.at(parent).last_child = index
    return index


cdef int32_t plant_row(TocIndex table, int64_t index) noexcept nogil:
    """Makes the nodes of a row's path; the row becomes what the last one stands for."""
    cdef const entry_row *row = table.row(index)
    cdef buffer path
    cdef uint32_t depth
    cdef int32_t at = ROOT
    cdef int32_t below
    cdef size_t begin = 0
    cdef size_t end
    memset(&path, 0, sizeof(path))
    if not clean(table.strings.data + row.strings_at, row.name_len, &path, &depth):
        return -1
    while begin < path.size and at >= 0:
        end = begin
        while end < path.size and path.data[end] != c'/':
            end += 1
        below = child_of(table, at, path.data + begin, end - begin)
        at = add_node(table, at, path.data + begin, end - begin) if below == -1 else below if below >= 0 else -1
        begin = end + 1
    buffer_free(&path)
    if at >= 0:
        table.at(at).row = <int32_t>index
    return at


cdef int32_t find_path(TocIndex table, const uint8_t *name, size_t size) noexcept nogil:
    """The node of a path; -1: none, -2: no memory."""
    cdef buffer path
    cdef uint32_t depth
    cdef int32_t at = ROOT
    cdef size_t begin = 0
    cdef size_t end
    memset(&path, 0, sizeof(path))
    if not clean(name, size, &path, &depth):
        return -2
    while begin < path.size and at >= 0:
        end = begin
        while end < path.size and path.data[end] != c'/':
            end += 1
        at = child_of(table, at, path.data + begin, end - begin)
        begin = end + 1
    buffer_free(&path)
    return at
