"""Growable arrays and a hash map for the kernels; see the declarations for the contracts."""

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy

import os


cdef bint buffer_reserve(buffer *b, size_t extra) noexcept nogil:
    cdef size_t wanted = b.size + extra
    cdef size_t capacity
    cdef uint8_t *data
    if wanted <= b.capacity:
        return True
    capacity = b.capacity + b.capacity // 2
    if capacity < wanted:
        capacity = wanted
    if capacity < 256:
        capacity = 256
    data = <uint8_t *>realloc(b.data, capacity)
    if data == NULL:
        return False
    b.data = data
    b.capacity = capacity
    return True


cdef bint buffer_append(buffer *b, const void *data, size_t size) noexcept nogil:
    if size == 0:
        return True
    if not buffer_reserve(b, size):
        return False
    memcpy(b.data + b.size, data, size)
    b.size += size
    return True


cdef void buffer_free(buffer *b) noexcept nogil:
    free(b.data)
    b.data = NULL
    b.size = 0
    b.capacity = 0


# SipHash-1-3 with a key of this process: names may come from somebody who would like them to collide.
cdef uint64_t HASH_KEY[2]
HASH_KEY[0] = int.from_bytes(os.urandom(8), "little")
HASH_KEY[1] = int.from_bytes(os.urandom(8), "little")


cdef inline uint64_t rotated(uint64_t x, int bits) noexcept nogil:
    return x << bits | x >> (64 - bits)


cdef inline void sip_round(uint64_t *v) noexcept nogil:
    v[0] += v[1]
    v[1] = rotated(v[1], 13) ^ v[0]
    v[0] = rotated(v[0], 32)
    v[2] += v[3]
    v[3] = rotated(v[3], 16) ^ v[2]
    v[0] += v[3]
    v[3] = rotated(v[3], 21) ^ v[0]
    v[2] += v[1]
    v[1] = rotated(v[1], 17) ^ v[2]
    v[2] = rotated(v[2], 32)


cdef uint64_t hash_bytes(const uint8_t *data, size_t size) noexcept nogil:
    cdef uint64_t v[4]
    cdef uint64_t word
    cdef uint64_t last = <uint64_t>size << 56
    cdef size_t whole = size & ~<size_t>7
    cdef size_t i
    v[0] = HASH_KEY[0] ^ 0x736f6d6570736575ULL
    v[1] = HASH_KEY[1] ^ 0x646f72616e646f6dULL
    v[2] = HASH_KEY[0] ^ 0x6c7967656e657261ULL
    v[3] = HASH_KEY[1] ^ 0x7465646279746573ULL
    for i in range(0, whole, 8):
        memcpy(&word, data + i, 8)
        v[3] ^= word
        sip_round(v)
        v[0] ^= word
    if size > whole:  # of no bytes there may be no address
        memcpy(&last, data + whole, size - whole)
    v[3] ^= last
    sip_round(v)
    v[0] ^= last
    v[2] ^= 0xff
    for i in range(3):
        sip_round(v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


cdef map_slot *find_slot(byte_map *m, uint64_t h, const void *key, size_t size) noexcept nogil:
    cdef size_t i = h & (m.capacity - 1)
    cdef map_slot *slot
    while True:
        slot = &m.slots[i]
        if not slot.used:
            return slot
        if (slot.hash == h and slot.key_size == size
                and (size == 0 or memcmp(m.keys.data + slot.key_at, key, size) == 0)):
            return slot
        i = (i + 1) & (m.capacity - 1)


cdef bint grow(byte_map *m) noexcept nogil:
    cdef byte_map bigger = m[0]
    cdef size_t i, j
    bigger.capacity = m.capacity * 2 if m.capacity else 64
    bigger.slots = <map_slot *>calloc(bigger.capacity, sizeof(map_slot))
    if bigger.slots == NULL:
        return False
    for i in range(m.capacity):
        if m.slots[i].used:
            j = m.slots[i].hash & (bigger.capacity - 1)
            while bigger.slots[j].used:
                j = (j + 1) & (bigger.capacity - 1)
            bigger.slots[j] = m.slots[i]
    free(m.slots)
    m[0] = bigger
    return True


cdef int64_t *map_find(byte_map *m, const void *key, size_t size) noexcept nogil:
    cdef map_slot *slot
    if not m.capacity:
        return NULL
    slot = find_slot(m, hash_bytes(<const uint8_t *>key, size), key, size)
    return &slot.value if slot.used else NULL


cdef int64_t *map_insert(byte_map *m, const void *key, size_t size, int64_t value) noexcept nogil:
    cdef uint64_t h = hash_bytes(<const uint8_t *>key, size)
    cdef map_slot *slot
    if m.count * 2 >= m.capacity and not grow(m):
        return NULL
    slot = find_slot(m, h, key, size)
    if slot.used:
        return &slot.value
    slot.key_at = m.keys.size
    if not buffer_append(&m.keys, key, size):
        return NULL
    slot.hash = h
    slot.key_size = size
    slot.used = True
    slot.value = value
    m.count += 1
    return &slot.value


cdef void map_free(byte_map *m) noexcept nogil:
    free(m.slots)
    buffer_free(&m.keys)
    m.slots = NULL
    m.capacity = 0
    m.count = 0
