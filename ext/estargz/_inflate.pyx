"""Decompression: gzip (libisal) and zstd (libzstd) streams, and the chunks of an eStargz blob.

    raw -> decoder -> bytes                        InflateReader
    fd | buffer -> chunk jobs -> decoder -> SHA-256    check_chunks, read_chunk
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp, memcpy, memmove, memset
from posix.types cimport off_t

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

from estargz._rows cimport (
    EST_GZIP_CHECKSUM,
    EST_GZIP_DATA,
    EST_GZIP_TRUNCATED,
    EST_NO_MEMORY,
    EST_OK,
    EST_READ,
    EST_TRAILING_GARBAGE,
    EST_ZSTD_DATA,
    EST_ZSTD_TRUNCATED,
)
from estargz._sha256 cimport sha256_finish, sha256_job, sha256_run, sha256_start, sha256_stream

from threading import Lock

from estargz.errors import SourceError, from_status

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buffer, size_t count, off_t offset)

cdef extern from "<isa-l/igzip_lib.h>" nogil:
    enum:
        ISAL_GZIP_NO_HDR      # raw deflate; the CRC-32 of the output is kept in state.crc
        ISAL_BLOCK_FINISH
        ISAL_BLOCK_INPUT_DONE # the deflate stream has ended, but its output is not handed out yet
        ISAL_INVALID_LOOKBACK
        ISAL_DEF_HIST_SIZE    # how far back a match may reach
    struct inflate_state:
        uint8_t *next_out
        uint32_t avail_out
        uint8_t *next_in
        uint32_t avail_in
        int32_t read_in_length  # bits taken from next_in and not used yet
        int block_state
        uint32_t crc_flag
        uint32_t crc
        int32_t tmp_out_valid      # bytes that were inflated ahead of next_out,
        int32_t tmp_out_processed  # and how many of them were handed out
        uint8_t tmp_out_buffer[1]
    void isal_inflate_init(inflate_state *state)
    void isal_inflate_reset(inflate_state *state)
    int isal_inflate(inflate_state *state)

cdef extern from "<isa-l/crc.h>" nogil:
    uint32_t crc32_gzip_refl(uint32_t crc, const uint8_t *data, uint64_t length)

cdef extern from "<zstd.h>" nogil:
    ctypedef struct ZSTD_DCtx
    ctypedef struct ZSTD_inBuffer:
        const void *src
        size_t size
        size_t pos
    ctypedef struct ZSTD_outBuffer:
        void *dst
        size_t size
        size_t pos
    enum: ZSTD_d_windowLogMax
    enum: ZSTD_reset_session_only
    ZSTD_DCtx *ZSTD_createDCtx()
    size_t ZSTD_freeDCtx(ZSTD_DCtx *context)
    size_t ZSTD_DCtx_setParameter(ZSTD_DCtx *context, int parameter, int value)
    size_t ZSTD_DCtx_reset(ZSTD_DCtx *context, int directive)
    size_t ZSTD_decompressStream(ZSTD_DCtx *context, ZSTD_outBuffer *output, ZSTD_inBuffer *input)
    unsigned int ZSTD_isError(size_t code)

cdef extern from "<zstd_errors.h>" nogil:
    enum: ZSTD_error_frameParameter_windowTooLarge
    enum: ZSTD_error_memory_allocation
    int ZSTD_getErrorCode(size_t code)

cdef enum:
    INPUT_BLOCK = 262144      # bytes per read of the compressed side
    OUTPUT_BLOCK = 262144     # bytes inflated between two hash updates
    CALL_MAX = 1 << 30        # the libraries count in 32 bits
    ZSTD_FIRST_UNIT = 5       # magic number and the byte that says how long the frame's header is
    WINDOW_LOG_MAX = 27       # zstd: 128 MiB, what `zstd --long` makes and every decoder accepts
    EST_ZSTD_WINDOW = -1000   # private: the frame wants a larger window
    DIGEST_DIFFERS = 1        # private, of a chunk job: inflated, but not to the bytes that the digest promises
    FILE_DIFFERS = 2          # likewise for the digest of the whole file

# What a decoder expects next. gzip: RFC 1952, section 2.3, field by field.
cdef enum stage_kind:
    STAGE_START, STAGE_FIXED, STAGE_EXTRA_LENGTH, STAGE_EXTRA, STAGE_NAME, STAGE_COMMENT, STAGE_HEADER_CRC
    STAGE_BODY, STAGE_DAMAGED, STAGE_TRAILER, STAGE_BORDER, STAGE_PADDING, STAGE_END

cdef enum header_flag:
    FLAG_HEADER_CRC = 2
    FLAG_EXTRA = 4
    FLAG_NAME = 8
    FLAG_COMMENT = 16
    FLAG_RESERVED = 0xe0


# ---------------------------------------------------------------------------------------------------------------------
# decoder

cdef int decoder_open(decoder *d, int kind) noexcept nogil:
    cdef ZSTD_DCtx *zstd
    memset(d, 0, sizeof(decoder))
    d.kind = kind
    if kind == KIND_GZIP:
        d.library = malloc(sizeof(inflate_state))
        if d.library == NULL:
            return EST_NO_MEMORY
        isal_inflate_init(<inflate_state *> d.library)
    elif kind == KIND_ZSTD:
        zstd = ZSTD_createDCtx()
        d.library = zstd
        if zstd == NULL or ZSTD_isError(ZSTD_DCtx_setParameter(zstd, ZSTD_d_windowLogMax, WINDOW_LOG_MAX)):
            decoder_close(d)
            return EST_NO_MEMORY
    return EST_OK


cdef void decoder_close(decoder *d) noexcept nogil:
    if d.kind == KIND_ZSTD:
        ZSTD_freeDCtx(<ZSTD_DCtx *> d.library)
    else:
        free(d.library)
    d.library = NULL


cdef void decoder_restart(decoder *d) noexcept nogil:
    d.stage = STAGE_START
    d.members = d.taken = 0
    d.avail_in = d.have = 0
    if d.kind == KIND_ZSTD:
        ZSTD_DCtx_reset(<ZSTD_DCtx *> d.library, ZSTD_reset_session_only)


cdef int decoder_run(decoder *d, uint8_t *out, size_t room, size_t *made) noexcept nogil:
    made[0] = 0
    if d.kind == KIND_GZIP:
        return run_gzip(d, out, room, made)
    if d.kind == KIND_ZSTD:
        return run_zstd(d, out, room, made)
    made[0] = min(room, d.avail_in)
    memcpy(out, d.next_in, made[0])
    advance(d, made[0])
    return EST_OK


cdef bint decoder_at_end(const decoder *d) noexcept nogil:
    return d.stage == STAGE_END


cdef bint decoder_at_border(const decoder *d) noexcept nogil:
    return d.stage == STAGE_BORDER


cdef int decoder_finish(const decoder *d) noexcept nogil:
    if d.kind == KIND_PLAIN or d.stage >= STAGE_BORDER and d.avail_in == 0:
        return EST_OK
    if d.kind == KIND_ZSTD:
        return EST_TRAILING_GARBAGE if d.stage == STAGE_BORDER else EST_ZSTD_TRUNCATED
    return EST_GZIP_TRUNCATED


cdef inline void advance(decoder *d, size_t count) noexcept nogil:
    d.next_in += count
    d.avail_in -= count
    d.taken += count


cdef inline uint32_t little32(const uint8_t *p) noexcept nogil:
    return p[0] | <uint32_t> p[1] << 8 | <uint32_t> p[2] << 16 | <uint32_t> p[3] << 24


# --- gzip

cdef int run_gzip(decoder *d, uint8_t *out, size_t room, size_t *made) noexcept nogil:
    cdef int status = EST_OK
    # Nothing is looked at once the output is full: an error comes when more is asked for than stands in front of it.
    while status == EST_OK and made[0] < room:
        if d.stage == STAGE_BODY:
            status = gzip_body(d, out, room, made)
            if d.stage == STAGE_BODY and d.avail_in == 0:
                return status
        elif d.stage == STAGE_DAMAGED:
            status = gzip_rest(d, out, room, made)
        elif d.stage == STAGE_END or d.avail_in == 0:
            return EST_OK
        elif d.stage == STAGE_TRAILER:
            status = gzip_trailer(d)
            if d.stage == STAGE_BORDER and d.pauses:
                return status
        elif d.stage == STAGE_BORDER or d.stage == STAGE_PADDING:
            status = gzip_border(d)
        else:
            status = gzip_header(d)
    return status


cdef int gzip_body(decoder *d, uint8_t *out, size_t room, size_t *made) noexcept nogil:
    """Inflate until the output is full, the input is used up and nothing is pending, or the deflate stream ends.

    What is inflated in front of damage must not depend on how the bytes come and go, but libisal counts a match that
    reaches too far back in or not, depending on that. Such a match can only stand in a member's first 32 KiB. So these are
    kept back until they are complete, and dropped if they are not to be. The offset of damage does not depend on it either,
    but for the header of a deflate block that the end of a read cuts in two: then it may be some bytes early.
    """
    cdef inflate_state *state = <inflate_state *> d.library
    cdef size_t used, fresh, back
    cdef int outcome
    cdef bint keeps_back
    while made[0] < room:
        state.next_in = d.next_in
        state.avail_in = <uint32_t> min(d.avail_in, <size_t> CALL_MAX)
        state.next_out = out + made[0]
        keeps_back = (d.length == 0 and state.tmp_out_valid < ISAL_DEF_HIST_SIZE
                      and state.block_state != ISAL_BLOCK_INPUT_DONE)
        state.avail_out = 0 if keeps_back else <uint32_t> min(room - made[0], <size_t> CALL_MAX)
        outcome = isal_inflate(state)
        used = state.next_in - d.next_in
        fresh = state.next_out - (out + made[0])
        made[0] += fresh
        if outcome != 0:
            advance(d, used)
            d.taken -= max(state.read_in_length, 0) // 8    # what is read ahead
            d.stage = STAGE_DAMAGED
            if keeps_back and (outcome == ISAL_INVALID_LOOKBACK or state.tmp_out_valid < ISAL_DEF_HIST_SIZE):
                state.tmp_out_processed = state.tmp_out_valid
            return EST_OK
        d.length += <uint32_t> fresh
        advance(d, used)
        if state.block_state == ISAL_BLOCK_FINISH:
            back = max(state.read_in_length, 0) // 8   # whole bytes that belong to the trailer
            d.next_in -= back
            d.avail_in += back
            d.taken -= back
            d.stage = STAGE_TRAILER
            d.have = 0
            return EST_OK
        if used == 0 and fresh == 0:
            return EST_GZIP_DATA if d.avail_in else EST_OK
    return EST_OK


cdef int gzip_rest(decoder *d, uint8_t *out, size_t room, size_t *made) noexcept nogil:
    """What was inflated in front of damaged data, then the error: the same bytes whatever the sizes of the buffers."""
    cdef inflate_state *state = <inflate_state *> d.library
    cdef size_t count = min(room - made[0], <size_t> (state.tmp_out_valid - state.tmp_out_processed))
    memcpy(out + made[0], state.tmp_out_buffer + state.tmp_out_processed, count)
    state.tmp_out_processed += <int32_t> count
    made[0] += count
    return EST_OK if made[0] == room else EST_GZIP_DATA


cdef bint gather(decoder *d, uint32_t want) noexcept nogil:
    """Collect a field of fixed length in d.field; true when it is complete."""
    cdef size_t count = min(<size_t> (want - d.have), d.avail_in)
    memcpy(d.field + d.have, d.next_in, count)
    if d.stage != STAGE_TRAILER and d.stage != STAGE_HEADER_CRC:
        d.header_crc = crc32_gzip_refl(d.header_crc, d.next_in, count)
    advance(d, count)
    d.have += <uint32_t> count
    return d.have == want


cdef int gzip_trailer(decoder *d) noexcept nogil:
    if not gather(d, 8):
        return EST_OK
    if little32(d.field) != (<inflate_state *> d.library).crc or little32(d.field + 4) != d.length:
        return EST_GZIP_CHECKSUM
    d.members += 1
    d.stage = STAGE_END if d.single else STAGE_BORDER
    return EST_OK


cdef int gzip_border(decoder *d) noexcept nogil:
    """Between members: another header, or zeros up to the end of the input."""
    if d.next_in[0] == 0x1f and d.stage == STAGE_BORDER:
        d.stage = STAGE_START
        return EST_OK
    while d.avail_in and d.next_in[0] == 0 and not d.strict:
        d.stage = STAGE_PADDING
        advance(d, 1)
    return EST_TRAILING_GARBAGE if d.avail_in else EST_OK


cdef int gzip_header(decoder *d) noexcept nogil:
    """Take what is there of one header field and move on when the field is complete."""
    if d.stage == STAGE_START:
        d.have = d.header_crc = 0
        d.stage = STAGE_FIXED
    if d.stage == STAGE_FIXED:
        if not gather(d, 10):
            return EST_OK
        if d.field[0] != 0x1f or d.field[1] != 0x8b:
            return EST_TRAILING_GARBAGE if d.members else EST_GZIP_DATA
        if d.field[2] != 8 or d.field[3] & FLAG_RESERVED:
            return EST_GZIP_DATA
        d.flags = d.field[3]
    elif d.stage == STAGE_EXTRA_LENGTH:
        if not gather(d, 2):
            return EST_OK
        d.want_extra = d.field[0] | <uint32_t> d.field[1] << 8
        d.stage = STAGE_EXTRA
        if d.want_extra:
            return EST_OK
    elif d.stage == STAGE_EXTRA:
        d.want_extra -= header_skip(d, d.want_extra)
        if d.want_extra:
            return EST_OK
    elif d.stage == STAGE_NAME or d.stage == STAGE_COMMENT:
        if not header_text(d):
            return EST_OK
    elif d.stage == STAGE_HEADER_CRC:
        if not gather(d, 2):
            return EST_OK
        if (d.field[0] | <uint32_t> d.field[1] << 8) != (d.header_crc & 0xffff):
            return EST_GZIP_CHECKSUM
    next_field(d)
    return EST_OK


cdef uint32_t header_skip(decoder *d, size_t count) noexcept nogil:
    count = min(count, d.avail_in)
    d.header_crc = crc32_gzip_refl(d.header_crc, d.next_in, count)
    advance(d, count)
    return <uint32_t> count


cdef bint header_text(decoder *d) noexcept nogil:
    """Skip a zero-terminated field; true when its end was seen."""
    cdef size_t span = min(d.avail_in, <size_t> CALL_MAX)
    cdef const uint8_t *end = <const uint8_t *> memchr(d.next_in, 0, span)
    header_skip(d, span if end == NULL else end - d.next_in + 1)
    return end != NULL


cdef void next_field(decoder *d) noexcept nogil:
    """The field of a header that follows the one just read, as its flags say."""
    cdef inflate_state *state
    d.have = 0
    if d.stage < STAGE_EXTRA_LENGTH and d.flags & FLAG_EXTRA:
        d.stage = STAGE_EXTRA_LENGTH
    elif d.stage < STAGE_NAME and d.flags & FLAG_NAME:
        d.stage = STAGE_NAME
    elif d.stage < STAGE_COMMENT and d.flags & FLAG_COMMENT:
        d.stage = STAGE_COMMENT
    elif d.stage < STAGE_HEADER_CRC and d.flags & FLAG_HEADER_CRC:
        d.stage = STAGE_HEADER_CRC
    else:
        state = <inflate_state *> d.library
        isal_inflate_reset(state)
        state.crc_flag = ISAL_GZIP_NO_HDR
        state.crc = 0
        d.length = 0
        d.stage = STAGE_BODY


# --- zstd

cdef bint zstd_magic(const uint8_t *p) noexcept nogil:
    """A frame or a skippable frame (RFC 8878, sections 3.1.1 and 3.1.2)."""
    cdef uint32_t magic = little32(p)
    return magic == 0xfd2fb528U or (magic & 0xfffffff0U) == 0x184d2a50U


cdef int run_zstd(decoder *d, uint8_t *out, size_t room, size_t *made) noexcept nogil:
    cdef ZSTD_inBuffer source
    cdef ZSTD_outBuffer sink
    cdef size_t left
    while d.stage != STAGE_END:
        if d.stage == STAGE_START or d.stage == STAGE_BORDER:
            if d.avail_in < 4:
                return EST_OK
            if not zstd_magic(d.next_in):
                return EST_TRAILING_GARBAGE if d.members else EST_ZSTD_DATA
            d.stage = STAGE_BODY
            d.unit_at = d.taken
            d.unit_left = ZSTD_FIRST_UNIT
            d.flushing = False
        # No more than zstd wants for its next step, which is a block, and that only when it has given out the last one: so
        # neither what comes in front of an error nor the error's offset depends on the sizes of the buffers.
        source.src, source.size, source.pos = d.next_in, 0 if d.flushing else min(d.avail_in, d.unit_left), 0
        sink.dst, sink.size, sink.pos = out, room, made[0]
        left = ZSTD_decompressStream(<ZSTD_DCtx *> d.library, &sink, &source)
        if ZSTD_isError(left):
            d.taken = d.unit_at
            return zstd_status(left)
        advance(d, source.pos)
        made[0] = sink.pos
        d.unit_left -= source.pos
        if left == 0:
            d.members += 1
            d.stage = STAGE_END if d.single else STAGE_BORDER
            continue
        if d.unit_left == 0:
            d.unit_at = d.taken
            d.unit_left = left
        d.flushing = sink.pos == room
        if d.flushing or d.avail_in == 0:
            return EST_OK
    return EST_OK


cdef int zstd_status(size_t code) noexcept nogil:
    cdef int error = ZSTD_getErrorCode(code)
    if error == ZSTD_error_frameParameter_windowTooLarge:
        return EST_ZSTD_WINDOW
    return EST_NO_MEMORY if error == ZSTD_error_memory_allocation else EST_ZSTD_DATA


# ---------------------------------------------------------------------------------------------------------------------
# streams

KINDS = {"plain": KIND_PLAIN, "gzip": KIND_GZIP, "zstd": KIND_ZSTD}


def detect(prefix):
    """The kind of a stream by its first bytes: "gzip", "zstd", or "plain" for anything else.

    ``prefix`` is bytes; four suffice.
    """
    cdef const uint8_t[::1] view = prefix
    if view.shape[0] >= 3 and view[0] == 0x1f and view[1] == 0x8b and view[2] == 8:
        return "gzip"
    if view.shape[0] >= 4 and zstd_magic(&view[0]):
        return "zstd"
    return "plain"


def stream_error(int status, str name, int64_t offset, int sys_errno=0):
    """The exception for a decoder's status; offset in compressed bytes."""
    if status == EST_ZSTD_WINDOW:
        return SourceError(
            f"{name}: zstd frame at byte {offset} needs a window over {1 << WINDOW_LOG_MAX} bytes; "
            "compress it again with a smaller --long"
        )
    return from_status(status, sys_errno, name, offset)


