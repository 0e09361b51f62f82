"""SHA-256 of several independent streams at once, for the other stages; sha256.h has the contract."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t
from libc.stdlib cimport calloc, free

cdef extern from "sha256.h" nogil:
    void c_start "sha256_start"(sha256_stream *stream)
    void c_run "sha256_run"(sha256_job *jobs, size_t count)
    void c_finish "sha256_finish"(sha256_stream *stream, uint8_t *digest)
    int sha256_lanes()


cdef void sha256_start(sha256_stream *stream) noexcept nogil:
    c_start(stream)


cdef void sha256_run(sha256_job *jobs, size_t count) noexcept nogil:
    c_run(jobs, count)


cdef void sha256_finish(sha256_stream *stream, uint8_t *digest) noexcept nogil:
    c_finish(stream, digest)


def lanes() -> int:
    """2 where this CPU runs two streams interleaved, else 1."""
    return sha256_lanes()


def digest_many(list buffers, int repeat=1):
    """Digests of several buffers, 32 bytes each; every buffer is appended ``repeat`` times, one run for each time."""
    cdef size_t count = len(buffers)
    cdef Py_buffer *views = <Py_buffer *>calloc(count + 1, sizeof(Py_buffer))
    cdef sha256_stream *streams = <sha256_stream *>calloc(count + 1, sizeof(sha256_stream))
    cdef sha256_job *jobs = <sha256_job *>calloc(count + 1, sizeof(sha256_job))
    cdef uint8_t digest[32]
    cdef size_t i, held = 0
    cdef int time
    digests = []
    try:
        if views == NULL or streams == NULL or jobs == NULL:
            raise MemoryError
        for item in buffers:
            PyObject_GetBuffer(item, &views[held], PyBUF_SIMPLE)
            held += 1
        with nogil:
            for i in range(count):
                c_start(&streams[i])
            for time in range(repeat):
                for i in range(count):
                    jobs[i].stream = &streams[i]
                    jobs[i].data = <const uint8_t *>views[i].buf
                    jobs[i].size = views[i].len
                c_run(jobs, count)
        for i in range(count):
            c_finish(&streams[i], digest)
            digests.append(digest[:32])
        return digests
    finally:
        for i in range(held):
            PyBuffer_Release(&views[i])
        free(views)
        free(streams)
        free(jobs)
