"""Gzip members by ISA-L (levels 0-3) and libdeflate (levels 4-12, where portable 1-12), zstd frames by libzstd (levels 1-19),
from one worker's reusable state."""

import functools
import hashlib
import os

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from estargz._rows cimport EST_COMPRESS, EST_NO_MEMORY, EST_OK
from estargz.isal cimport (
    COMP_OK, IGZIP_DEFLATE, IGZIP_GZIP, ISAL_DEF_LVL1_LARGE, ISAL_DEF_LVL2_LARGE, ISAL_DEF_LVL3_LARGE,
    ISAL_MAJOR_VERSION, ISAL_MINOR_VERSION, ISAL_PATCH_VERSION, NO_FLUSH, SYNC_FLUSH, isal_deflate,
    isal_deflate_init, isal_zstream,
)
from estargz.libdeflate cimport (
    LIBDEFLATE_VERSION_STRING, libdeflate_alloc_compressor, libdeflate_deflate_compress, libdeflate_free_compressor,
    libdeflate_gzip_compress,
)
from estargz.zstd cimport (
    ZSTD_CCtx_setParameter, ZSTD_c_checksumFlag, ZSTD_c_compressionLevel, ZSTD_compress2, ZSTD_compressBound,
    ZSTD_createCCtx, ZSTD_error_memory_allocation, ZSTD_freeCCtx, ZSTD_getErrorCode, ZSTD_isError, ZSTD_versionString,
)

cdef extern from "isal_place.h" nogil:
    void *est_place(size_t size)
    void est_unplace(void *memory, size_t size)

cdef extern from "cpu_class.h":
    const char *est_cpu_class()

cdef extern from "<dlfcn.h>":
    ctypedef struct Dl_info:
        const char *dli_fname
    int dladdr(const void *address, Dl_info *found)

cdef extern from "deflate_piece.h" nogil:
    ctypedef struct est_bits:
        pass
    size_t est_open_end(est_bits *bits, uint8_t *out, size_t size, size_t capacity)

ISAL_VERSION = f"{ISAL_MAJOR_VERSION}.{ISAL_MINOR_VERSION}.{ISAL_PATCH_VERSION}"
LIBDEFLATE_VERSION = LIBDEFLATE_VERSION_STRING.decode()
ZSTD_VERSION = ZSTD_versionString().decode()     # of the library that is loaded; the others tell what they were compiled with


def encoder(str compression, int level, bint portable=False):
    """What the bytes of a layer come from: "libzstd-1.5.4", "isal-2.30.0/3f9c2a1e"; "none" where nothing compresses.

    Neither ISA-L nor libdeflate tells which version is loaded, and ISA-L's bytes depend on the CPU, too. So behind the version
    that this was compiled with comes the beginning of the digest of what is made of a sample, here and now.
    """
    if compression == "uncompressed":
        return "none"
    if compression == "zstd":
        return f"libzstd-{ZSTD_VERSION}"
    if uses_isal(CODEC_PORTABLE if portable else CODEC_GZIP, level):
        return f"isal-{ISAL_VERSION}/{mark(level, False)}"
    return f"libdeflate-{LIBDEFLATE_VERSION}/{mark(level, True)}"


def cpu_class():
    """What ISA-L's choice of code goes by: "base", "sse4.2", "avx", "avx2", "avx512"; on aarch64 "base", "crc32"."""
    return est_cpu_class().decode()


def libraries():
    """name -> (version, file) of what encodes; the file is the one that is loaded."""
    return {
        "isal": (ISAL_VERSION, file_of(<const void *>isal_deflate)),
        "libdeflate": (LIBDEFLATE_VERSION, file_of(<const void *>libdeflate_alloc_compressor)),
        "libzstd": (ZSTD_VERSION, file_of(<const void *>ZSTD_compress2)),
    }


cdef file_of(const void *function):
    cdef Dl_info found
    return os.path.realpath(os.fsdecode(found.dli_fname)) if dladdr(function, &found) else ""


@functools.cache
def mark(int level, bint portable):
    """Eight digits that tell apart compressors which make different members."""
    return hashlib.sha256(gzip_member(sample(), level, portable)).hexdigest()[:8]


def sample():
    """The same 64 KiB everywhere: words, near and far repetitions, noise."""
    noise = hashlib.shake_128(b"estargz").digest(1 << 14)
    words = [noise[8 * i:8 * i + 2 + i % 9].hex().encode() for i in range(256)]
    return b" ".join(words[byte] for byte in noise[4096:12288])[:60 << 10] + noise[:4096]


def gzip_member(const uint8_t[::1] data not None, int level, bint portable=False):
    """data, at least a byte, as one gzip member. MemoryError when there is no memory for it."""
    cdef int kind = CODEC_PORTABLE if portable else CODEC_GZIP
    cdef size_t size = data.shape[0]
    cdef size_t capacity = member_bound(kind, size)
    cdef uint8_t[::1] out = bytearray(capacity)
    cdef compressor state
    cdef ssize_t written
    if compressor_open(&state, kind, level) != EST_OK:
        raise MemoryError
    with nogil:
        written = member_write(&state, &data[0], size, &out[0], capacity)
        compressor_close(&state)
    if written < 0:
        raise MemoryError
    return bytes(out[:written])


cdef uint32_t level_buffer_size(int level) noexcept nogil:
    if level == 1:
        return ISAL_DEF_LVL1_LARGE
    if level == 2:
        return ISAL_DEF_LVL2_LARGE
    if level == 3:
        return ISAL_DEF_LVL3_LARGE
    return 0


cdef int compressor_open(compressor *state, int kind, int level) noexcept nogil:
    memset(state, 0, sizeof(state[0]))
    state.kind = kind
    state.level = level
    if kind == CODEC_ZSTD:
        return open_zstd(state)
    if kind < CODEC_GZIP:
        return EST_OK
    return open_isal(state) if uses_isal(kind, level) else open_libdeflate(state)


cdef int open_isal(compressor *state) noexcept nogil:
    cdef uint32_t buffer_size = level_buffer_size(state.level)
    state.stream = <isal_zstream *>est_place(sizeof(isal_zstream))
    if buffer_size:
        state.level_buffer = <uint8_t *>malloc(buffer_size)
    if state.stream == NULL or (buffer_size and state.level_buffer == NULL):
        compressor_close(state)
        return EST_NO_MEMORY
    return EST_OK


cdef int open_libdeflate(compressor *state) noexcept nogil:
    state.deflater = libdeflate_alloc_compressor(state.level)
    state.bits = malloc(sizeof(est_bits))
    if state.deflater == NULL or state.bits == NULL:
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
    free(state.bits)
    state.stream = NULL
    state.level_buffer = NULL
    state.deflater = NULL
    state.zstd = NULL
    state.bits = NULL


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
    stream.level = state.level
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
    cdef size_t written
    if state.deflater == NULL:
        return isal_run(state, data, size, IGZIP_DEFLATE, NO_FLUSH if last else SYNC_FLUSH, last, out, capacity)
    written = libdeflate_deflate_compress(state.deflater, data, size, out, capacity)
    if written and not last:
        written = est_open_end(<est_bits *>state.bits, out, written, capacity)
    return written if written else EST_COMPRESS