cdef class InflateReader:
    """The decompressed bytes of a readable object.

    raw:     has ``readinto(buffer) -> int`` or ``read(size) -> bytes``; it is only read, in order, and never closed
    kind:    "gzip": any number of members, every CRC-32 and length checked, zero padding after the last one allowed;
             "zstd": any number of frames and skippable frames, windows up to 128 MiB; "plain": passed through
    name:    what error messages call the stream
    single:  end after the first member or frame; ``offset`` then says where it ended in ``raw``'s bytes
    strict:  no zero padding either

    Errors are those of estargz.errors.from_status, with the offset in compressed bytes; SourceError for damaged,
    truncated or trailing data. One thread at a time; the GIL is released while inflating.
    """

    cdef decoder d
    cdef object pull          # raw.readinto, or None
    cdef object read_raw      # raw.read when there is no readinto
    cdef bytearray storage    # HISTORY bytes, then the input window
    cdef object window        # keeps storage from being resized
    cdef object lock
    cdef readonly str name
    cdef bint no_more

    def __cinit__(self, raw, str kind, *, str name="input", bint single=False, bint strict=False):
        if kind not in KINDS:
            raise ValueError(f'kind must be "gzip", "zstd" or "plain", not {kind!r}')
        self.pull = getattr(raw, "readinto", None)
        self.read_raw = None if self.pull is not None else raw.read
        self.name = name
        self.lock = Lock()
        self.storage = bytearray(HISTORY + INPUT_BLOCK)
        self.window = memoryview(self.storage)
        cdef int status = decoder_open(&self.d, KINDS[kind])
        if status != EST_OK:
            raise stream_error(status, name, 0)
        self.d.single = single
        self.d.strict = strict
        self.d.next_in = <uint8_t *> PyByteArray_AS_STRING(self.storage) + HISTORY

    def __dealloc__(self):
        decoder_close(&self.d)

    @property
    def offset(self):
        """Compressed bytes used so far."""
        return self.d.taken

    @property
    def members(self):
        """gzip members or zstd frames that ended so far."""
        return self.d.members

    def readinto(self, buffer):
        """Fill the writable ``buffer``; returns the number of bytes, less than its length only at the end."""
        if not self.lock.acquire(False):
            raise RuntimeError(f"{self.name}: read by two threads at once")
        cdef Py_buffer view
        try:
            PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
            try:
                return self._fill(<uint8_t *> view.buf, view.len)
            finally:
                PyBuffer_Release(&view)
        finally:
            self.lock.release()

    def read(self, Py_ssize_t size=-1):
        """At most ``size`` bytes, or all that are left; empty at the end."""
        parts = []
        cdef Py_ssize_t count
        while size:
            block = bytearray(4 * OUTPUT_BLOCK if size < 0 else min(size, 4 * OUTPUT_BLOCK))
            count = self.readinto(block)
            parts.append(block if count == len(block) else block[:count])
            if count < len(block):
                break
            if size > 0:
                size -= count
        return b"".join(parts)

    def readable(self):
        """True: with this and the next three, io.BufferedReader and tarfile take the reader."""
        return True

    def writable(self):
        return False

    def seekable(self):
        return False

    @property
    def closed(self):
        return False

    def close(self):
        """Does nothing: the reader does not own ``raw``."""

    def flush(self):
        """Does nothing."""

    cdef Py_ssize_t _fill(self, uint8_t *out, Py_ssize_t room) except -1:
        cdef Py_ssize_t total = 0
        cdef size_t made
        cdef int status
        while total < room:
            with nogil:
                status = decoder_run(&self.d, out + total, room - total, &made)
            if status != EST_OK:
                raise stream_error(status, self.name, self.d.taken)
            total += made
            if total == room or decoder_at_end(&self.d):
                break
            if not self.no_more:
                self._refill()
            if self.no_more:
                status = decoder_finish(&self.d)
                if status != EST_OK:
                    raise stream_error(status, self.name, self.d.taken + self.d.avail_in)
                break
        return total

    cdef int _refill(self) except -1:
        """Move what the decoder still wants to the front and read behind it."""
        cdef uint8_t *base = <uint8_t *> PyByteArray_AS_STRING(self.storage)
        memmove(base, self.d.next_in - HISTORY, HISTORY + self.d.avail_in)
        self.d.next_in = base + HISTORY
        cdef Py_ssize_t start = HISTORY + self.d.avail_in
        cdef Py_ssize_t room = HISTORY + INPUT_BLOCK - start
        if self.pull is not None:
            count = self.pull(self.window[start:])
        else:
            data = self.read_raw(room)
            count = None if data is None else len(data)
            if count and count <= room:
                self.window[start:start + count] = data
        if count is None:
            raise BlockingIOError(f"{self.name}: no data yet; estargz reads blocking streams only")
        if not 0 <= count <= room:
            raise ValueError(f"{self.name}: read() gave {count} bytes when {room} were asked for")
        self.no_more = count == 0
        self.d.avail_in += <size_t> count
        return 0


