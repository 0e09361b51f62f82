# Extern declarations of libzstd >= 1.4 (https://github.com/facebook/zstd), compression only.
from libc.stddef cimport size_t

cdef extern from "<zstd.h>" nogil:
    struct ZSTD_CCtx_s:
        pass
    ctypedef ZSTD_CCtx_s ZSTD_CCtx
    enum: ZSTD_c_compressionLevel, ZSTD_c_checksumFlag
    ZSTD_CCtx *ZSTD_createCCtx()
    size_t ZSTD_freeCCtx(ZSTD_CCtx *context)
    size_t ZSTD_CCtx_setParameter(ZSTD_CCtx *context, int parameter, int value)
    # One whole frame, its content size in the header. Bytes written, or what ZSTD_isError tells.
    size_t ZSTD_compress2(ZSTD_CCtx *context, void *out, size_t capacity, const void *data, size_t size)
    size_t ZSTD_compressBound(size_t size)
    unsigned int ZSTD_isError(size_t code)
    const char *ZSTD_versionString()

cdef extern from "<zstd_errors.h>" nogil:
    enum: ZSTD_error_memory_allocation
    int ZSTD_getErrorCode(size_t code)
