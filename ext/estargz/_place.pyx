"""Putting one thing into a directory, and taking one out; see the declarations for the contracts."""

from libc.errno cimport (
    EACCES, EEXIST, EINTR, EISDIR, ENODATA, ENOENT, ENOMEM, ENOTEMPTY, EPERM, ERANGE, ESTALE, errno,
)
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset, strcmp, strlen, strncmp

from posix.stat cimport struct_stat
from posix.time cimport timespec
from posix.unistd cimport close

from estargz._memory cimport buffer, buffer_append, buffer_free
from estargz._rows cimport EST_NO_MEMORY, EST_OK, EST_PLACE_CREATE, EST_PLACE_META, EST_PLACE_REMOVE, EST_PLACE_WRITE
from estargz._rows cimport EST_PLACE_XATTR

cdef extern from "place.h" nogil:
    enum: EST_DIRECTORY, EST_NEW_FILE, AT_SYMLINK_NOFOLLOW, AT_REMOVEDIR, O_RDONLY, O_DIRECTORY, O_CLOEXEC, DT_DIR
    enum: ENOTSUP, ECANCELED
    ctypedef struct est_listed:
        unsigned short size
        unsigned char type
        char name[1]
    int est_openat(int directory, const char *name, int flags, unsigned int mode)
    ssize_t est_list(int directory, void *out, size_t size)
    int est_setxattr_at(int directory, const char *name, const char *key, const void *value, size_t size)
    int est_unlock_directory(int parent, const char *name)
    int est_set_mode(int parent, const char *name, unsigned int mode)
    ssize_t pwrite(int handle, const void *data, size_t size, int64_t offset)
    int fchown(int handle, unsigned int uid, unsigned int gid)
    int fchownat(int directory, const char *name, unsigned int uid, unsigned int gid, int flags)
    int fchmod(int handle, unsigned int mode)
    int futimens(int handle, const timespec *times)
    int utimensat(int directory, const char *name, const timespec *times, int flags)
    int fsetxattr(int handle, const char *key, const void *value, size_t size, int flags)
    int fremovexattr(int handle, const char *key)
    ssize_t flistxattr(int handle, char *list, size_t size)
    int unlinkat(int directory, const char *name, int flags)
    int symlinkat(const char *target, int directory, const char *name)
    int mknodat(int directory, const char *name, unsigned int mode, unsigned long long device)
    int fstat(int handle, struct_stat *found)

cdef enum:
    TRIES = 16              # how often somebody else may put something where an entry belongs
    KEY_MOST = 255          # bytes of an attribute's key: XATTR_NAME_MAX
    KEYS_MOST = 1 << 16     # bytes of all keys of a file: XATTR_LIST_MAX
    LISTED_AT_ONCE = 16384
    ATTEND_EVERY = 512      # steps of a removal, two for a directory
    LEVELS_OPEN = 32        # directories that a removal keeps open on its way down


# ----------------------------------------------------------------------------------------------------- metadata

cdef inline bint changes_owner(const place_rules *rules, bint plain, const place_meta *meta) noexcept nogil:
    return rules.owners and not (plain and meta.uid == rules.uid and meta.gid == rules.gid)


cdef inline uint32_t birth_mode(const place_rules *rules, bint plain, const place_meta *meta) noexcept nogil:
    """The mode that a new file gets at once: nobody but us may use it before its owner is right."""
    return meta.mode & ~rules.umask & (0o700 if changes_owner(rules, plain, meta) else 0o777)


cdef inline void set_times(const place_meta *meta, timespec *times) noexcept nogil:
    times[0].tv_sec = times[1].tv_sec = meta.mtime_s
    times[0].tv_nsec = times[1].tv_nsec = meta.mtime_ns


cdef inline bint begins(const char *key, const char *prefix) noexcept nogil:
    return strncmp(key, prefix, strlen(prefix)) == 0


cdef bint is_privileged(const char *key) noexcept nogil:
    return begins(key, "security.") or begins(key, "trusted.")