# ---------------------------------------------------------------------------------------------------------------------
# chunks

cdef struct chunk_job:
    int64_t offset            # where the chunk's member begins in the blob
    int64_t end               # where the next member of the table begins: no byte from there on is read
    int64_t inner_offset      # inflated bytes in front of the chunk
    int64_t size              # bytes of the chunk, above 0
    uint8_t digest[32]        # SHA-256 of the chunk; read when CHECK_CHUNK is set
    uint8_t file_digest[32]   # SHA-256 of the file; read when FILE_LAST is set
    int64_t flags             # enum job_flag

cdef enum job_flag:
    FLAG_CHECK_CHUNK = 1
    FLAG_FILE_PART = 2        # the chunk joins the running digest of its file
    FLAG_FILE_LAST = 4        # ... and is the last: compare

CHECK_CHUNK = FLAG_CHECK_CHUNK
FILE_PART = FLAG_FILE_PART
FILE_LAST = FLAG_FILE_LAST
MISMATCH = DIGEST_DIFFERS
FILE_MISMATCH = FILE_DIFFERS

JOB_FIELDS = [
    ("offset", "<i8"),
    ("end", "<i8"),
    ("inner_offset", "<i8"),
    ("size", "<i8"),
    ("digest", "u1", (32,)),
    ("file_digest", "u1", (32,)),
    ("flags", "<i8"),
]

