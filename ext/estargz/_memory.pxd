# Growable arrays and a map from byte strings to integers, for kernels that run without Python objects.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

ctypedef struct buffer:
    uint8_t *data
    size_t size
    size_t capacity

# Room for `extra` more bytes behind size; the address may move. False when memory ran out, the buffer then unchanged.
cdef bint buffer_reserve(buffer *b, size_t extra) noexcept nogil
# Copies `size` bytes behind the buffer's end. False when memory ran out.
cdef bint buffer_append(buffer *b, const void *data, size_t size) noexcept nogil
cdef void buffer_free(buffer *b) noexcept nogil

ctypedef struct map_slot:
    uint64_t hash
    int64_t key_at
    uint32_t key_size
    bint used
    int64_t value

# Zero-filled is an empty map.
ctypedef struct byte_map:
    map_slot *slots
    size_t capacity     # power of two
    size_t count
    buffer keys

# The value kept for a key, or NULL.
cdef int64_t *map_find(byte_map *m, const void *key, size_t size) noexcept nogil
# The value for a key, made with `value` if absent. NULL when memory ran out. Valid until the next insertion.
cdef int64_t *map_insert(byte_map *m, const void *key, size_t size, int64_t value) noexcept nogil
cdef void map_free(byte_map *m) noexcept nogil
