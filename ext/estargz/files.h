/* Opening files of a tree without ever leaving it. */
#ifndef ESTARGZ_FILES_H
#define ESTARGZ_FILES_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#define EST_SYS_GETXATTRAT 464 /* the same number on every architecture */
#define EST_PATH_STEP 3800 /* below PATH_MAX: longer paths are opened in steps */

/* A descriptor or -1; not to be disturbed by signals. mode: of a file that is made. */
static inline int est_openat(int directory, const char *name, int flags, mode_t mode) {
    int handle;
    do handle = openat(directory, name, flags, mode);
    while (handle < 0 && errno == EINTR);
    return handle;
}

static inline int est_openat2(int directory, const char *path, int flags) {
    struct open_how how = {
        .flags = (unsigned)flags, .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
    int handle;
    do handle = (int)syscall(SYS_openat2, directory, path, &how, sizeof how);
    while (handle < 0 && errno == EINTR);
    return handle;
}

static inline void est_start_writeback(int handle, int64_t offset, int64_t size) {
    (void)sync_file_range(handle, offset, size, SYNC_FILE_RANGE_WRITE);
}

/* Whether a socket takes bytes, and not messages that must stay whole. */
static inline int est_is_stream(int handle) {
    int type = 0;
    socklen_t size = sizeof type;
    return !getsockopt(handle, SOL_SOCKET, SO_TYPE, &type, &size) && type == SOCK_STREAM;
}

static inline ssize_t est_send_some(int handle, const void *data, size_t size) {
    return send(handle, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* The value of an extended attribute of directory/name itself, never of what a link points at: bytes, or -1 with errno.
 * Kernels before 6.13 have no call relative to a handle; there the way leads through /proc/self/fd. */
static inline ssize_t est_getxattr_at(int directory, const char *name, const char *attribute, void *value, size_t size) {
    static int missing;
    struct { uint64_t value; uint32_t size, flags; } arguments = {(uint64_t)(uintptr_t)value, (uint32_t)size, 0};
    char path[64 + 256];
    if (!missing) {
        long got = syscall(EST_SYS_GETXATTRAT, directory, name, AT_SYMLINK_NOFOLLOW, attribute, &arguments,
                           sizeof arguments);
        if (got >= 0 || (errno != ENOSYS && errno != EPERM)) return got;
        missing = errno == ENOSYS; /* a sandbox may say EPERM for all calls it does not know; the detour tells them apart */
    }
    if (snprintf(path, sizeof path, "/proc/self/fd/%d/%s", directory, name) >= (int)sizeof path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    return lgetxattr(path, attribute, value, size);
}

#endif