cdef bint note_skipped(buffer *skipped, uint8_t reason, const char *key) noexcept nogil:
    return buffer_append(skipped, &reason, 1) and buffer_append(skipped, key, strlen(key) + 1)


cdef int set_xattr(const place_rules *rules, int handle, int directory, const char *name, const char *key,
                   const uint8_t *value, size_t size, buffer *skipped) noexcept nogil:
    """One attribute of a handle, or of directory/name where there is none."""
    cdef int status
    if is_privileged(key) and not rules.owners:
        return EST_OK if note_skipped(skipped, SKIP_RIGHTS, key) else EST_NO_MEMORY
    if handle >= 0:
        status = fsetxattr(handle, key, value, size, 0)
        # User attributes need an inode that may be written, whatever the handle may; the final mode comes after them.
        if status and errno == EACCES and begins(key, "user.") and fchmod(handle, 0o700) == 0:
            status = fsetxattr(handle, key, value, size, 0)
    else:
        status = est_setxattr_at(directory, name, key, value, size)
    if status == 0:
        return EST_OK
    # Links and nodes have no user attributes, by the kernel's own rule.
    if errno == ENOTSUP or (errno == EPERM and handle < 0 and begins(key, "user.")):
        return EST_OK if note_skipped(skipped, SKIP_SUPPORT, key) else EST_NO_MEMORY
    return EST_PLACE_XATTR


cdef int set_xattrs(const place_rules *rules, int handle, int directory, const char *name, const place_meta *meta,
                    buffer *skipped) noexcept nogil:
    cdef char key[KEY_MOST + 1]
    cdef uint32_t lengths[2]
    cdef uint32_t at = 0
    cdef int code
    if not rules.xattrs:
        return EST_OK
    while at < meta.xattrs_len:
        memcpy(lengths, meta.xattrs + at, sizeof(lengths))
        at += sizeof(lengths)
        if lengths[0] > KEY_MOST:
            (&errno)[0] = ERANGE
            return EST_PLACE_XATTR
        memcpy(key, meta.xattrs + at, lengths[0])
        key[lengths[0]] = 0
        at += lengths[0]
        code = set_xattr(rules, handle, directory, name, key, meta.xattrs + at, lengths[1], skipped)
        if code:
            return code
        at += lengths[1]
    return EST_OK


cdef bint may_go(const place_rules *rules, const char *key) noexcept nogil:
    """Whether an attribute is one that a layer states, and not the system's own business."""
    if begins(key, "user.") or begins(key, "system.posix_acl_"):
        return True
    return rules.owners and (strcmp(key, "security.capability") == 0
                             or (begins(key, "trusted.") and not begins(key, "trusted.overlay.")))


cdef int drop_xattrs(const place_rules *rules, int handle) noexcept nogil:
    """What a directory had before an entry replaced its metadata."""
    cdef char *keys
    cdef ssize_t size
    cdef ssize_t at = 0
    cdef int code = EST_OK
    if not rules.xattrs:
        return EST_OK
    keys = <char *>malloc(KEYS_MOST)
    if keys == NULL:
        return EST_NO_MEMORY
    size = flistxattr(handle, keys, KEYS_MOST)
    if size < 0 and errno != ENOTSUP:
        code = EST_PLACE_XATTR
    while at < size and not code:
        if may_go(rules, keys + at) and fremovexattr(handle, keys + at) and errno != ENODATA:
            code = EST_PLACE_XATTR
        at += strlen(keys + at) + 1
    free(keys)
    return code