cdef struct blob_source:
    int fd                    # -1: memory
    const uint8_t *data
    int64_t size

# One worker: all its memory, whatever a table claims, is one decoder and two blocks.
cdef struct checker:
    blob_source source
    decoder d
    uint8_t *input            # HISTORY + input_room
    size_t input_room
    uint8_t *output           # OUTPUT_BLOCK
    sha256_stream chunk_hash
    sha256_stream file_hash
    bint file_begun
    int64_t begin             # the member that the decoder is in, or -1
    int64_t end
    int64_t fetched           # up to where the blob was handed to the decoder
    int64_t inflated          # bytes made since begin
    int sys_errno
    uint8_t found[32]


cdef int checker_open(checker *c, blob_source source, int64_t compressed) noexcept nogil:
    """``compressed``: the longest range that will be read; small ones need no whole block."""
    memset(c, 0, sizeof(checker))
    c.source = source
    c.begin = -1
    c.input_room = <size_t> min(max(compressed, <int64_t> 1), <int64_t> INPUT_BLOCK)
    cdef int status = decoder_open(&c.d, KIND_GZIP)
    c.d.strict = True
    c.input = <uint8_t *> malloc(HISTORY + c.input_room)
    c.output = <uint8_t *> malloc(OUTPUT_BLOCK)
    if c.input == NULL or c.output == NULL:
        return EST_NO_MEMORY
    memset(c.input, 0, HISTORY)
    return status


