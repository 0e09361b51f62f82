"""The entries of a tar file in another order: what is to be prefetched first, the rest as it was.

One scan reads the headers and notes where each entry lies, its extended headers and padding included. The builder is then
fed from there: the entries that were picked, one by one, and what is left in runs as long as can be. No header is written
anew. The order is that of Go's estargz.Build: in front of each path its parent directories, in front of a hard link what
it links to; of entries with the same name the last one counts; landmarks and tables of contents are left out. Unlike there,
a parent directory may lack an entry: many tars have files alone.
"""

from libc.errno cimport EINTR, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memcmp, memcpy, memset, strlen

from estargz._layer cimport LayerBuilder
from estargz._memory cimport buffer, buffer_append, buffer_free, buffer_reserve, byte_map, map_find, map_free, map_insert, map_slot
from estargz._rows cimport (
    EST_CANCELLED, EST_NO_MEMORY, EST_OK, EST_READ, EST_SHRANK, EST_TAR_DANGLING_META, EST_TAR_HALF_PADDING, EST_TAR_LONE_ZERO,
    EST_TAR_TRUNCATED, EST_TOC_SIZE,
)
from estargz._tar cimport (
    TAR_ENTRY, TAR_META, TAR_ZERO, tar_parse_block, tar_parse_meta, tar_parser, tar_parser_free, tar_parser_init,
)

from estargz.errors import TarError

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int handle, void *data, size_t size, int64_t offset)

cdef enum:
    BLOCK = 512
    WINDOW = 8 << 10        # read at once: headers of small files lie close together, those of large ones do not
    LINKS_IN_A_ROW = 1000   # hard links to hard links that are followed
    NAMES_MOST = 1 << 30    # bytes of all names, as many as a table of contents has at most

# What is known of a path that is to come first. The values are those of writing/priority.py.
cdef enum:
    PATH_ABSENT
    PATH_PRESENT

cdef enum entry_state:
    ENTRY_LEFT      # comes in its place
    ENTRY_DROPPED
    ENTRY_PICKED    # comes first
    ENTRY_PENDING   # its link target is being picked

# An entry: bytes [begin, end) of the input, first header to padding.
ctypedef struct entry_place:
    int64_t begin
    int64_t end
    int64_t link_at         # of its link_place in self.links; -1: no hard link
    int state

# Where a hard link leads; `size` bytes of its cleaned target follow.
ctypedef struct link_place:
    int64_t entry           # that had this name when the link was met; -1: none
    int64_t size


cdef inline int64_t padded(int64_t size) noexcept nogil:
    return (size + BLOCK - 1) & ~(<int64_t>BLOCK - 1)


cdef bint clean_name(const uint8_t *name, size_t size, buffer *cleaned) noexcept nogil:
    """A tar name relative to the root, without empty, "." and ".." parts; no bytes for the root itself."""
    cdef size_t at = 0
    cdef size_t end
    cleaned.size = 0
    while at < size:
        end = at
        while end < size and name[end] != c'/':
            end += 1
        if end - at == 2 and name[at] == c'.' and name[at + 1] == c'.':
            while cleaned.size and cleaned.data[cleaned.size - 1] != c'/':
                cleaned.size -= 1
            cleaned.size -= 1 if cleaned.size else 0
        elif end > at and not (end - at == 1 and name[at] == c'.'):
            if cleaned.size and not buffer_append(cleaned, "/", 1):
                return False
            if not buffer_append(cleaned, name + at, end - at):
                return False
        at = end + 1
    return True


cdef inline bint is_above(const uint8_t *directory, size_t size, const uint8_t *path, size_t path_size) noexcept nogil:
    return path_size > size and path[size] == c'/' and memcmp(directory, path, size) == 0


cdef inline bint is_name(const buffer *cleaned, const char *name) noexcept nogil:
    return cleaned.size == strlen(name) and memcmp(cleaned.data, name, cleaned.size) == 0