cdef int set_by_name(const place_rules *rules, int directory, const char *name, const place_meta *meta, bint has_mode,
                     buffer *skipped) noexcept nogil:
    """Metadata of what cannot be opened. The mode comes after the owner, whose change takes set-id bits away."""
    cdef timespec times[2]
    cdef int code
    if rules.owners and fchownat(directory, name, meta.uid, meta.gid, AT_SYMLINK_NOFOLLOW):
        return EST_PLACE_META
    code = set_xattrs(rules, -1, directory, name, meta, skipped)
    if code:
        return code
    if has_mode and est_set_mode(directory, name, meta.mode):
        return EST_PLACE_META
    set_times(meta, times)
    return EST_PLACE_META if utimensat(directory, name, times, AT_SYMLINK_NOFOLLOW) else EST_OK


cdef int set_by_handle(const place_rules *rules, int handle, bint owner_differs, bint mode_differs,
                       const place_meta *meta, buffer *skipped) noexcept nogil:
    cdef timespec times[2]
    cdef int code
    if owner_differs and fchown(handle, meta.uid, meta.gid):
        return EST_PLACE_META
    if meta.xattrs_len:
        code = set_xattrs(rules, handle, -1, NULL, meta, skipped)
        if code:
            return code
    if mode_differs and fchmod(handle, meta.mode):
        return EST_PLACE_META
    set_times(meta, times)
    return EST_PLACE_META if futimens(handle, times) else EST_OK


# -------------------------------------------------------------------------------------------------------- files

cdef void undo(int directory, const char *name) noexcept nogil:
    """Takes away what was left half made; errno stays."""
    cdef int kept = errno
    unlinkat(directory, name, 0)
    (&errno)[0] = kept


cdef int place_open(const place_rules *rules, int directory, const char *name, bint plain,
                    const place_meta *meta) noexcept nogil:
    cdef int handle
    cdef int tries = 0
    while True:
        handle = est_openat(directory, name, EST_NEW_FILE, birth_mode(rules, plain, meta))
        if handle >= 0:
            return handle
        if errno != EEXIST or tries == TRIES:
            return EST_PLACE_CREATE
        if remove_tree(directory, name, NULL, NULL):
            return EST_PLACE_REMOVE
        tries += 1


cdef int place_finish(const place_rules *rules, int handle, bint plain, const place_meta *meta,
                      buffer *skipped) noexcept nogil:
    cdef bint mode_differs = not plain or birth_mode(rules, plain, meta) != meta.mode
    cdef bint acl = meta.xattrs_len != 0    # an access list among the attributes changes the mode
    cdef int code = set_by_handle(rules, handle, changes_owner(rules, plain, meta), mode_differs or acl, meta, skipped)
    cdef int kept = errno
    if close(handle) and errno != EINTR and not code:   # network file systems report failed writes here
        return EST_PLACE_WRITE
    (&errno)[0] = kept
    return code


cdef int place_write(int handle, const uint8_t *data, size_t size, int64_t offset) noexcept nogil:
    cdef ssize_t written
    while size:
        written = pwrite(handle, data, size, offset)
        if written < 0 and errno != EINTR:
            return EST_PLACE_WRITE
        if written > 0:
            data += written
            size -= written
            offset += written
    return EST_OK


cdef int place_file(const place_rules *rules, int directory, const char *name, bint plain, const place_meta *meta,
                    const uint8_t *data, size_t size, buffer *skipped) noexcept nogil:
    cdef int handle = place_open(rules, directory, name, plain, meta)
    cdef int code, kept
    if handle < 0:
        return handle
    code = place_write(handle, data, size, 0)
    if code:
        kept = errno
        close(handle)
        (&errno)[0] = kept
    else:
        code = place_finish(rules, handle, plain, meta, skipped)
    if code:
        undo(directory, name)
    return code


cdef int place_symlink(const place_rules *rules, int directory, const char *name, const place_meta *meta,
                       const char *target, buffer *skipped) noexcept nogil:
    cdef int tries = 0
    cdef int code
    while symlinkat(target, directory, name):
        if errno != EEXIST or tries == TRIES:
            return EST_PLACE_CREATE
        if remove_tree(directory, name, NULL, NULL):
            return EST_PLACE_REMOVE
        tries += 1
    code = set_by_name(rules, directory, name, meta, False, skipped)
    if code:
        undo(directory, name)
    return code


