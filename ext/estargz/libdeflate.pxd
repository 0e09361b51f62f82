# Extern declarations of libdeflate >= 1.9 (https://github.com/ebiggers/libdeflate), compression only.
cdef extern from "libdeflate.h" nogil:
    const char *LIBDEFLATE_VERSION_STRING
    struct libdeflate_compressor:
        pass
    libdeflate_compressor *libdeflate_alloc_compressor(int level)
    void libdeflate_free_compressor(libdeflate_compressor *compressor)
    # Bytes written to out, 0 when they do not fit.
    size_t libdeflate_deflate_compress(libdeflate_compressor *compressor, const void *data, size_t size,
                                       void *out, size_t capacity)
    size_t libdeflate_gzip_compress(libdeflate_compressor *compressor, const void *data, size_t size,
                                    void *out, size_t capacity)
    size_t libdeflate_gzip_compress_bound(libdeflate_compressor *compressor, size_t size)
