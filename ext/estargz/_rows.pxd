# Declarations of status.h and rows.h for the kernels; see the headers for what each field means.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t

cdef extern from "status.h" nogil:
    cdef enum est_status:
        EST_OK, EST_NO_MEMORY, EST_CANCELLED
        EST_OPEN, EST_READ, EST_STAT, EST_LIST, EST_READ_LINK, EST_XATTR, EST_GREW, EST_SHRANK, EST_REPLACED
        EST_REDIRECT, EST_DEVICE_NUMBER, EST_NAME_TOO_LONG, EST_RESERVED_NAME, EST_TOC_SIZE
        EST_TAR_CHECKSUM, EST_TAR_NUMBER, EST_TAR_SPARSE, EST_TAR_TYPE, EST_TAR_PAX, EST_TAR_META_SIZE
        EST_TAR_TRUNCATED, EST_TAR_LONE_ZERO, EST_TAR_DANGLING_META, EST_TAR_HALF_PADDING
        EST_WRITE, EST_SINK, EST_COMPRESS, EST_NO_THREAD, EST_FORKED, EST_POOL_FULL
        EST_GZIP_DATA, EST_GZIP_CHECKSUM, EST_GZIP_TRUNCATED, EST_ZSTD_DATA, EST_ZSTD_TRUNCATED
        EST_TRAILING_GARBAGE, EST_TOO_LARGE
        EST_PLACE_CREATE, EST_PLACE_WRITE, EST_PLACE_META, EST_PLACE_XATTR, EST_PLACE_REMOVE, EST_PLACE_PARENT
        EST_PLACE_ROOT, EST_PLACE_LINK, EST_LINK_TARGET, EST_LINK_UNSELECTED, EST_WHITEOUT_NAME
        EST_OWNER_RANGE, EST_DEVICE_RANGE, EST_LIMIT_SIZE, EST_LIMIT_ENTRIES, EST_LIMIT_XATTRS

cdef extern from "rows.h" nogil:
    ctypedef struct tar_entry:
        const uint8_t *name
        const uint8_t *link
        const uint8_t *user_name
        const uint8_t *group_name
        const uint8_t *xattrs
        uint32_t name_len
        uint32_t link_len
        uint32_t user_name_len
        uint32_t group_name_len
        uint32_t xattrs_len
        uint8_t type
        int64_t mode
        int64_t uid
        int64_t gid
        int64_t size
        int64_t mtime_s
        int32_t mtime_ns
        int64_t dev_major
        int64_t dev_minor

    ctypedef struct toc_row:
        int64_t strings_at
        uint32_t name_len
        uint32_t link_len
        uint32_t user_name_len
        uint32_t group_name_len
        uint32_t xattrs_len
        uint32_t chunk_count
        int64_t first_chunk
        int64_t mode
        int64_t uid
        int64_t gid
        int64_t size
        int64_t mtime_s
        int64_t offset
        int64_t inner_offset
        int64_t dev_major
        int64_t dev_minor
        uint8_t digest[32]
        uint8_t type
        uint8_t has_digest
        uint8_t has_mtime

    ctypedef struct chunk_row:
        int64_t offset
        int64_t inner_offset
        int64_t chunk_offset
        int64_t chunk_size
        uint8_t digest[32]

    ctypedef struct est_failure:
        int32_t code
        int32_t sys_errno
        int64_t offset
        uint32_t name_len
        char name[4096]