cdef int place_node(const place_rules *rules, int directory, const char *name, const place_meta *meta, uint32_t type,
                    unsigned long long device, buffer *skipped) noexcept nogil:
    cdef int tries = 0
    cdef int code
    while mknodat(directory, name, type | (meta.mode & 0o700), device):
        if errno != EEXIST or tries == TRIES:
            return EST_PLACE_CREATE
        if remove_tree(directory, name, NULL, NULL):
            return EST_PLACE_REMOVE
        tries += 1
    code = set_by_name(rules, directory, name, meta, True, skipped)
    if code:
        undo(directory, name)
    return code


cdef int place_directory(const place_rules *rules, int handle, bint ours, const place_meta *meta,
                         buffer *skipped) noexcept nogil:
    cdef int code = EST_OK if ours else drop_xattrs(rules, handle)
    if code:
        return code
    return set_by_handle(rules, handle, rules.owners, True, meta, skipped)


# ------------------------------------------------------------------------------------------------------ removal

# A directory on the way down. Its name, and those of the directories in it that are still to go, lie in one stack.
ctypedef struct level:
    int handle              # -1: closed to save handles; found again through ".." of the one below
    uint64_t device
    uint64_t inode
    size_t name_at
    size_t inner_at


cdef int open_to_remove(int parent, const char *name) noexcept nogil:
    """A handle of a directory whose entries may then be removed, if its owner is we."""
    cdef struct_stat found
    cdef int handle = est_openat(parent, name, EST_DIRECTORY, 0)
    if handle < 0 and errno == EACCES and est_unlock_directory(parent, name) == 0:
        handle = est_openat(parent, name, EST_DIRECTORY, 0)
    if handle >= 0 and fstat(handle, &found) == 0 and (found.st_mode & 0o700) != 0o700:
        fchmod(handle, 0o700)       # where it fails, removing will, and says why
    return handle


cdef int remove_listed(int handle, const est_listed *entry, buffer *names) noexcept nogil:
    """Removes an entry that is no directory; the name of one that is goes onto the stack."""
    if strcmp(entry.name, ".") == 0 or strcmp(entry.name, "..") == 0:
        return 0
    if entry.type != DT_DIR:
        if unlinkat(handle, entry.name, 0) == 0 or errno == ENOENT:
            return 0
        if errno != EISDIR:
            return -1
    if not buffer_append(names, entry.name, strlen(entry.name) + 1):
        (&errno)[0] = ENOMEM
        return -1
    return 0


cdef int remove_files(int handle, buffer *names) noexcept nogil:
    cdef uint8_t listed[LISTED_AT_ONCE]
    cdef const est_listed *entry
    cdef ssize_t size, at
    while True:
        size = est_list(handle, listed, sizeof(listed))
        if size <= 0:
            return <int>size
        at = 0
        while at < size:
            entry = <const est_listed *>(listed + at)
            if remove_listed(handle, entry, names):
                return -1
            at += entry.size


cdef int descend(int parent, buffer *levels, buffer *names, size_t name_at) noexcept nogil:
    """Opens the directory whose name lies at name_at and removes the files in it. Its level is then the last one."""
    cdef struct_stat found
    cdef level entered
    cdef size_t count = levels.size // sizeof(level)
    cdef level *oldest
    entered.handle = open_to_remove(parent, <const char *>names.data + name_at)
    if entered.handle < 0:
        return -1
    entered.name_at = name_at
    entered.inner_at = names.size
    if fstat(entered.handle, &found) or not buffer_append(levels, &entered, sizeof(entered)):
        close(entered.handle)
        return -1
    (<level *>levels.data + count).device = found.st_dev
    (<level *>levels.data + count).inode = found.st_ino
    if count >= LEVELS_OPEN:
        oldest = <level *>levels.data + count - LEVELS_OPEN
        close(oldest.handle)
        oldest.handle = -1
    return remove_files(entered.handle, names)


