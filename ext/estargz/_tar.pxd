# Tar headers: the emitter for what a walk produces and the incremental parser for tar input.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

from estargz._rows cimport tar_entry

# What tar_parse_block found in a block; negative answers are codes of status.h.
cdef enum:
    TAR_META = 1   # an extended header: meta_size payload bytes follow, possibly none; hand them to tar_parse_meta
    TAR_ENTRY = 2  # entry is complete: entry.size payload bytes follow
    TAR_ZERO = 3   # an all-zero block

# A byte string that grows and is reused from entry to entry.
ctypedef struct tar_text:
    uint8_t *bytes
    uint32_t length
    uint32_t room

# Where one extended attribute lies in the payload of an extended header.
ctypedef struct tar_xattr:
    const uint8_t *key
    const uint8_t *value
    uint32_t key_length
    uint32_t value_length

# What the latest PAX header says. A bit of `given` or `broken` stands for one key.
ctypedef struct tar_pax:
    uint32_t given
    uint32_t broken
    int64_t uid
    int64_t gid
    int64_t size
    int64_t mtime_s
    int32_t mtime_ns
    tar_text path
    tar_text link_path
    tar_text user_name
    tar_text group_name
    tar_text xattrs
    uint8_t sparse_major
    uint8_t sparse_minor
    uint8_t sparse_map
    uint32_t sparse_numbers
    tar_xattr *found
    uint32_t found_count
    uint32_t found_room

# Strings of one header block, copied.
ctypedef struct tar_block_text:
    uint8_t name[256]
    uint8_t link[100]
    uint8_t user_name[32]
    uint8_t group_name[32]

ctypedef struct tar_parser:
    # Read by the caller.
    tar_entry entry       # valid after TAR_ENTRY until the next call; after any other answer only name and name_len
                          # are: the best name known so far, for messages
    int64_t meta_size     # after TAR_META: payload bytes, at most 1 MiB
    bint pending          # an extended header still waits for its entry: end of input here is EST_TAR_DANGLING_META
    # Private.
    uint8_t meta_type
    tar_pax pax
    tar_text long_name
    tar_text long_link
    tar_block_text text

# Write the header blocks of an entry as Go's archive/tar does with format PAX: one USTAR block where that suffices,
# else an 'x' header, its records and the main header. Answers bytes written, a multiple of 512, or EST_DEVICE_NUMBER
# or EST_NAME_TOO_LONG (records over 1 MiB, or more than capacity), and for entries that no walk produces:
# EST_TAR_NUMBER (mode over 07777777 or negative, negative size of a regular file), EST_TAR_PAX (NUL in a name, NUL or
# '=' in an attribute's key), EST_TAR_TYPE (type outside '0'..'6', or a trailing slash on a file or device).
cdef ssize_t tar_emit(const tar_entry *entry, uint8_t *out, size_t capacity) noexcept nogil
# At least as many bytes as tar_emit writes for this entry, without looking at its strings.
cdef size_t tar_emit_bound(const tar_entry *entry) noexcept nogil

# The parser is fed headers and the payloads of extended headers; the caller skips entry payloads and all padding to
# 512. After a negative answer the parser is of no further use but to be freed.
cdef int tar_parser_init(tar_parser *p) noexcept nogil
cdef void tar_parser_free(tar_parser *p) noexcept nogil
# One 512-byte header block: TAR_META, TAR_ENTRY, TAR_ZERO, or EST_TAR_CHECKSUM, EST_TAR_NUMBER, EST_TAR_TYPE,
# EST_TAR_SPARSE, EST_TAR_META_SIZE, EST_TAR_DANGLING_META, EST_TAR_PAX (a record of the preceding PAX header holds a
# value that is no number).
cdef int tar_parse_block(tar_parser *p, const uint8_t *block) noexcept nogil
# The payload that TAR_META announced, meta_size bytes: EST_OK, EST_TAR_PAX or EST_NO_MEMORY. Nothing of it is kept by
# reference. To be called even when meta_size is 0.
cdef int tar_parse_meta(tar_parser *p, const uint8_t *data) noexcept nogil
