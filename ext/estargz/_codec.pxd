# Compressor state of one worker and the members it writes. A state belongs to one thread at a time.
from libc.stdint cimport uint8_t

from estargz.isal cimport isal_zstream
from estargz.libdeflate cimport libdeflate_compressor
from estargz.zstd cimport ZSTD_CCtx

# What becomes of a batch's bytes; one row per compression type, so that a further codec is one more row.
cdef enum codec_kind:
    CODEC_NONE = 0      # digest only, nothing is written
    CODEC_COPY = 1      # uncompressed
    CODEC_GZIP = 2
    CODEC_ZSTD = 3
    CODEC_PORTABLE = 4  # gzip whose bytes no CPU decides: libdeflate's at every level

# Whether members are other bytes than the stream's.
cdef inline bint compresses(int kind) noexcept nogil:
    return kind >= CODEC_GZIP

cdef enum:
    LEVEL_MAX_ISAL = 3
    PIECE_MARGIN = 64   # spare room that a piece of a member needs beyond member_bound

# Of a codec that makes gzip members.
cdef inline bint uses_isal(int kind, int level) noexcept nogil:
    return kind == CODEC_GZIP and level <= LEVEL_MAX_ISAL

ctypedef struct compressor:
    int kind
    int level
    isal_zstream *stream
    uint8_t *level_buffer
    libdeflate_compressor *deflater
    ZSTD_CCtx *zstd
    void *bits          # est_bits (deflate_piece.h), beside a deflater

# EST_OK or EST_NO_MEMORY; on failure there is nothing to free.
cdef int compressor_open(compressor *state, int kind, int level) noexcept nogil
cdef void compressor_close(compressor *state) noexcept nogil

# Largest member that `size` bytes can become, headers included.
cdef size_t member_bound(int kind, size_t size) noexcept nogil

# data -> one complete gzip member or zstd frame in out. Bytes written, EST_NO_MEMORY or EST_COMPRESS.
cdef ssize_t member_write(compressor *state, const uint8_t *data, size_t size, uint8_t *out,
                          size_t capacity) noexcept nogil

# gzip only: data -> deflate blocks that continue a member without looking back: several pieces, made by different workers, join
# to one member. The caller writes the member's header and trailer. Bytes written, or EST_COMPRESS.
cdef ssize_t piece_write(compressor *state, const uint8_t *data, size_t size, bint last, uint8_t *out,
                         size_t capacity) noexcept nogil
