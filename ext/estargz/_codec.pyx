"""Gzip members by ISA-L (levels 0-3) and libdeflate (levels 4-12), zstd frames by libzstd (levels 1-19), from one worker's
reusable state."""

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport free, malloc

from estargz._rows cimport EST_COMPRESS, EST_NO_MEMORY, EST_OK
from estargz.isal cimport (
    COMP_OK, IGZIP_DEFLATE, IGZIP_GZIP, ISAL_DEF_LVL1_LARGE, ISAL_DEF_LVL2_LARGE, ISAL_DEF_LVL3_LARGE,
    ISAL_MAJOR_VERSION, ISAL_MINOR_VERSION, ISAL_PATCH_VERSION, NO_FLUSH, SYNC_FLUSH, isal_deflate,
    isal_deflate_init, isal_zstream,
)
from estargz.libdeflate cimport (
    LIBDEFLATE_VERSION_STRING, libdeflate_alloc_compressor, libdeflate_free_compressor, libdeflate_gzip_compress,
)
from estargz.zstd cimport (
    ZSTD_CCtx_setParameter, ZSTD_c_checksumFlag, ZSTD_c_compressionLevel, ZSTD_compress2, ZSTD_compressBound,
    ZSTD_createCCtx, ZSTD_error_memory_allocation, ZSTD_freeCCtx, ZSTD_getErrorCode, ZSTD_isError, ZSTD_versionString,
)

cdef extern from "isal_place.h" nogil:
    void *est_place(size_t size)
    void est_unplace(void *memory, size_t size)

ISAL_VERSION = f"{ISAL_MAJOR_VERSION}.{ISAL_MINOR_VERSION}.{ISAL_PATCH_VERSION}"
LIBDEFLATE_VERSION = LIBDEFLATE_VERSION_STRING.decode()
ZSTD_VERSION = ZSTD_versionString().decode()     # of the library that is loaded; the others tell what they were compiled with


def encoder(str compression, int level):
    """The libraries, with their versions, that the bytes of a layer come from: "isal-2.30.0". "none" where nothing compresses."""
    isal, libdeflate = f"isal-{ISAL_VERSION}", f"libdeflate-{LIBDEFLATE_VERSION}"
    if compression == "uncompressed":
        return "none"
    if compression == "zstd":
        return f"libzstd-{ZSTD_VERSION}"
    if level <= LEVEL_MAX_ISAL:
        return isal
    return f"{libdeflate}+{isal}" if compression == "estargz" else libdeflate    # pieces are ISA-L's at every level


cdef uint32_t level_buffer_size(int level) noexcept nogil:
    if level == 1:
        return ISAL_DEF_LVL1_LARGE
    if level == 2:
        return ISAL_DEF_LVL2_LARGE
    if level == 3:
        return ISAL_DEF_LVL3_LARGE
    return 0


cdef inline int isal_level(int level) noexcept nogil:
    return level if level <= LEVEL_MAX_ISAL else LEVEL_MAX_ISAL


cdef int compressor_open(compressor *state, int kind, int level) noexcept nogil:
    cdef uint32_t buffer_size = level_buffer_size(isal_level(level))
    state.kind = kind
    state.level = level
    state.stream = NULL
    state.level_buffer = NULL
    state.deflater = NULL
    state.zstd = NULL
    if kind == CODEC_ZSTD:
        return open_zstd(state)
    if kind != CODEC_GZIP:
        return EST_OK
    state.stream = <isal_zstream *>est_place(sizeof(isal_zstream))
    if state.stream == NULL:
        return EST_NO_MEMORY
    if buffer_size:
        state.level_buffer = <uint8_t *>malloc(buffer_size)
    if level > LEVEL_MAX_ISAL:
        state.deflater = libdeflate_alloc_compressor(level)
    if (buffer_size and state.level_buffer == NULL) or (level > LEVEL_MAX_ISAL and state.deflater == NULL):
        compressor_close(state)
        return EST_NO_MEMORY
    return EST_OK


cdef int open_zstd(compressor *state) noexcept nogil:
    state.zstd = ZSTD_createCCtx()
    if (state.zstd == NULL or ZSTD_isError(ZSTD_CCtx_setParameter(state.zstd, ZSTD_c_compressionLevel, state.level))
            or ZSTD_isError(ZSTD_CCtx_setParameter(state.zstd, ZSTD_c_checksumFlag, 1))):
        compressor_close(state)
        return EST_NO_MEMORY
    return EST_OK


cdef void compressor_close(compressor *state) noexcept nogil:
    est_unplace(state.stream, sizeof(isal_zstream))
    free(state.level_buffer)
    if state.deflater != NULL:
        libdeflate_free_compressor(state.deflater)
    ZSTD_freeCCtx(state.zstd)
    state.stream = NULL
    state.level_buffer = NULL
    state.deflater = NULL
    state.zstd = NULL


cdef size_t member_bound(int kind, size_t size) noexcept nogil:
    if kind == CODEC_ZSTD:
        return ZSTD_compressBound(size)
    # Stored blocks of at most 65,535 bytes cost 5 bytes each; libdeflate cuts them at 5,000 bytes and up; ISA-L wants
    # room for a whole dynamic header on top.
    return size + size // 1000 + 1024


cdef ssize_t isal_run(compressor *state, const uint8_t *data, size_t size, int wrapping, int flush, bint last,
                      uint8_t *out, size_t capacity) noexcept nogil:
    cdef isal_zstream *stream = state.stream
    isal_deflate_init(stream)
    stream.level = isal_level(state.level)
    stream.level_buf = state.level_buffer
    stream.level_buf_size = level_buffer_size(stream.level)
    stream.gzip_flag = wrapping
    stream.flush = flush
    stream.end_of_stream = last
    stream.next_in = <uint8_t *>data
    stream.avail_in = <uint32_t>size
    stream.next_out = out
    stream.avail_out = <uint32_t>capacity
    if isal_deflate(stream) != COMP_OK or stream.avail_in or not stream.avail_out:
        return EST_COMPRESS
    return capacity - stream.avail_out


cdef ssize_t member_write(compressor *state, const uint8_t *data, size_t size, uint8_t *out,
                          size_t capacity) noexcept nogil:
    cdef size_t written
    if state.kind == CODEC_ZSTD:
        return frame_write(state, data, size, out, capacity)
    if state.deflater == NULL:
        return isal_run(state, data, size, IGZIP_GZIP, NO_FLUSH, True, out, capacity)
    written = libdeflate_gzip_compress(state.deflater, data, size, out, capacity)
    if not written:
        return EST_COMPRESS
    return written


cdef ssize_t frame_write(compressor *state, const uint8_t *data, size_t size, uint8_t *out,
                         size_t capacity) noexcept nogil:
    cdef size_t written = ZSTD_compress2(state.zstd, out, capacity, data, size)
    if not ZSTD_isError(written):
        return written
    return EST_NO_MEMORY if ZSTD_getErrorCode(written) == ZSTD_error_memory_allocation else EST_COMPRESS


cdef ssize_t piece_write(compressor *state, const uint8_t *data, size_t size, bint last, uint8_t *out,
                         size_t capacity) noexcept nogil:
    return isal_run(state, data, size, IGZIP_DEFLATE, NO_FLUSH if last else SYNC_FLUSH, last, out, capacity)