cdef class TarOrder:
    """Where the entries of a plain tar lie, and the order in which a builder is to get them.

    builder: is fed, and asked meanwhile whether to go on; file: descriptor of a file that can be read anywhere, open until
    the builder is finished; begin, end: the tar's bytes in it. TarError and SourceError as from LayerBuilder.feed; TarError
    when a later entry has taken the name that a hard link needs.
    """

    cdef LayerBuilder builder
    cdef int file
    cdef int64_t begin, end
    cdef tar_parser parser
    cdef buffer window
    cdef int64_t window_at
    cdef buffer entries         # entry_place, in the tar's order
    cdef buffer links           # link_place
    cdef byte_map names         # cleaned name -> index of the last entry that has it
    cdef buffer cleaned, cleaned_link
    cdef buffer picked          # int64 indices, in order
    cdef int64_t tail_begin, tail_end   # the end of the archive and what lies behind
    cdef readonly bint toc_cut  # the input ended in a table of contents

    def __cinit__(self, LayerBuilder builder not None, int file, int64_t begin, int64_t end):
        cdef int code
        self.builder = builder
        self.file = file
        self.begin = begin
        self.end = end
        if tar_parser_init(&self.parser) != EST_OK:
            raise MemoryError
        with nogil:
            code = self.scan()
        if code:
            builder.raise_failure()
        self.check_links()

    def __dealloc__(self):
        tar_parser_free(&self.parser)
        buffer_free(&self.window)
        buffer_free(&self.entries)
        buffer_free(&self.picked)
        self.forget_names()

    def names_below(self, bytes directory):
        """All cleaned names below a directory, each followed by a NUL, in no order."""
        cdef const uint8_t *path = directory
        cdef size_t size = len(directory)
        cdef buffer found
        cdef const uint8_t *key
        cdef map_slot *slot
        cdef size_t i
        cdef bint ok = True
        memset(&found, 0, sizeof(found))
        with nogil:
            for i in range(self.names.capacity):
                slot = &self.names.slots[i]
                key = self.names.keys.data + slot.key_at
                if slot.used and slot.key_size and (not size or is_above(path, size, key, slot.key_size)):
                    ok = ok and buffer_append(&found, key, slot.key_size) and buffer_append(&found, "", 1)
        try:
            if not ok:
                raise MemoryError
            return found.data[:found.size] if found.size else b""
        finally:
            buffer_free(&found)

    def pick(self, bytes paths):
        """Puts paths behind those picked before. paths: cleaned, each followed by a NUL. A byte for each: PATH_..."""
        cdef const uint8_t *at = paths
        cdef const uint8_t *end = at + len(paths)
        cdef bytearray states = bytearray(paths.count(b"\0"))
        cdef uint8_t *state = states
        cdef size_t size
        cdef int found = PATH_PRESENT
        with nogil:
            while at < end and found >= 0:
                size = strlen(<const char *>at)
                found = self.pick_path(at, size, 0) if self.builder.attend() else EST_CANCELLED
                state[0] = found
                state += 1
                at += size + 1
        if found < 0:
            self.builder.set_failure(found, 0, -1, NULL, 0)
            self.builder.raise_failure()
        return states

    def feed_picked(self):
        """Hands the entries that were picked to the builder."""
        cdef size_t i
        cdef int code = EST_OK
        self.forget_names()
        self.builder.take()
        try:
            with nogil:
                for i in range(self.picked.size // sizeof(int64_t)):
                    if not code:
                        code = self.feed_run(self.at((<int64_t *>self.picked.data)[i]).begin,
                                             self.at((<int64_t *>self.picked.data)[i]).end)
            if code:
                self.builder.raise_failure()
        finally:
            self.builder.leave()

    def feed_rest(self):
        """Hands everything else to the builder, and the end of the archive."""
        cdef int code
        self.builder.take()
        try:
            with nogil:
                code = self.feed_left()
            if code:
                self.builder.raise_failure()
        finally:
            self.builder.leave()

    cdef void forget_names(self) noexcept:
        map_free(&self.names)
        buffer_free(&self.links)
        buffer_free(&self.cleaned)
        buffer_free(&self.cleaned_link)

    cdef inline entry_place *at(self, int64_t index) noexcept nogil:
        return <entry_place *>self.entries.data + index

    # --------------------------------------------------------------------------------------------- the scan

    cdef int failed(self, int code, int64_t at) noexcept nogil:
        return self.builder.set_failure(code, 0, at - self.begin, self.parser.entry.name, self.parser.entry.name_len)

    cdef const uint8_t *read_at(self, int64_t at, size_t size) noexcept nogil:
        """`size` bytes of the input, valid until the next call; NULL after a failure. They lie in front of self.end."""
        cdef size_t got = 0
        cdef ssize_t part
        cdef size_t wanted
        if self.window.size and at >= self.window_at and at + <int64_t>size <= self.window_at + <int64_t>self.window.size:
            return self.window.data + (at - self.window_at)
        self.window.size = 0
        wanted = min(max(size, <size_t>WINDOW), <size_t>(self.end - at))
        if not buffer_reserve(&self.window, wanted):
            self.builder.set_failure(EST_NO_MEMORY, 0, -1, NULL, 0)
            return NULL
        while got < size:
            part = pread(self.file, self.window.data + got, wanted - got, at + got)
            if part < 0 and errno == EINTR:
                continue
            if part <= 0:
                self.builder.set_failure(EST_READ if part else EST_SHRANK, errno if part else 0, at - self.begin, NULL, 0)
                return NULL
            got += part
        self.window.size = got
        self.window_at = at
        return self.window.data

    cdef int scan(self) noexcept nogil:
        """Notes every entry up to the end of the archive."""
        cdef int64_t at = self.begin
        cdef int64_t first = at         # of the entry at hand: its first extended header, if it has any
        cdef const uint8_t *block
        cdef int64_t size
        cdef int found, code
        while at < self.end:
            if not self.builder.attend():
                return self.builder.set_failure(EST_CANCELLED, 0, -1, NULL, 0)
            if self.end - at < BLOCK:
                return self.failed(EST_TAR_TRUNCATED, self.end)
            block = self.read_at(at, BLOCK)
            if block == NULL:
                return EST_CANCELLED
            found = tar_parse_block(&self.parser, block)
            if found < 0:
                return self.failed(found, at)
            if found == TAR_ZERO:
                return self.scan_tail(first)
            at += BLOCK
            size = self.parser.meta_size if found == TAR_META else self.parser.entry.size
            if size > self.end - at:
                return self.failed(EST_TAR_TRUNCATED, self.end)
            if padded(size) > self.end - at:
                return self.failed(EST_TAR_HALF_PADDING if found == TAR_ENTRY else EST_TAR_TRUNCATED, self.end)
            if found == TAR_META:
                block = self.read_at(at, size) if size else block
                if block == NULL:
                    return EST_CANCELLED
                code = tar_parse_meta(&self.parser, block)
                if code:
                    return self.failed(code, at + padded(size))
            else:
                code = self.note(first, at + padded(size))
            if code:
                return code
            at += padded(size)
            if found == TAR_ENTRY:
                if self.toc_cut:
                    return EST_OK
                first = at
        if self.parser.pending:
            return self.failed(EST_TAR_DANGLING_META, at)
        self.tail_begin = self.tail_end = at
        return EST_OK

    cdef int scan_tail(self, int64_t begin) noexcept nogil:
        """The blocks of zeros at `begin`, and what follows: more of them, or an old table of contents."""
        cdef int64_t at = begin
        cdef const uint8_t *block
        self.tail_begin = begin
        self.tail_end = self.end
        while self.end - at >= BLOCK:
            if not self.builder.attend():
                return self.builder.set_failure(EST_CANCELLED, 0, -1, NULL, 0)
            block = self.read_at(at, BLOCK)
            if block == NULL:
                return EST_CANCELLED
            if at == begin + BLOCK and tar_parse_block(&self.parser, block) != TAR_ZERO:
                return self.failed(EST_TAR_LONE_ZERO, at)
            if (at > begin + BLOCK and memcmp(block, b"stargz.index.json", 18) == 0
                    and tar_parse_block(&self.parser, block) == TAR_ENTRY and self.is_last(at + BLOCK)):
                self.toc_cut = True
                self.tail_end = at
                return EST_OK
            at += BLOCK
        return self.failed(EST_TAR_TRUNCATED, self.end) if at == begin + BLOCK < self.end else EST_OK

    cdef int is_last(self, int64_t payload_at) noexcept nogil:
        """1 where the input ends with the entry at hand and two zero blocks, 0 where it does not, or a code."""
        cdef int64_t left = self.end - payload_at
        cdef const uint8_t *ending
        if self.parser.entry.size > left or padded(self.parser.entry.size) + 2 * BLOCK != left:
            return 0
        ending = self.read_at(self.end - 2 * BLOCK, 2 * BLOCK)
        if ending == NULL:
            return EST_CANCELLED
        return ending[0] == 0 and memcmp(ending, ending + 1, 2 * BLOCK - 1) == 0

    cdef int note(self, int64_t begin, int64_t end) noexcept nogil:
        """Takes the entry that the parser has just met into the list."""
        cdef entry_place place
        cdef int last
        cdef int64_t *index
        memset(&place, 0, sizeof(place))
        place.begin = begin
        place.end = end
        place.link_at = -1
        place.state = ENTRY_LEFT
        if not clean_name(self.parser.entry.name, self.parser.entry.name_len, &self.cleaned):
            return self.failed(EST_NO_MEMORY, begin)
        if is_name(&self.cleaned, "stargz.index.json"):
            last = self.is_last(end - padded(self.parser.entry.size))
            if last < 0:
                return last
            if last:
                self.toc_cut = True
                self.tail_begin = self.tail_end = begin
                return EST_OK
        if (is_name(&self.cleaned, "stargz.index.json") or is_name(&self.cleaned, ".prefetch.landmark")
                or is_name(&self.cleaned, ".no.prefetch.landmark")):
            place.state = ENTRY_DROPPED
        else:
            if self.parser.entry.type == c'1' and not self.note_link(&place):
                return self.failed(EST_NO_MEMORY, begin)
            index = map_insert(&self.names, self.cleaned.data, self.cleaned.size, -1)
            if index == NULL:
                return self.failed(EST_NO_MEMORY, begin)
            if self.names.keys.size > NAMES_MOST:
                return self.failed(EST_TOC_SIZE, begin)
            if index[0] >= 0:
                self.at(index[0]).state = ENTRY_DROPPED
            index[0] = self.entries.size // sizeof(entry_place)
        if not buffer_append(&self.entries, &place, sizeof(place)):
            return self.failed(EST_NO_MEMORY, begin)
        return EST_OK

    cdef bint note_link(self, entry_place *place) noexcept nogil:
        cdef link_place link
        cdef int64_t *known
        if not clean_name(self.parser.entry.link, self.parser.entry.link_len, &self.cleaned_link):
            return False
        known = map_find(&self.names, self.cleaned_link.data, self.cleaned_link.size)
        link.entry = known[0] if known != NULL else -1
        link.size = self.cleaned_link.size
        place.link_at = self.links.size
        return (buffer_append(&self.links, &link, sizeof(link))
                and buffer_append(&self.links, self.cleaned_link.data, self.cleaned_link.size))

    cdef const uint8_t *link_of(self, const entry_place *entry, link_place *link) noexcept nogil:
        memcpy(link, self.links.data + entry.link_at, sizeof(link_place))
        return self.links.data + entry.link_at + sizeof(link_place)

    def check_links(self):
        """A hard link means the entry that had the name before it: were that one dropped, it would mean another."""
        cdef link_place link
        cdef const uint8_t *target
        cdef int64_t i
        for i in range(<int64_t>(self.entries.size // sizeof(entry_place))):
            if self.at(i).state == ENTRY_DROPPED or self.at(i).link_at < 0:
                continue
            target = self.link_of(self.at(i), &link)
            if link.entry >= 0 and self.at(link.entry).state == ENTRY_DROPPED:
                raise TarError(
                    f"{self.name_of(i)}: is a hard link to {target[:link.size].decode('utf-8', 'backslashreplace')} as it was "
                    f"before a later entry of that name (at byte {self.at(i).begin - self.begin}); "
                    "make the tar without entries that replace others, or prefetch nothing"
                )

    cdef str name_of(self, int64_t index):
        cdef map_slot *slot
        cdef size_t i
        for i in range(self.names.capacity):
            slot = &self.names.slots[i]
            if slot.used and slot.value == index:
                # A slice without an end would be read up to a NUL, which keys do not have.
                return self.names.keys.data[slot.key_at:slot.key_at + slot.key_size].decode("utf-8", "backslashreplace")
        return "input"

    # --------------------------------------------------------------------------------------------- the order

    cdef int pick_path(self, const uint8_t *path, size_t size, int links) noexcept nogil:
        """Picks a path behind its parents, those that have entries: PATH_PRESENT, PATH_ABSENT, or a code."""
        cdef size_t at = 0
        cdef int found = PATH_PRESENT
        cdef int64_t *index = map_find(&self.names, path, 0)
        if size and map_find(&self.names, path, size) == NULL:
            return PATH_ABSENT
        if index != NULL:
            found = self.pick_entry(index[0], links)
        while found == PATH_PRESENT and at < size:
            at += 1 if at else 0
            while at < size and path[at] != c'/':
                at += 1
            index = map_find(&self.names, path, at)
            if index != NULL:
                found = self.pick_entry(index[0], links)
        return found

    cdef int pick_entry(self, int64_t index, int links) noexcept nogil:
        """Picks an entry behind what it links to; a link that leads nowhere, or in a circle, is not picked."""
        cdef entry_place *entry = self.at(index)
        cdef link_place link
        cdef const uint8_t *target
        cdef int found = PATH_PRESENT
        if entry.state == ENTRY_PICKED:
            return PATH_PRESENT
        if entry.link_at >= 0:
            if entry.state == ENTRY_PENDING or links == LINKS_IN_A_ROW:
                return PATH_ABSENT
            entry.state = ENTRY_PENDING
            target = self.link_of(entry, &link)
            found = self.pick_path(target, link.size, links + 1)
            entry.state = ENTRY_LEFT
        if found == PATH_PRESENT:
            if not buffer_append(&self.picked, &index, sizeof(index)):
                return EST_NO_MEMORY
            entry.state = ENTRY_PICKED
        return found

    # --------------------------------------------------------------------------------------------- feeding

    cdef int feed_run(self, int64_t begin, int64_t end) noexcept nogil:
        return self.builder.feed_from(self.file, begin, end - begin) if begin < end else EST_OK

    cdef int feed_left(self) noexcept nogil:
        cdef int64_t count = self.entries.size // sizeof(entry_place)
        cdef int64_t begin = 0
        cdef int64_t end = 0
        cdef int64_t i
        cdef int code
        for i in range(count):
            if self.at(i).state != ENTRY_LEFT:
                continue
            if self.at(i).begin != end:
                code = self.feed_run(begin, end)
                if code:
                    return code
                begin = self.at(i).begin
            end = self.at(i).end
        if self.tail_begin != end:
            code = self.feed_run(begin, end)
            if code:
                return code
            begin = self.tail_begin
        return self.feed_run(begin, self.tail_end)
