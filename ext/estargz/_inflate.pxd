# The streaming decoder that InflateReader and the chunk checks share, for stages that want it without Python in between.
from libc.stdint cimport int64_t, uint8_t, uint32_t

cdef enum decoder_kind:
    KIND_PLAIN, KIND_GZIP, KIND_ZSTD

cdef enum decoder_limit:
    HISTORY = 8               # bytes that must stay readable in front of next_in: inflate may hand them back

ctypedef struct decoder:
    # set by decoder_open, read-only for callers
    int kind
    int stage
    int64_t members           # gzip members or zstd frames that ended
    int64_t taken             # compressed bytes used
    # owned by the caller: the input window. next_in[-HISTORY] .. next_in[avail_in - 1] must be readable, and the bytes in
    # front of next_in must be those that were handed over last. Unread bytes stay in front of a refill.
    uint8_t *next_in
    size_t avail_in
    # options, set after decoder_open
    bint single               # end after the first member
    bint strict               # refuse zero padding after the last member
    bint pauses               # gzip: return where a member has ended; the next run goes on with what follows it
    # private
    void *library             # struct inflate_state or ZSTD_DCtx
    uint32_t length           # ISIZE so far
    int64_t unit_at           # zstd: where the block at hand begins, or the header,
    size_t unit_left          # and how many of its bytes are still to come
    bint flushing             # zstd: the output was full, there may be more of the last block
    uint32_t header_crc
    uint32_t have             # bytes gathered of the field at hand
    uint32_t want_extra
    uint8_t flags
    uint8_t field[10]

# All are nogil and take one decoder from one thread at a time.
# open: EST_OK or EST_NO_MEMORY. close: safe on a zeroed decoder and twice. restart: begin a new stream, keep the options.
cdef int decoder_open(decoder *d, int kind) noexcept nogil
cdef void decoder_close(decoder *d) noexcept nogil
cdef void decoder_restart(decoder *d) noexcept nogil
# run: writes at most room bytes to out and their number to made. EST_OK with made < room means: the stream is complete
# (decoder_at_end) or more input is needed. A negative status leaves the bytes in out undefined.
cdef int decoder_run(decoder *d, uint8_t *out, size_t room, size_t *made) noexcept nogil
cdef bint decoder_at_end(const decoder *d) noexcept nogil
# Between two members, where decoder_run may be told to pause.
cdef bint decoder_at_border(const decoder *d) noexcept nogil
# finish: there is no more input; EST_OK or why the stream is incomplete.
cdef int decoder_finish(const decoder *d) noexcept nogil
