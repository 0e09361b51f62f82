"""The order of a layer: entries and payloads in, batches of whole members out to the pipeline.

Where members begin is decided here and nowhere else, from the stream's content and the options alone:

- a chunk of a payload begins a member, unless the open member holds less than the minimum member size and some payload;
- a run of bytes without payload (headers, padding, trailing zeros) that exceeds RUN_LIMIT begins another.

A batch only ever ends where a member ends, so neither batches nor threads can be seen in the output.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EINTR, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memcmp, memcpy, memset

from posix.fcntl cimport F_GETFL, O_NONBLOCK, fcntl
from posix.unistd cimport read

cdef extern from "glance.h" nogil:
    bint est_glance(const bint *place)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int handle, void *data, size_t size, int64_t offset)

cdef extern from "<poll.h>" nogil:
    enum: POLLIN
    struct pollfd:
        int fd
        short events
    int poll(pollfd *fds, unsigned long count, int milliseconds)

from estargz._codec cimport CODEC_COPY, CODEC_GZIP, CODEC_NONE, CODEC_PORTABLE, CODEC_ZSTD, compresses
from estargz._crew cimport Crew
from estargz._memory cimport buffer, buffer_append, buffer_free, map_free, map_insert
from estargz._pipeline cimport BATCH_PIECE, STAGE_TOC, Pipeline, batch, chunk_span, file_fill, member_span, set_failure
from estargz._rows cimport (
    EST_CANCELLED, EST_FORKED, EST_NO_MEMORY, EST_OK, EST_READ, EST_RESERVED_NAME, EST_SHRANK, EST_SINK, EST_TAR_DANGLING_META,
    EST_TAR_HALF_PADDING, EST_TAR_LONE_ZERO, EST_TAR_TRUNCATED, EST_TOC_SIZE, tar_entry, toc_row,
)
from estargz._sha256 cimport sha256_job, sha256_run
from estargz._tar cimport (
    TAR_ENTRY, TAR_META, TAR_ZERO, tar_emit, tar_emit_bound, tar_parse_block, tar_parse_meta, tar_parser_free, tar_parser_init,
)
from estargz._toc cimport toc_close, toc_entry, toc_open, toc_row_from_entry

from estargz.errors import EstargzError, UsageError, from_status

cdef enum:
    BLOCK = 512
    BATCH_TARGET = 1 << 20              # a batch ends at the first member end behind this; 256 KiB to 1 MiB measure alike
    RUN_LIMIT = (1 << 20) + (1 << 16)   # more than the largest extended header
    PLAIN_MEMBER = 1 << 20              # member size of a plain gzip layer: 0.1 % larger than one single member
    ZSTD_FRAME = 4 << 20                # ... of a zstd layer (docs/format.md), as large as most levels' windows are at most
    ZSTD_FRAME_LARGE = 8 << 20          # ... at levels whose window is twice that
    ZSTD_LEVEL_LARGE = 17
    PIECE_SIZE = 256 << 10              # of the table of contents, so that a small one still keeps several threads busy
    FOOTER_SIZE = 51
    TABLE_MOST = 1 << 30                # bytes of the table of contents in memory and as JSON, as a reader's Limits.toc_size
    ROWS_A_TURN = 8192                  # of the table of contents: some milliseconds
    LISTEN_MS = 100                     # between two looks for signals while a pipe is silent
    MEMBERS_MOST = 8192                 # in a batch: each costs up to MEMBER_OVERHEAD bytes of its output buffer

# What the next input bytes of a tar stream are.
cdef enum:
    EXPECT_BLOCK
    EXPECT_META
    EXPECT_CHUNK
    EXPECT_PADDING
    EXPECT_TRAILER

cdef uint8_t EMPTY_DIGEST[32]
EMPTY_DIGEST[:] = list(bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"))
cdef uint8_t ZEROS[1024]
memset(ZEROS, 0, 1024)

CODECS = {"none": CODEC_NONE, "uncompressed": CODEC_COPY, "gzip": CODEC_GZIP, "zstd": CODEC_ZSTD, "estargz": CODEC_GZIP}


cdef size_t plain_member(int codec, int level) noexcept nogil:
    """Bytes that a member holds before another one begins, where nobody but the compressor cares."""
    if codec != CODEC_ZSTD:
        return PLAIN_MEMBER
    return ZSTD_FRAME if level < ZSTD_LEVEL_LARGE else ZSTD_FRAME_LARGE


cdef inline size_t padding_of(int64_t size) noexcept nogil:
    return (BLOCK - size % BLOCK) % BLOCK


cdef bint is_zero(const uint8_t *data, size_t size) noexcept nogil:
    """Whether size bytes, 0 or more, are all zero."""
    return size == 0 or (data[0] == 0 and memcmp(data, data + 1, size - 1) == 0)


cdef bint is_toc_name(const uint8_t *name, size_t size) noexcept nogil:
    """Whether a name means the table of contents once "." and ".." are resolved."""
    cdef size_t at = 0
    cdef size_t end
    cdef size_t depth = 0
    cdef size_t first = 0
    cdef size_t first_size = 0
    while at <= size:
        end = at
        while end < size and name[end] != c'/':
            end += 1
        if end - at == 2 and name[at] == c'.' and name[at + 1] == c'.':
            depth -= 1 if depth else 0
        elif end > at and not (end - at == 1 and name[at] == c'.'):
            depth += 1
            if depth == 1:
                first = at
                first_size = end - at
        at = end + 1
    return depth == 1 and first_size == 17 and memcmp(name + first, b"stargz.index.json", 17) == 0


cdef tar_entry small_file(bytes name, int64_t size) noexcept:
    """An entry of a regular file that says nothing but name and size; valid as long as `name`."""
    cdef tar_entry entry
    memset(&entry, 0, sizeof(entry))
    entry.name = name
    entry.name_len = len(name)
    entry.type = c'0'
    entry.size = size
    return entry


ctypedef struct layer_shape:
    bint keep_rows              # of a table of contents
    int64_t chunk_size, member_minimum, member_maximum
    int64_t batch               # bytes of the stream that a batch has room for
    int64_t batch_memory        # bytes that a batch takes


cdef layer_shape shape_of(str compression, int level, int64_t chunk_size, int64_t min_chunk_size):
    """How long members and batches get."""
    cdef layer_shape shape
    cdef int codec = CODECS[compression]
    shape.keep_rows = compression in ("estargz", "none")
    shape.chunk_size = chunk_size if shape.keep_rows else PLAIN_MEMBER
    shape.member_minimum = plain_member(codec, level)
    if shape.keep_rows:
        shape.member_minimum = min_chunk_size if compression == "estargz" else 0
    shape.member_maximum = shape.member_minimum + shape.chunk_size + RUN_LIMIT
    # A batch is closed when it has not room for the longest member that may come; small chunks must not close it early.
    shape.batch = shape.member_maximum + (BATCH_TARGET if shape.member_minimum or shape.chunk_size < BATCH_TARGET else 0)
    shape.batch_memory = shape.batch * (2 if compresses(codec) else 1)
    return shape


def batch_memory(*, str compression, int level, int64_t chunk_size, int64_t min_chunk_size):
    """Bytes that one batch of such a layer takes; a build needs two."""
    return shape_of(compression, level, chunk_size, min_chunk_size).batch_memory


cdef class LayerBuilder:
    """Builds one layer from entries or from a tar stream.

    compression: "estargz", "gzip", "zstd", "uncompressed" or "none" (digests only); level 0..12, of zstd 1..19;
    portable: no byte is ISA-L's; chunk_size and min_chunk_size in bytes, for eStargz; threads >= 1; memory: bytes that batches may
    take; producer_helps, write, output, progress, crew, parts: see Pipeline. UsageError when the options cannot be honoured together.
    """

    def __cinit__(self, *, str compression, int level, bint portable, int64_t chunk_size, int64_t min_chunk_size,
                  int threads, int64_t memory, bint producer_helps, write=None, str output="output", progress=None,
                  Crew crew=None, parts=None):
        cdef int64_t slots
        cdef int codec = CODECS[compression]
        cdef layer_shape shape = shape_of(compression, level, chunk_size, min_chunk_size)
        if portable and codec == CODEC_GZIP:
            codec = CODEC_PORTABLE
        self.indexed = compression == "estargz"
        self.keep_rows = shape.keep_rows
        self.chunk_size = shape.chunk_size
        self.member_minimum = shape.member_minimum
        self.member_maximum = shape.member_maximum
        if shape.batch > 0x7FFFFFFF:
            raise UsageError("chunk size and minimum chunk size together exceed 2 GiB; choose smaller ones")
        slots = memory // shape.batch_memory
        if slots < 2:
            what, remedy = f"chunks of {chunk_size} bytes", ", or smaller chunks"
            if not self.keep_rows:
                what, remedy = f"compression {compression} at level {level}", ""
            raise UsageError(
                f"a memory budget of {memory} bytes is too small for {what}: give at least {2 * shape.batch_memory} bytes{remedy}"
            )
        self.pipeline = Pipeline(codec, level, shape.batch, min(slots, 4 * threads + 4), threads,
                                 producer_helps, self.keep_rows, write, output, progress, MEMBERS_MOST, crew, parts)
        if tar_parser_init(&self.parser) != EST_OK:
            raise MemoryError
        self.parser_ready = True
        self.archive_end = self.hidden_at = -1
        self.target = NULL
        self.landmark_row = -1

    def __dealloc__(self):
        if self.parser_ready:
            tar_parser_free(&self.parser)
        map_free(&self.last_names)
        buffer_free(&self.names)

    # --------------------------------------------------------------------------------------------- stream order

    cdef int set_failure(self, int code, int sys_errno, int64_t offset, const void *name, size_t size) noexcept nogil:
        set_failure(&self.failure, code, sys_errno, offset, name, size)
        return code

    cdef void close_member(self) noexcept nogil:
        if self.current.raw_size > self.member_at:
            self.add_member()

    cdef void close_stream(self) noexcept nogil:
        """Closes the last member. A stream of no bytes is one too, unless a table follows: a blob of none is no gzip."""
        self.close_member()
        if not (self.indexed or self.current.number or self.current.raw_size):
            self.add_member()

    cdef void add_member(self) noexcept nogil:
        cdef member_span span
        span.raw_at = self.member_at
        span.raw_end = self.current.raw_size
        span.out_end = 0
        if not buffer_append(&self.current.members, &span, sizeof(span)):
            self.failure.code = EST_NO_MEMORY
        self.member_at = self.current.raw_size

    cdef int new_member(self, size_t room) noexcept nogil:
        """Ends the open member; ends the batch too when it is full or has not `room` for the next."""
        if self.current != NULL:
            self.close_member()
            if self.failure.code:
                return self.failure.code
            if (self.current.raw_size >= BATCH_TARGET or self.current.raw_size + room > self.pipeline.raw_capacity
                    or self.current.members.size >= MEMBERS_MOST * sizeof(member_span)):
                self.pipeline.submit(self.current)
                self.current = NULL
        self.run = 0
        if self.current == NULL:
            self.current = self.pipeline.acquire()
            self.member_at = 0
        if self.current == NULL:
            return EST_CANCELLED
        return self.failure.code

    cdef uint8_t *header_space(self, size_t size) noexcept nogil:
        """Room for bytes that are no payload, size <= RUN_LIMIT; NULL after a failure."""
        cdef uint8_t *space
        if self.current == NULL or (self.run and self.run + size > RUN_LIMIT):
            if self.new_member(self.member_maximum):
                return NULL
        space = self.current.raw + self.current.raw_size
        self.current.raw_size += size
        self.run += size
        return space

    cdef uint8_t *chunk_space(self, int64_t chunk_offset, size_t size, int64_t file_size) noexcept nogil:
        """Room for one chunk of the last entry's payload; NULL after a failure."""
        cdef size_t open_size = self.current.raw_size - self.member_at if self.current != NULL else 0
        cdef chunk_span chunk
        cdef uint8_t *space
        # No payload lies in the member at offset 0: readers take entries that state no offset for parts of that one.
        if self.current == NULL or (open_size and (open_size >= self.member_minimum or (self.indexed and not self.has_payload))):
            if self.new_member(self.member_maximum if self.member_minimum else size + RUN_LIMIT):
                return NULL
        if self.keep_rows:
            chunk.raw_at = self.current.raw_size
            chunk.size = size
            chunk.member = self.current.members.size // sizeof(member_span)
            chunk.row = self.row_count - 1
            chunk.chunk_offset = chunk_offset
            chunk.only = <int64_t>size == file_size
            chunk.last = chunk_offset + <int64_t>size == file_size
            if not buffer_append(&self.current.chunks, &chunk, sizeof(chunk)):
                self.failure.code = EST_NO_MEMORY
                return NULL
        self.has_payload = True
        space = self.current.raw + self.current.raw_size
        self.current.raw_size += size
        self.run = 0
        return space

    cdef int end_payload(self, int64_t size) noexcept nogil:
        cdef size_t padding = padding_of(size)
        cdef uint8_t *space
        if padding:
            space = self.header_space(padding)
            if space == NULL:
                return EST_CANCELLED
            memset(space, 0, padding)
        return EST_OK

    # --------------------------------------------------------------------------------------------- rows

    cdef int keep_name(self, uint8_t kind, int64_t identity, const uint8_t *name, uint32_t size) noexcept nogil:
        """1 when a user or group name differs from the last one given for its id, 0 when not; or a code."""
        cdef uint8_t key[9]
        cdef int64_t *known
        cdef uint32_t known_size
        if not size:
            return 0
        key[0] = kind
        memcpy(key + 1, &identity, 8)
        known = map_insert(&self.last_names, key, 9, -1)
        if known == NULL:
            return EST_NO_MEMORY
        if known[0] >= 0:
            memcpy(&known_size, self.names.data + known[0], 4)
            if known_size == size and memcmp(self.names.data + known[0] + 4, name, size) == 0:
                return 0
        known[0] = self.names.size
        if not (buffer_append(&self.names, &size, 4) and buffer_append(&self.names, name, size)):
            return EST_NO_MEMORY
        return 1

    cdef int add_row(self, const tar_entry *entry) noexcept nogil:
        cdef toc_row row
        cdef int keep_user, keep_group, code
        cdef int64_t strings
        if self.indexed and is_toc_name(entry.name, entry.name_len):
            return self.set_failure(EST_RESERVED_NAME, 0, -1, entry.name, entry.name_len)
        if not self.keep_rows:
            return EST_OK
        keep_user = self.keep_name(c'u', entry.uid, entry.user_name, entry.user_name_len)
        keep_group = self.keep_name(c'g', entry.gid, entry.group_name, entry.group_name_len)
        if keep_user < 0 or keep_group < 0:
            return self.set_failure(EST_NO_MEMORY, 0, -1, NULL, 0)
        strings = self.current.strings.size
        code = toc_row_from_entry(entry, keep_user, keep_group, &row, &self.current.strings)
        if entry.type == c'0' and not entry.size:
            row.has_digest = 1
            memcpy(row.digest, EMPTY_DIGEST, 32)
        if code or not buffer_append(&self.current.rows, &row, sizeof(row)):
            return self.set_failure(EST_NO_MEMORY, 0, -1, NULL, 0)
        self.table_size += self.current.strings.size - strings + sizeof(row)
        if self.table_size > TABLE_MOST:
            return self.set_failure(EST_TOC_SIZE, 0, -1, entry.name, entry.name_len)
        self.row_count += 1
        return EST_OK

    # --------------------------------------------------------------------------------------------- entries from a walk

    cdef int add_entry(self, const tar_entry *entry) noexcept nogil:
        """Writes an entry's header; its payload, if any, is to follow by one of the two calls below."""
        cdef size_t bound = tar_emit_bound(entry)
        cdef uint8_t *space
        cdef ssize_t written
        if bound > RUN_LIMIT:
            bound = RUN_LIMIT
        # How long the run becomes must not depend on the bound, so the header is written first and then taken in.
        if self.current == NULL or self.current.raw_size + bound > self.pipeline.raw_capacity:
            space = self.header_space(bound)
            if space == NULL:
                return EST_CANCELLED
            self.current.raw_size -= bound
            self.run -= bound
        written = tar_emit(entry, self.current.raw + self.current.raw_size, bound)
        if written < 0:
            return self.set_failure(written, 0, -1, entry.name, entry.name_len)
        if self.run and self.run + written > RUN_LIMIT:
            if self.new_member(self.member_maximum):
                return EST_CANCELLED
            written = tar_emit(entry, self.current.raw + self.current.raw_size, bound)
        self.current.raw_size += written
        self.run += written
        return self.add_row(entry)

    cdef int add_payload_file(self, const source_file *file) noexcept nogil:
        """Has workers read the payload; file.size > 0."""
        cdef int64_t offset = 0
        cdef size_t size
        cdef file_fill fill
        fill.root = file.root
        fill.path_size = file.path_size
        fill.device = file.device
        fill.inode = file.inode
        fill.file_size = file.size
        fill.mtime_s = file.mtime_s
        fill.mtime_ns = file.mtime_ns
        while offset < file.size:
            size = min(self.chunk_size, file.size - offset)
            if self.chunk_space(offset, size, file.size) == NULL:
                return EST_CANCELLED
            fill.raw_at = self.current.raw_size - size
            fill.size = size
            fill.file_offset = offset
            fill.path_at = self.current.paths.size
            if not (buffer_append(&self.current.paths, file.path, file.path_size)
                    and buffer_append(&self.current.fills, &fill, sizeof(fill))):
                return self.set_failure(EST_NO_MEMORY, 0, -1, NULL, 0)
            offset += size
        return self.end_payload(file.size)

    cdef int add_payload_bytes(self, const uint8_t *data, size_t size) noexcept nogil:
        """A payload at hand; 0 < size <= chunk_size."""
        cdef uint8_t *space = self.chunk_space(0, size, size)
        if space == NULL:
            return EST_CANCELLED
        memcpy(space, data, size)
        return self.end_payload(size)

    cdef bint attend(self) noexcept nogil:
        """Lets signals and progress through while a walk takes long; False: give up."""
        return self.pipeline.attend()

    cdef void begin_turn(self) noexcept nogil:
        """A walk goes to work: it needs a seat of the crew, if there is one. To be followed by `end_turn`."""
        self.pipeline.begin_turn()

    cdef void end_turn(self) noexcept nogil:
        self.pipeline.end_turn()

    cdef int end_archive(self) noexcept nogil:
        cdef uint8_t *space = self.header_space(2 * BLOCK)
        if space == NULL:
            return EST_CANCELLED
        memset(space, 0, 2 * BLOCK)
        return EST_OK

    cdef int take(self) except -1:
        """One caller at a time: two would fill the same batch. To be followed by `leave`."""
        if self.pipeline.elsewhere():
            raise from_status(EST_FORKED)
        if self.in_use:
            raise EstargzError("the layer is being written by another thread, or by its own destination")
        self.in_use = True
        return 0

    cdef void leave(self) noexcept:
        self.in_use = False
        self.part()

    cdef void part(self) noexcept:
        """Gives back what an ended pipeline has of a crew's memory, unless another thread is filling the batch at hand."""
        if self.pipeline.crew != NULL and est_glance(&self.pipeline.closed) and not self.in_use:
            self.current = NULL
            self.target = NULL
            self.pipeline.release()

    def add_small_file(self, bytes name, bytes payload):
        """A regular file with an all-zero header, such as a landmark; 0 < len(payload) <= chunk size."""
        cdef const uint8_t *data = payload
        cdef size_t size = len(payload)
        cdef tar_entry entry = small_file(name, size)
        self.take()
        try:
            with nogil:
                if self.add_entry(&entry) == EST_OK:
                    self.add_payload_bytes(data, size)
            self.raise_failure()
        finally:
            self.leave()

    def end_prefetch(self, bytes name, bytes payload):
        """The landmark behind what is to be fetched ahead: a small file whose payload begins a member whatever the minimum.

        A tar stream may be under way, between two of its entries.
        """
        cdef const uint8_t *data = payload
        cdef size_t size = len(payload)
        cdef tar_entry entry = small_file(name, size)
        self.take()
        try:
            with nogil:
                if self.pause_feed() == EST_OK and self.add_entry(&entry) == EST_OK:
                    self.landmark_row = self.row_count - 1
                    if self.new_member(self.member_maximum) == EST_OK:
                        self.add_payload_bytes(data, size)
            self.raise_failure()
        finally:
            self.leave()

    @property
    def prefetch_size(self):
        """Bytes of the blob in front of the landmark's payload; None without `end_prefetch`. Valid after finish."""
        cdef int64_t rows = self.pipeline.table.rows.size // sizeof(toc_row)
        if not 0 <= self.landmark_row < rows:
            return None
        return (<toc_row *>self.pipeline.table.rows.data)[self.landmark_row].offset

    @property
    def tar_digest(self):
        """Digest of the stream in front of the table of contents: of all of it where there is none. Valid after finish."""
        return self.pipeline.tar_digest[:32]

    # --------------------------------------------------------------------------------------------- a tar stream

    def feed(self, data):
        """Takes the next bytes of a tar stream: any contiguous buffer, of any size."""
        cdef Py_buffer view
        cdef int code
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            self.take()
            try:
                with nogil:
                    code = self.feed_bytes(<const uint8_t *>view.buf, view.len)
                if code:
                    self.raise_failure()
            finally:
                self.leave()
        finally:
            PyBuffer_Release(&view)

    def stop_at_toc(self):
        """Takes a table of contents in the input for its end: the input may be an eStargz blob's inflated bytes.

        Whether it really is one only its footer tells, and that nothing but the table's own bytes came behind its
        header: then `toc_left` is 0. The caller looks at both, if `toc_seen` says so.
        """
        self.stops_at_toc = True

    def feed_fd(self, int fd):
        """Takes a tar stream from a file descriptor until its end, straight into the batches."""
        cdef int code
        self.take()
        try:
            with nogil:
                code = self.feed_from(fd, -1, 0)
            if code:
                self.raise_failure()
        finally:
            self.leave()

    cdef int feed_from(self, int fd, int64_t at, int64_t size) noexcept nogil:
        """Takes `size` bytes of a file from `at` on; or, where `at` is negative, all that the descriptor gives."""
        cdef int code = EST_OK
        cdef size_t room
        cdef ssize_t got
        if self.target == NULL:
            code = self.expect(EXPECT_BLOCK, BLOCK)
        while not code and (size or at < 0):
            room = self.target_size - self.target_filled
            if at < 0:
                if not self.wait_readable(fd):
                    code = self.set_failure(EST_CANCELLED, 0, -1, NULL, 0)
                    break
                got = read(fd, self.target + self.target_filled, room)
            else:
                got = pread(fd, self.target + self.target_filled, min(<int64_t>room, size), at)
            if got < 0:
                if errno != EINTR:
                    code = self.set_failure(EST_READ, errno, self.input_offset, "input", 5)
                elif not self.pipeline.call_back():
                    code = self.set_failure(EST_CANCELLED, 0, -1, NULL, 0)
                continue
            if got == 0:
                if at >= 0:
                    code = self.set_failure(EST_SHRANK, 0, at, NULL, 0)
                break
            if at >= 0:
                at += got
                size -= got
            self.target_filled += got
            if self.target_filled == self.target_size:
                code = self.target_full()
        return code

    cdef bint wait_readable(self, int fd) noexcept nogil:
        """Waits for a pipe's next bytes a while at a time, because a signal that comes just before a read interrupts nothing.
        False once a signal's handler has raised."""
        cdef pollfd waiting
        cdef int ready
        waiting.fd = fd
        waiting.events = POLLIN
        if fcntl(fd, F_GETFL) & O_NONBLOCK:
            return True         # nor does a read wait: it tells so
        while True:
            ready = poll(&waiting, 1, LISTEN_MS)
            if ready > 0 or (ready < 0 and errno != EINTR):
                return True     # the read tells what is wrong
            if not self.pipeline.call_back():
                return False

    cdef int pause_feed(self) noexcept nogil:
        """Gives back the room that the next header of a tar stream was to fill."""
        if self.target == NULL:
            return EST_OK
        if self.expecting != EXPECT_BLOCK or self.target_filled or self.parser.pending or self.zero_blocks:
            return self.input_failed(EST_TAR_TRUNCATED)
        self.current.raw_size -= self.target_size
        self.run -= self.target_size
        self.target = NULL
        return EST_OK

    def end_feed(self):
        """The tar stream's end: TarError where it is truncated, or where a table of contents cannot follow."""
        cdef int code
        self.take()
        try:
            if self.toc_seen:
                return
            with nogil:
                code = self.end_tar()
            if code:
                self.raise_failure()
        finally:
            self.leave()

    cdef int end_tar(self) noexcept nogil:
        """Gives back the room of what did not come, where a tar may end."""
        cdef size_t missing
        if self.target == NULL:
            if self.landmark_row >= 0:
                return EST_OK       # nothing was left to come behind the landmark
            if self.expect(EXPECT_BLOCK, BLOCK):
                return EST_CANCELLED
        missing = self.target_size - self.target_filled
        if self.expecting == EXPECT_PADDING:
            # What follows in an eStargz layer are blocks, which a reader of tars finds at a block's border only.
            if self.keep_rows:
                self.input_offset += self.target_filled
                return self.input_failed(EST_TAR_HALF_PADDING)
        elif self.expecting == EXPECT_TRAILER:
            if self.hidden_at < 0 and not is_zero(self.target, self.target_filled):
                self.hidden_at = self.input_offset
        elif self.expecting != EXPECT_BLOCK or self.target_filled:
            self.input_offset += self.target_filled
            return self.input_failed(EST_TAR_TRUNCATED)
        elif self.parser.pending:
            return self.input_failed(EST_TAR_DANGLING_META)
        self.current.raw_size -= missing
        self.run -= missing
        return EST_OK

    cdef int input_failed(self, int code) noexcept nogil:
        return self.set_failure(code, 0, self.input_offset, self.parser.entry.name, self.parser.entry.name_len)

    cdef int feed_bytes(self, const uint8_t *data, size_t size) noexcept nogil:
        cdef size_t part
        cdef int code
        if self.target == NULL:
            code = self.expect(EXPECT_BLOCK, BLOCK)
            if code:
                return code
        if self.toc_seen:
            self.toc_left -= size
            return EST_OK
        while size:
            part = min(size, self.target_size - self.target_filled)
            memcpy(self.target + self.target_filled, data, part)
            self.target_filled += part
            data += part
            size -= part
            if self.target_filled == self.target_size:
                code = self.target_full()
                if code:
                    return code
                if self.toc_seen:
                    self.toc_left -= size
                    break
        return EST_OK

    cdef int expect(self, int what, size_t size) noexcept nogil:
        return self.expect_at(what, self.header_space(size), size)

    cdef int expect_at(self, int what, uint8_t *space, size_t size) noexcept nogil:
        self.target = space
        if space == NULL:
            return EST_CANCELLED
        self.expecting = what
        self.target_size = size
        self.target_filled = 0
        return EST_OK

    cdef int expect_chunk(self) noexcept nogil:
        cdef size_t size = min(self.chunk_size, self.payload_left)
        return self.expect_at(EXPECT_CHUNK, self.chunk_space(self.chunk_offset, size,
                                                             self.chunk_offset + self.payload_left), size)

    cdef int target_full(self) noexcept nogil:
        """Acts on the bytes that were waited for and says what is expected next."""
        cdef size_t size = self.target_size
        cdef size_t padding
        cdef int code
        if self.expecting == EXPECT_BLOCK:
            return self.take_block()
        self.input_offset += size
        if self.expecting == EXPECT_META:
            code = tar_parse_meta(&self.parser, self.target)
            if code:
                return self.input_failed(code)
        elif self.expecting == EXPECT_CHUNK:
            self.chunk_offset += size
            self.payload_left -= size
            if self.payload_left:
                return self.expect_chunk()
            padding = padding_of(self.chunk_offset)
            if padding:
                return self.expect(EXPECT_PADDING, padding)
        elif self.expecting == EXPECT_TRAILER:
            if (self.stops_at_toc and memcmp(self.target, b"stargz.index.json", 18) == 0
                    and tar_parse_block(&self.parser, self.target) == TAR_ENTRY):
                return self.take_toc()
            if self.hidden_at < 0 and not is_zero(self.target, BLOCK):
                self.hidden_at = self.input_offset - BLOCK
            return self.expect(EXPECT_TRAILER, BLOCK)
        return self.expect(EXPECT_BLOCK, BLOCK)

    cdef int take_toc(self) noexcept nogil:
        """The block at hand begins the input's own table of contents: neither belongs to the tar it was made from."""
        self.toc_seen = True
        self.toc_left = self.parser.entry.size + padding_of(self.parser.entry.size) + 2 * BLOCK
        self.current.raw_size -= BLOCK
        self.run -= BLOCK
        return EST_OK

    cdef int take_block(self) noexcept nogil:
        cdef int found = tar_parse_block(&self.parser, self.target)
        cdef int code
        if self.stops_at_toc and found == TAR_ENTRY and is_toc_name(self.parser.entry.name, self.parser.entry.name_len):
            return self.take_toc()
        if self.zero_blocks and found != TAR_ZERO:
            return self.input_failed(EST_TAR_LONE_ZERO)
        if found < 0:
            return self.input_failed(found)
        self.input_offset += BLOCK
        if found == TAR_META:
            if self.parser.meta_size == 0:
                code = tar_parse_meta(&self.parser, self.target)
                return self.input_failed(code) if code else self.expect(EXPECT_BLOCK, BLOCK)
            return self.expect(EXPECT_META, self.parser.meta_size + padding_of(self.parser.meta_size))
        if found == TAR_ENTRY:
            code = self.add_row(&self.parser.entry)
            if code:
                self.failure.offset = self.input_offset - BLOCK
                return code
            self.payload_left = self.parser.entry.size
            self.chunk_offset = 0
            return self.expect_chunk() if self.payload_left else self.expect(EXPECT_BLOCK, BLOCK)
        if not self.zero_blocks:
            self.archive_end = self.input_offset - BLOCK
        self.zero_blocks += 1
        return self.expect(EXPECT_BLOCK if self.zero_blocks == 1 else EXPECT_TRAILER, BLOCK)

    # --------------------------------------------------------------------------------------------- end

    def cancel(self):
        """Gives up: ends the threads, drops what is unfinished. Harmless when called again or after finish."""
        self.pipeline.close(True)
        self.part()

    def raise_failure(self):
        """Raises the failure that comes first in the stream, if there is one; the builder is then closed."""
        cdef int code
        if not self.failure.code and not self.pipeline.has_failed():
            return
        with nogil:
            code = self.pipeline.drain()
        self.pipeline.close(code != EST_OK)
        self.pipeline.raise_failure()
        if self.failure.code == EST_SINK:
            raise self.pipeline.sink_error
        name = self.failure.name[:self.failure.name_len].decode("utf-8", "backslashreplace") or self.input_name
        raise from_status(self.failure.code, self.failure.sys_errno, name, self.failure.offset)

    def finish(self):
        """Writes what is left. (blob size, blob digest, uncompressed size, DiffID, TOC digest or None)."""
        cdef int code
        self.take()
        try:
            with nogil:
                if self.current != NULL:
                    self.close_stream()
                if self.current != NULL and not self.failure.code:
                    self.pipeline.submit(self.current)
                    self.current = NULL
                code = self.failure.code if self.failure.code else self.pipeline.drain()
                if not code and self.indexed:
                    self.pipeline.producing = STAGE_TOC
                    code = self.write_toc()
            if code or self.failure.code:
                self.raise_failure()
            self.pipeline.close()
            blob_size, blob_digest, tar_size, diff_id, toc_digest = self.pipeline.result()
            return blob_size, blob_digest, tar_size, diff_id, toc_digest if self.indexed else None
        finally:
            self.leave()

    def stages(self):
        """Seconds by stage, of all threads together; see Pipeline.stages. Valid after finish."""
        threads = self.pipeline.stages()
        return {name: sum(thread[name] for thread in threads) for name in threads[0]}

    def ending(self):
        """Of a tar that was fed, in bytes of it: (where its first zero block stands or -1, how many zero blocks end it, at
        most 2, where the first block that is not zero stands behind them or -1)."""
        return self.archive_end, self.zero_blocks, self.hidden_at

    def extent(self):
        """See Pipeline.extent."""
        return self.pipeline.extent()

    def tables(self):
        """(rows, chunks, strings) as bytes; see Pipeline.tables. Valid after finish."""
        return self.pipeline.tables()

    # --------------------------------------------------------------------------------------------- TOC and footer

    cdef int64_t toc_size(self, buffer *text) noexcept nogil:
        """Bytes of the JSON, which its tar header must state before the first of them; or a code."""
        cdef int64_t total, row
        text.size = 0
        if toc_open(&self.pipeline.table, text):
            return EST_NO_MEMORY
        total = text.size
        for row in range(self.row_count):
            if row % ROWS_A_TURN == 0:
                self.pipeline.let_others()
            text.size = 0
            if toc_entry(&self.pipeline.table, row, self.chunk_size, text):
                return EST_NO_MEMORY
            total += text.size
            if total > TABLE_MOST:
                return EST_TOC_SIZE
        text.size = 0
        if toc_close(&self.pipeline.table, text):
            return EST_NO_MEMORY
        return total + text.size

    cdef int write_toc(self) noexcept nogil:
        cdef buffer text
        cdef int code
        memset(&text, 0, sizeof(text))
        self.pipeline.begin_turn()
        code = write_toc_member(self, &text)
        if code and code != EST_CANCELLED:  # what was cancelled has its reason already
            self.set_failure(code, 0, -1, NULL, 0)
        self.pipeline.end_turn()
        buffer_free(&text)
        if not code:
            code = self.pipeline.drain()
        if not code:
            code = write_footer(self)
            if code:
                self.pipeline.describe_sink_failure(code, &self.failure)
        return code

    cdef int append_piece(self, const uint8_t *data, size_t size, bint digested) noexcept nogil:
        cdef size_t part
        while size:
            if self.current != NULL and self.current.raw_size == PIECE_SIZE:
                if self.submit_piece(False):
                    return EST_CANCELLED
            if self.current == NULL:
                self.current = self.pipeline.acquire()
                if self.current == NULL:
                    return EST_CANCELLED
                self.current.kind = BATCH_PIECE
                self.current.first_piece = not self.pieces_begun
                self.pieces_begun = True
                self.current.last_piece = False
                self.current.digest_from = 0
                self.current.digest_end = 0
            part = min(size, PIECE_SIZE - self.current.raw_size)
            memcpy(self.current.raw + self.current.raw_size, data, part)
            if digested:
                if not self.current.digest_end:
                    self.current.digest_from = self.current.raw_size
                self.current.digest_end = self.current.raw_size + part
            self.current.raw_size += part
            data += part
            size -= part
        return EST_OK

    cdef int submit_piece(self, bint last) noexcept nogil:
        self.current.last_piece = last
        self.pipeline.submit(self.current)
        self.current = NULL
        return EST_OK