cdef void checker_close(checker *c) noexcept nogil:
    decoder_close(&c.d)
    free(c.input)
    free(c.output)


cdef int seek_member(checker *c, const chunk_job *job) noexcept nogil:
    """Begin at the job's member, or go on where the last job left it: files may share a member."""
    if job.offset < 0 or job.end < job.offset or job.inner_offset < 0 or job.size < 0:
        return EST_GZIP_DATA
    if job.offset == c.begin and job.end == c.end and job.inner_offset >= c.inflated:
        return EST_OK
    decoder_restart(&c.d)
    c.d.next_in = c.input + HISTORY
    c.begin = c.fetched = job.offset
    c.end = job.end
    c.inflated = 0
    return EST_OK


cdef int fetch(checker *c) noexcept nogil:
    """Hand the decoder the next block of its member's range."""
    cdef uint8_t *start
    cdef size_t room
    cdef ssize_t count
    memmove(c.input, c.d.next_in - HISTORY, HISTORY + c.d.avail_in)
    c.d.next_in = c.input + HISTORY
    start = c.d.next_in + c.d.avail_in
    room = <size_t> min(<int64_t> (c.input_room - c.d.avail_in), c.end - c.fetched)
    if c.source.fd >= 0:
        count = pread(c.source.fd, start, room, c.fetched)
        while count < 0 and errno == EINTR:
            count = pread(c.source.fd, start, room, c.fetched)
        if count < 0:
            c.sys_errno = errno
            return EST_READ
    else:
        count = min(<int64_t> room, max(c.source.size - c.fetched, <int64_t> 0))
        memcpy(start, c.source.data + c.fetched, count)
    if count == 0:
        return EST_GZIP_TRUNCATED
    c.fetched += count
    c.d.avail_in += count
    return EST_OK


