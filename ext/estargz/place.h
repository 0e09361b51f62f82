/* Putting things into a directory by handles alone: what libc has no safe or no portable call for. */
#ifndef ESTARGZ_PLACE_H
#define ESTARGZ_PLACE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "files.h"

/* For est_openat: `name` is one component, so that with O_NOFOLLOW nothing is followed on the way. */
#define EST_DIRECTORY (O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
#define EST_NEW_FILE (O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC)

/* The next entries of a directory as the kernel packs them (est_listed); 0 at the end, -1 with errno. */
static inline ssize_t est_list(int directory, void *out, size_t size) {
    return syscall(SYS_getdents64, directory, out, size);
}

typedef struct {
    uint64_t inode;
    int64_t position;
    uint16_t size;
    uint8_t type;
    char name[];
} est_listed;

/* Sets an attribute of directory/name itself, never of what a link points at. */
static inline int est_setxattr_at(int directory, const char *name, const char *key, const void *value, size_t size) {
    char path[64 + 256];
    if (snprintf(path, sizeof path, "/proc/self/fd/%d/%s", directory, name) >= (int)sizeof path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    return lsetxattr(path, key, value, size, 0);
}

/* Sets a mode. 0, or -1 with errno; links are not followed. The C library may open the file for that, which a signal can
 * interrupt. */
static inline int est_set_mode(int parent, const char *name, mode_t mode) {
    int failed;
    do failed = fchmodat(parent, name, mode, AT_SYMLINK_NOFOLLOW);
    while (failed && errno == EINTR);
    return failed;
}

/* Lets the owner use a directory that cannot even be opened. */
static inline int est_unlock_directory(int parent, const char *name) {
    return est_set_mode(parent, name, 0700);
}

/* Whether what is created in a directory gets exactly the group and mode that were asked for: it hands down neither its
 * group nor a default access list. */
static inline int est_hands_nothing_down(int directory, const struct stat *status) {
    return !(status->st_mode & S_ISGID) && fgetxattr(directory, "system.posix_acl_default", NULL, 0) < 0;
}

#endif
