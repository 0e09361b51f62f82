# SHA-256 of several independent streams at once; sha256.h has the contract.
from libc.stdint cimport uint8_t

cdef extern from "sha256.h" nogil:
    ctypedef struct sha256_stream:
        pass
    ctypedef struct sha256_job:
        sha256_stream *stream
        const uint8_t *data
        size_t size

cdef void sha256_start(sha256_stream *stream) noexcept nogil
cdef void sha256_run(sha256_job *jobs, size_t count) noexcept nogil
cdef void sha256_finish(sha256_stream *stream, uint8_t *digest) noexcept nogil