cdef int inflate_exactly(checker *c, uint8_t *out, size_t size) noexcept nogil:
    """The next ``size`` bytes of the member, whole, or why not."""
    cdef size_t total = 0
    cdef size_t made
    cdef int status
    while True:
        status = decoder_run(&c.d, out + total, size - total, &made)
        if status != EST_OK:
            c.begin = -1
            return status
        total += made
        c.inflated += made
        if total == size:
            return EST_OK
        status = fetch(c)
        if status != EST_OK:
            c.begin = -1
            return status


cdef int skip_to(checker *c, int64_t inner_offset) noexcept nogil:
    cdef int status = EST_OK
    while status == EST_OK and c.inflated < inner_offset:
        status = inflate_exactly(c, c.output, <size_t> min(<int64_t> OUTPUT_BLOCK, inner_offset - c.inflated))
    return status


cdef int finish_digest(checker *c, sha256_stream *stream, const uint8_t *wanted, int differs) noexcept nogil:
    sha256_finish(stream, c.found)
    return EST_OK if memcmp(c.found, wanted, 32) == 0 else differs


cdef int hash_chunk(checker *c, const chunk_job *job) noexcept nogil:
    """Inflate the chunk into the digests that the job wants: its own, its file's, or both side by side."""
    cdef sha256_job work[2]
    cdef int64_t left = job.size
    cdef size_t count, streams
    cdef int status = EST_OK
    while status == EST_OK and left > 0:
        count = <size_t> min(<int64_t> OUTPUT_BLOCK, left)
        status = inflate_exactly(c, c.output, count)
        if status != EST_OK:
            break
        streams = 0
        if job.flags & FLAG_CHECK_CHUNK:
            work[streams].stream = &c.chunk_hash
            streams += 1
        if job.flags & FLAG_FILE_PART:
            work[streams].stream = &c.file_hash
            streams += 1
        work[0].data = work[1].data = c.output
        work[0].size = work[1].size = count
        sha256_run(work, streams)
        left -= count
    return status


