# Declarations of sha256.h.
from libc.stdint cimport uint8_t

cdef extern from "sha256.h" nogil:
    ctypedef struct sha256_stream:
        pass
    ctypedef struct sha256_job:
        sha256_stream *stream
        const uint8_t *data
        size_t size
    void sha256_start(sha256_stream *stream)
    void sha256_run(sha256_job *jobs, size_t count)
    void sha256_finish(sha256_stream *stream, uint8_t *digest)
    int sha256_lanes()