cdef int write_toc_member(LayerBuilder builder, buffer *text) noexcept nogil:
    """The last member but the footer: a tar of one entry, and the end of the whole stream."""
    cdef uint8_t header[BLOCK]
    cdef tar_entry entry
    cdef int64_t row
    cdef int64_t size = builder.toc_size(text)
    cdef int code
    if size < 0:
        return size
    memset(&entry, 0, sizeof(entry))
    entry.name = <const uint8_t *>b"stargz.index.json"
    entry.name_len = 17
    entry.type = c'0'
    entry.size = size
    if tar_emit(&entry, header, BLOCK) != BLOCK:
        return EST_NO_MEMORY
    code = builder.append_piece(header, BLOCK, False)
    text.size = 0
    if not code:
        code = toc_open(&builder.pipeline.table, text)
    for row in range(builder.row_count):
        if code:
            break
        code = toc_entry(&builder.pipeline.table, row, builder.chunk_size, text)
        if not code and text.size >= PIECE_SIZE:
            code = builder.append_piece(text.data, text.size, True)
            text.size = 0
    if not code:
        code = toc_close(&builder.pipeline.table, text)
    if not code:
        code = builder.append_piece(text.data, text.size, True)
    if not code:
        code = builder.append_piece(ZEROS, padding_of(size), False)
    if not code:
        code = builder.append_piece(ZEROS, 2 * BLOCK, False)
    if code:
        return code
    return builder.submit_piece(True)


cdef int write_footer(LayerBuilder builder) noexcept nogil:
    """An empty gzip member whose header carries the table's offset (docs/format.md)."""
    cdef uint8_t footer[FOOTER_SIZE]
    cdef int64_t offset = builder.pipeline.piece_offset
    cdef sha256_job job
    cdef int i
    memset(footer, 0, FOOTER_SIZE)
    memcpy(footer, b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0", 16)
    for i in range(16):
        footer[31 - i] = b"0123456789abcdef"[offset & 15]
        offset >>= 4
    memcpy(footer + 32, b"STARGZ\x01\0\0\xff\xff", 11)
    job.stream = &builder.pipeline.blob_hash
    job.data = footer
    job.size = FOOTER_SIZE
    sha256_run(&job, 1)
    return builder.pipeline.write_out(footer, FOOTER_SIZE)
