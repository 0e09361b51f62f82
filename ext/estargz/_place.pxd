# Putting one thing into a directory, and taking one out. Directories are handles and names single components, so that
# nothing is ever followed. All are nogil and keep no state; they answer EST_OK or a code of status.h with errno set.
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

from estargz._memory cimport buffer

# Who extracts, and what of the metadata counts.
ctypedef struct place_rules:
    bint owners             # chown, and attributes that only root may set
    bint xattrs
    uint32_t uid            # of this process
    uint32_t gid
    uint32_t umask

ctypedef struct place_meta:
    int64_t mtime_s
    int32_t mtime_ns
    uint32_t mode           # permission, set-id and sticky bits
    uint32_t uid
    uint32_t gid
    const uint8_t *xattrs   # packed as rows.h says
    uint32_t xattrs_len

# Why an attribute was left out: one byte of these, then its key and a NUL, for each, in the buffer of `skipped`.
cdef enum skip_reason:
    SKIP_DEVICE = 1         # needs rights that were not asked for
    SKIP_RIGHTS
    SKIP_SUPPORT            # the file system, or the kind of file, has no such attributes

# `plain`: what is created in the directory gets exactly the group and mode that were asked for.
# A new empty file in the place of whatever is there: its handle, or EST_PLACE_CREATE, EST_PLACE_REMOVE. Its mode bars
# everybody else from it until its owner is right.
cdef int place_open(const place_rules *rules, int directory, const char *name, bint plain,
                    const place_meta *meta) noexcept nogil
# Metadata of a file from place_open, whose handle it closes. After a failure the caller has to unlink the file.
cdef int place_finish(const place_rules *rules, int handle, bint plain, const place_meta *meta,
                      buffer *skipped) noexcept nogil
cdef int place_write(int handle, const uint8_t *data, size_t size, int64_t offset) noexcept nogil
# A whole file, symbolic link (target ends in NUL) or node (a fifo or device of that type): all of it or nothing.
cdef int place_file(const place_rules *rules, int directory, const char *name, bint plain, const place_meta *meta,
                    const uint8_t *data, size_t size, buffer *skipped) noexcept nogil
cdef int place_symlink(const place_rules *rules, int directory, const char *name, const place_meta *meta,
                       const char *target, buffer *skipped) noexcept nogil
cdef int place_node(const place_rules *rules, int directory, const char *name, const place_meta *meta, uint32_t type,
                    unsigned long long device, buffer *skipped) noexcept nogil
# Metadata of a directory. `ours`: it is new, with our owner and mode 0700; else it may have attributes that have to go.
cdef int place_directory(const place_rules *rules, int handle, bint ours, const place_meta *meta,
                         buffer *skipped) noexcept nogil

# Whether to go on with something that takes long.
ctypedef bint (*going_on)(void *context) noexcept nogil

# Removes directory/name with all below it, however deep, with few handles; 0, or -1 with errno. It may be gone already.
# `attend`, if any, is asked every some hundred directories.
cdef int remove_tree(int directory, const char *name, going_on attend, void *context) noexcept nogil
# The names in a directory, each with a NUL; 0, or -1 with errno. Without "." and "..".
cdef int list_names(int handle, buffer *names) noexcept nogil