cdef int reopen_parent(const level *inner, level *outer) noexcept nogil:
    """".." of a directory that somebody has moved leads elsewhere: only the directory we came from will do."""
    cdef struct_stat found
    cdef int handle
    if outer.handle >= 0:
        return 0
    handle = est_openat(inner.handle, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0)
    if handle < 0:
        return -1
    if fstat(handle, &found) or <uint64_t>found.st_dev != outer.device or <uint64_t>found.st_ino != outer.inode:
        close(handle)
        (&errno)[0] = ESTALE
        return -1
    outer.handle = handle
    return 0


cdef int ascend(int directory, buffer *levels, buffer *names, int *again) noexcept nogil:
    """Removes the emptied directory of the last level. One that somebody has filled meanwhile is gone through again."""
    cdef level *inner = <level *>(levels.data + levels.size) - 1
    cdef int parent = directory
    if levels.size > sizeof(level):
        if reopen_parent(inner, inner - 1):
            return -1
        parent = (inner - 1).handle
    if unlinkat(parent, <const char *>names.data + inner.name_at, AT_REMOVEDIR) and errno != ENOENT:
        if errno != ENOTEMPTY or again[0] == TRIES:
            return -1
        again[0] += 1
        close(inner.handle)
        inner.handle = open_to_remove(parent, <const char *>names.data + inner.name_at)
        return -1 if inner.handle < 0 else remove_files(inner.handle, names)
    close(inner.handle)
    names.size = inner.name_at
    levels.size -= sizeof(level)
    return 0


cdef size_t last_name(const buffer *names) noexcept nogil:
    cdef size_t at = names.size - 1
    while at and names.data[at - 1]:
        at -= 1
    return at


cdef int remove_directory(int directory, const char *name, buffer *levels, buffer *names, going_on attend,
                          void *context) noexcept nogil:
    cdef level *inner
    cdef int again = 0
    cdef size_t steps = 0
    if not buffer_append(names, name, strlen(name) + 1) or descend(directory, levels, names, 0):
        return -1
    while levels.size:
        steps += 1
        if attend != NULL and steps % ATTEND_EVERY == 0 and not attend(context):
            (&errno)[0] = ECANCELED
            return -1
        inner = <level *>(levels.data + levels.size) - 1
        if names.size > inner.inner_at:
            if descend(inner.handle, levels, names, last_name(names)):
                if errno != ENOENT:
                    return -1
                names.size = last_name(names)
        elif ascend(directory, levels, names, &again):
            return -1
    return 0


cdef int remove_tree(int directory, const char *name, going_on attend, void *context) noexcept nogil:
    cdef buffer levels
    cdef buffer names
    cdef level *left
    cdef int failed, kept
    if unlinkat(directory, name, 0) == 0 or errno == ENOENT:
        return 0
    if errno != EISDIR:
        return -1
    memset(&levels, 0, sizeof(levels))
    memset(&names, 0, sizeof(names))
    failed = remove_directory(directory, name, &levels, &names, attend, context)
    kept = errno
    while levels.size:
        left = <level *>(levels.data + levels.size) - 1
        if left.handle >= 0:
            close(left.handle)
        levels.size -= sizeof(level)
    buffer_free(&levels)
    buffer_free(&names)
    (&errno)[0] = kept
    return failed


cdef int list_names(int handle, buffer *names) noexcept nogil:
    cdef uint8_t listed[LISTED_AT_ONCE]
    cdef const est_listed *entry
    cdef ssize_t size, at
    names.size = 0
    while True:
        size = est_list(handle, listed, sizeof(listed))
        if size <= 0:
            return <int>size
        at = 0
        while at < size:
            entry = <const est_listed *>(listed + at)
            if strcmp(entry.name, ".") and strcmp(entry.name, ".."):
                if not buffer_append(names, entry.name, strlen(entry.name) + 1):
                    (&errno)[0] = ENOMEM
                    return -1
            at += entry.size
