"""Opening files of a tree relative to a handle of its root, never through a symbolic link."""

from libc.errno cimport ENAMETOOLONG, ENOMEM, errno
from libc.stdlib cimport free, realloc
from libc.string cimport memcmp, memcpy

from posix.fcntl cimport O_RDONLY
from posix.unistd cimport close

cdef extern from "files.h" nogil:
    enum: EST_PATH_STEP, ENOSYS, EPERM, EAGAIN
    enum: O_DIRECTORY, O_NOFOLLOW, O_CLOEXEC, O_NONBLOCK, O_NOCTTY, O_PATH
    int est_openat2(int directory, const char *path, int flags)
    int est_openat(int directory, const char *path, int flags, unsigned int mode)


cdef int flags_of(int kind) noexcept nogil:
    if kind == OPEN_DIRECTORY:
        return O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC
    return O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC


cdef int open_by_component(int root, const char *path, int flags) noexcept nogil:
    """The same walk without openat2, for kernels and sandboxes that lack it: one handle per component."""
    cdef char name[256]
    cdef const char *slash
    cdef size_t size
    cdef int handle = root
    cdef int following
    while True:
        slash = path
        while slash[0] and slash[0] != c'/':
            slash += 1
        size = slash - path
        if size >= sizeof(name):
            following = -1
            (&errno)[0] = ENAMETOOLONG
        else:
            memcpy(name, path, size)
            name[size] = 0
            following = est_openat(
                handle, name, flags if not slash[0] else O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0)
        if handle != root:
            close(handle)
        if following < 0 or not slash[0]:
            return following
        handle = following
        path = slash + 1


cdef int open_step(int root, const char *path, int flags) noexcept nogil:
    cdef int handle
    cdef int attempts = 0
    while True:
        handle = est_openat2(root, path, flags)
        if handle >= 0 or errno != EAGAIN or attempts == 128:   # EAGAIN: a rename went on at the same time
            break
        attempts += 1
    if handle < 0 and (errno == ENOSYS or errno == EPERM):
        return open_by_component(root, path, flags)
    return handle


cdef int open_beneath(int root, const char *path, size_t size, int kind) noexcept nogil:
    cdef char step[EST_PATH_STEP + 1]
    cdef size_t length
    cdef int handle = root
    cdef int following
    if size == 0:
        return est_openat(root, ".", flags_of(OPEN_DIRECTORY), 0)
    while size > EST_PATH_STEP:
        length = EST_PATH_STEP
        while length and path[length] != c'/':
            length -= 1
        memcpy(step, path, length)
        step[length] = 0
        following = open_step(handle, step, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
        if handle != root:
            close(handle)
        if following < 0:
            return -1
        handle = following
        path += length + 1
        size -= length + 1
    memcpy(step, path, size)
    step[size] = 0
    following = open_step(handle, step, flags_of(kind))
    if handle != root:
        close(handle)
    return following


cdef void directory_cache_init(directory_cache *cache) noexcept nogil:
    cache.root = -1
    cache.handle = -1
    cache.path = NULL
    cache.size = 0
    cache.capacity = 0


cdef void directory_cache_close(directory_cache *cache) noexcept nogil:
    if cache.handle >= 0:
        close(cache.handle)
    free(cache.path)
    directory_cache_init(cache)


cdef bint remember(directory_cache *cache, int root, const char *path, size_t size) noexcept nogil:
    cdef char *grown
    if cache.handle >= 0:
        close(cache.handle)
        cache.handle = -1
    if size > cache.capacity:
        grown = <char *>realloc(cache.path, size)
        if grown == NULL:
            (&errno)[0] = ENOMEM
            return False
        cache.path = grown
        cache.capacity = size
    if size:
        memcpy(cache.path, path, size)
    cache.size = size
    cache.root = root
    cache.handle = open_beneath(root, path, size, OPEN_DIRECTORY)
    return cache.handle >= 0


cdef int open_cached(directory_cache *cache, int root, const char *path, size_t size) noexcept nogil:
    cdef size_t parent = size
    while parent and path[parent - 1] != c'/':
        parent -= 1
    cdef size_t directory_size = parent - 1 if parent else 0
    if (cache.handle < 0 or cache.root != root or cache.size != directory_size
            or (directory_size and memcmp(cache.path, path, directory_size) != 0)):
        if not remember(cache, root, path, directory_size):
            return -1
    return open_beneath(cache.handle, path + parent, size - parent, OPEN_FILE)