cdef int check_job(checker *c, const chunk_job *job) noexcept nogil:
    cdef int status = seek_member(c, job)
    if status == EST_OK:
        status = skip_to(c, job.inner_offset)
    sha256_start(&c.chunk_hash)
    if job.flags & FLAG_FILE_PART and not c.file_begun:
        sha256_start(&c.file_hash)
        c.file_begun = True
    if status == EST_OK:
        status = hash_chunk(c, job)
    if status == EST_OK and job.flags & FLAG_CHECK_CHUNK:
        status = finish_digest(c, &c.chunk_hash, job.digest, DIGEST_DIFFERS)
    if status == EST_OK and job.flags & FLAG_FILE_LAST and c.file_begun:
        c.file_begun = False
        status = finish_digest(c, &c.file_hash, job.file_digest, FILE_DIFFERS)
    return status


cdef class _Source:
    """A file descriptor or a bytes-like object, as the kernels want it."""

    cdef blob_source c
    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, source):
        self.c.fd = -1
        if isinstance(source, int):
            if source < 0:
                raise ValueError(f"not a file descriptor: {source}")
            self.c.fd = source
            return
        PyObject_GetBuffer(source, &self.view, PyBUF_SIMPLE)
        self.held = True
        self.c.data = <const uint8_t *> self.view.buf
        self.c.size = self.view.len

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


