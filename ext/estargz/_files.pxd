# Opening files of a tree relative to a handle of its root, never through a symbolic link.
from libc.stddef cimport size_t

cdef enum:
    OPEN_DIRECTORY      # O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC
    OPEN_FILE           # O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC: a fifo put in its place never blocks

# A descriptor, or -1 with errno set. `path` is relative to `root`, not NUL-terminated, free of "." and ".."; size 0
# opens the root itself again. ELOOP or ENOTDIR: a link stands where a directory is expected.
cdef int open_beneath(int root, const char *path, size_t size, int kind) noexcept nogil

# The directory opened last, kept open: files come in directory order.
ctypedef struct directory_cache:
    int root
    int handle          # -1 when nothing is kept
    char *path
    size_t size
    size_t capacity

cdef void directory_cache_init(directory_cache *cache) noexcept nogil
cdef void directory_cache_close(directory_cache *cache) noexcept nogil
# Opens the regular file `path` through the cache. A descriptor that the caller closes, or -1 with errno set.
cdef int open_cached(directory_cache *cache, int root, const char *path, size_t size) noexcept nogil