def _check_slice(_Source source not None, jobs, Py_ssize_t first, Py_ssize_t stop):
    """Check jobs[first:stop] in this thread; None, or (index, status, errno, blob offset, digest found)."""
    cdef Py_buffer view
    cdef checker c
    cdef int status
    cdef Py_ssize_t i = first
    PyObject_GetBuffer(jobs, &view, PyBUF_SIMPLE)
    try:
        if not 0 <= first <= stop <= view.len // <Py_ssize_t> sizeof(chunk_job):
            raise ValueError("slice outside the jobs")
        with nogil:
            status = checker_open(&c, source.c, INPUT_BLOCK)
            while status == EST_OK and i < stop:
                status = check_job(&c, &(<const chunk_job *> view.buf)[i])
                i += status == EST_OK
            checker_close(&c)
        if status == EST_OK:
            return None
        return i, status, c.sys_errno, c.fetched - <int64_t> c.d.avail_in, (<const char *> c.found)[:32]
    finally:
        PyBuffer_Release(&view)


def _slices(jobs, int threads):
    """Ranges of whole files in order, small enough to keep all threads busy and to stop soon after a failure."""
    sizes = (jobs["end"] - jobs["offset"]).clip(4096)
    target = min(max(int(sizes.sum()) // (threads * 8), 1 << 20), 16 << 20)
    weights = sizes.tolist()
    flags = jobs["flags"].tolist()
    first = weight = 0
    for i in range(len(weights)):
        weight += weights[i]
        if weight >= target and (flags[i] & FLAG_FILE_LAST or not flags[i] & FLAG_FILE_PART):
            yield first, i + 1
            first, weight = i + 1, 0
    if first < len(weights):
        yield first, len(weights)


def check_chunks(source, jobs, int threads=1):
    """Inflate chunks of a blob and compare their SHA-256 with what the table of contents promises.

    source:   a file descriptor (read with pread, its position is left alone) or a bytes-like object
    jobs:     one-dimensional contiguous numpy array of dtype JOB_FIELDS; chunks of one file stand together, in order.
              flags: CHECK_CHUNK compares ``digest``; FILE_PART adds the chunk to its file's digest, which the job with
              FILE_LAST compares with ``file_digest``
    threads:  1 or more; each takes 0.7 MiB, whatever the sizes in the jobs

    Returns None when all is well, else (index, status, errno, blob offset, digest found) of the failing job with the
    lowest index. status: MISMATCH, FILE_MISMATCH, or a negative code of status.h. Chunks that share a member are
    inflated once when they stand in order.
    """
    if jobs.ndim != 1 or jobs.dtype.itemsize != sizeof(chunk_job) or not jobs.flags.c_contiguous:
        raise ValueError("jobs must be a contiguous array of dtype JOB_FIELDS")
    if threads < 1:
        raise ValueError("threads must be 1 or more")
    from estargz.threads import Threads  # takes 10 ms, and most commands check no chunks

    cdef _Source held = _Source(source)
    slices = list(_slices(jobs, threads))
    if threads == 1 or len(slices) < 2:
        for first, stop in slices:
            failure = _check_slice(held, jobs, first, stop)
            if failure is not None:
                return failure
        return None
    with Threads(min(threads, len(slices)), "estargz-check") as pool:
        pending = [pool.submit(_check_slice, held, jobs, first, stop) for first, stop in slices]
        try:
            for future in pending:
                failure = future.result()
                if failure is not None:
                    return failure
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return None


def read_chunk(source, int64_t offset, int64_t end, int64_t inner_offset, int64_t size, *, str name="input"):
    """The ``size`` bytes that stand ``inner_offset`` inflated bytes after the member at ``offset``.

    source is a file descriptor or bytes-like; no byte of it from ``end`` on is read. The caller bounds ``size``, of
    which memory is allocated at once, and checks the digest of what comes back. Raises SourceError for damaged or
    truncated data and when the system cannot read; ``name`` is what the message calls the chunk.
    """
    cdef _Source held = _Source(source)
    cdef checker c
    cdef chunk_job job
    cdef int status
    memset(&job, 0, sizeof(job))
    job.offset, job.end, job.inner_offset, job.size = offset, end, inner_offset, size
    if size < 0 or inner_offset < 0 or offset < 0 or end < offset:
        raise ValueError("offsets and sizes of a chunk must ascend from 0")
    cdef bytes data = PyBytes_FromStringAndSize(NULL, size)
    cdef uint8_t *out = <uint8_t *> PyBytes_AS_STRING(data)
    with nogil:
        status = checker_open(&c, held.c, end - offset)
        if status == EST_OK:
            status = seek_member(&c, &job)
        if status == EST_OK:
            status = skip_to(&c, inner_offset)
        if status == EST_OK and size > 0:
            status = inflate_exactly(&c, out, <size_t> size)
        checker_close(&c)
    if status != EST_OK:
        raise from_status(status, c.sys_errno, name, c.fetched - <int64_t> c.d.avail_in)
    return data
