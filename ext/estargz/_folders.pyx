"""The directories that layers are placed in; see the declarations for the contract.

A node is entered by one component at a time, never through a symbolic link: where one stands on the way to an entry,
its target is walked from the node it lies in, or from the root, as if the root were "/". So nothing that a layer
states, and nothing that somebody else does to the directory meanwhile, leads out of it.
"""

from libc.errno cimport EACCES, EEXIST, EINVAL, ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR, errno
from libc.stddef cimport size_t
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset, strcmp, strlen

from posix.stat cimport struct_stat
from posix.unistd cimport close

from estargz._files cimport OPEN_DIRECTORY, open_beneath
from estargz._memory cimport buffer, buffer_append, buffer_free, buffer_reserve, byte_map, map_find, map_free
from estargz._memory cimport map_insert
from estargz._place cimport list_names, place_meta, remove_tree
from estargz._rows cimport (
    EST_LIMIT_ENTRIES, EST_LIMIT_XATTRS, EST_NO_MEMORY, EST_OK, EST_PLACE_CREATE, EST_PLACE_META, EST_PLACE_PARENT,
    EST_PLACE_REMOVE,
)

cdef extern from "gil.h":      # what `with gil` means
    pass

cdef extern from "place.h" nogil:
    enum: EST_DIRECTORY, SEEK_SET, ECANCELED
    int est_openat(int directory, const char *name, int flags, unsigned int mode)
    int est_unlock_directory(int parent, const char *name)
    int est_set_mode(int parent, const char *name, unsigned int mode)
    bint est_hands_nothing_down(int directory, const struct_stat *status)
    int mkdirat(int directory, const char *name, unsigned int mode)
    ssize_t readlinkat(int directory, const char *name, char *out, size_t size)
    int fstat(int handle, struct_stat *found)
    int fchmod(int handle, unsigned int mode)
    int64_t lseek(int handle, int64_t offset, int whence)

cdef enum:
    LINK_MOST = 4096
    LINKS_MOST = 40                 # on one path, as in the kernel
    TARGETS_MOST = 4 * LINK_MOST    # bytes of their targets together: no entry makes many steps
    NAMES_MOST = 1 << 16            # remembered of a layer that has nothing below it
    XATTRS_MOST = 256 << 20         # bytes of directories' attributes that wait for the end
    IMPLIED_MODE = 0o755            # of a parent that no layer states


cdef class Folders:
    """Directories below one, without anybody who places something in them."""

    def __cinit__(self, *_, **__):
        self.newest = self.oldest = self.last_parent_node = self.layer = -1
        self.max_entries = INT64_MAX

    def __dealloc__(self):
        cdef int64_t i
        self.close_handles()
        for i in range(<int64_t>(self.metas.size // sizeof(directory_meta))):
            free(<void *>(<directory_meta *>self.metas.data)[i].meta.xattrs)
        buffer_free(&self.nodes)
        buffer_free(&self.metas)
        buffer_free(&self.node_names)
        buffer_free(&self.last_parent)
        buffer_free(&self.listing)
        buffer_free(&self.climbed)
        buffer_free(&self.left)
        buffer_free(&self.spare)
        buffer_free(&self.long_path)
        map_free(&self.children)
        map_free(&self.names)

    cdef void wait_through(self, int64_t sequence) noexcept nogil:
        pass

    cdef void wait_all(self) noexcept nogil:
        self.wait_through(INT64_MAX)

    cdef bint attend(self) noexcept nogil:
        return True

    cdef int remove(self, int directory, const char *name) noexcept nogil:
        return remove_tree(directory, name, attend_of, <void *>self)

    cdef int count_entry(self) noexcept nogil:
        if self.placed >= self.max_entries:
            return EST_LIMIT_ENTRIES
        self.placed += 1
        return EST_OK

    # ------------------------------------------------------------------------------------------ nodes

    cdef int add_root(self, int root, bint ours) noexcept nogil:
        cdef int64_t number
        self.nodes.size = 0
        number = self.add_node(0, "", 0, root, False)
        if number < 0:
            return EST_NO_MEMORY
        if list_names(root, &self.listing):
            return EST_PLACE_PARENT
        self.empty = self.listing.size == 0
        if ours:
            return self.imply(number)
        return EST_OK

    cdef directory_node *node(self, int64_t number) noexcept nogil:
        return <directory_node *>self.nodes.data + number

    cdef const char *name_of(self, int64_t number) noexcept nogil:
        return <const char *>self.node_names.data + self.node(number).name_at

    cdef size_t key_of(self, uint8_t *key, int64_t parent, const char *name, size_t size) noexcept nogil:
        memcpy(key, self.salt, 8)
        memcpy(key + 8, &parent, 8)
        memcpy(key + 16, name, size)
        return 16 + size

    cdef int64_t *find(self, byte_map *map, int64_t parent, const char *name, size_t size) noexcept nogil:
        cdef uint8_t key[16 + NAME_MOST]
        if size > NAME_MOST:
            return NULL
        return map_find(map, key, self.key_of(key, parent, name, size))

    cdef int64_t child_of(self, int64_t parent, const char *name, size_t size) noexcept nogil:
        """The node of a directory that is known, or -1."""
        cdef const int64_t *value = self.find(&self.children, parent, name, size)
        return -1 if value == NULL else value[0]

    cdef int64_t block_of(self, int64_t parent, const char *name, size_t size) noexcept nogil:
        """The block with the job that makes this name, or -1; the job may be done already."""
        cdef const int64_t *value = self.find(&self.names, parent, name, size)
        return -1 if value == NULL else value[0]

    cdef bint remember(self, int64_t parent, const char *name, int64_t sequence) noexcept nogil:
        """This layer has put something at a name, by a job of that block, or at once (-1)."""
        cdef uint8_t key[16 + NAME_MOST]
        cdef size_t size = strlen(name)
        cdef int64_t *value
        if size > NAME_MOST:        # the file system will say so
            return True
        if self.names.count >= NAMES_MOST and self.layer == 0 and self.empty:
            self.wait_all()         # only what is under way matters where nothing can be hidden
            map_free(&self.names)
        value = map_insert(&self.names, key, self.key_of(key, parent, name, size), sequence)
        if value != NULL:
            value[0] = sequence
        return value != NULL

    cdef void mark(self, int64_t number) noexcept nogil:
        """This layer has put something in a directory: no whiteout of its own removes that, or what it lies in."""
        while self.node(number).layer != self.layer:
            self.node(number).layer = self.layer
            number = self.node(number).parent

    cdef int64_t parent_of(self, const buffer *path, uint32_t base, bint make) noexcept nogil:
        """The node of the directory that a cleaned path lies in; WALK_MISSING without make, or a code of status.h."""
        cdef bint linked = False
        cdef int64_t number
        if path.size - base > NAME_MOST:
            (&errno)[0] = ENAMETOOLONG
            return EST_PLACE_CREATE
        if base == 0:
            return 0
        if (self.last_parent_node >= 0 and self.last_parent.size == base - 1
                and memcmp(self.last_parent.data, path.data, base - 1) == 0):
            return self.last_parent_node
        number = self.walk(path.data, base - 1, make, &linked)
        if number >= 0 and make and not linked:     # a link may be another one by the next entry
            self.last_parent.size = 0
            self.last_parent_node = number if buffer_append(&self.last_parent, path.data, base - 1) else -1
        return number

    cdef int64_t walk(self, const uint8_t *path, size_t size, bint make, bint *linked) noexcept nogil:
        """The node at the end of a path, links followed as if the root were "/"."""
        cdef char name[NAME_MOST + 1]
        cdef int64_t at = 0
        cdef int64_t child
        cdef size_t end
        cdef int links = 0
        cdef size_t targets = 0
        while True:
            while size and path[0] == c'/':
                path += 1
                size -= 1
            if size == 0:
                return at
            end = 0
            while end < size and path[end] != c'/':
                end += 1
            if end > NAME_MOST:
                (&errno)[0] = ENAMETOOLONG
                return EST_PLACE_PARENT
            memcpy(name, path, end)
            name[end] = 0
            path += end
            size -= end
            if strcmp(name, ".") == 0:
                continue
            if strcmp(name, "..") == 0:
                at = self.node(at).parent
                continue
            child = self.child_of(at, name, end)
            if child < 0:
                child = self.enter(at, name, end, make)
            if child == WALK_LINK:
                linked[0] = True
                links += 1
                targets += self.spare.size
                if links > LINKS_MOST or targets > TARGETS_MOST:
                    (&errno)[0] = ELOOP
                    return EST_PLACE_PARENT
                self.attend()
                if not buffer_append(&self.spare, path, size):
                    return EST_NO_MEMORY
                self.left, self.spare = self.spare, self.left
                path = self.left.data
                size = self.left.size
                child = 0 if path[0] == c'/' else at
            if child < 0:
                return child
            at = child

    cdef int64_t enter(self, int64_t parent, const char *name, size_t size, bint make) noexcept nogil:
        """A directory in another one that is not known yet: its node, or WALK_LINK and the link's target in spare."""
        cdef int64_t job_block = self.block_of(parent, name, size)
        cdef int64_t made
        cdef int handle, directory
        cdef ssize_t got
        if job_block >= 0:
            self.wait_through(job_block)
        while True:
            directory = self.handle_of(parent)
            if directory < 0:
                return EST_PLACE_PARENT
            handle = est_openat(directory, name, EST_DIRECTORY, 0)
            if handle >= 0:
                return self.add_node(parent, name, size, handle, False)
            if errno == ENOENT:
                if not make:
                    return WALK_MISSING
                made = self.make_directory(parent, name, size, False)
                if made >= 0:
                    made = self.imply(made) or made
                if made != EST_PLACE_CREATE or errno != EEXIST:
                    return made
                continue
            if errno != ENOTDIR and errno != ELOOP:
                return EST_PLACE_PARENT
            self.spare.size = 0
            if not buffer_reserve(&self.spare, LINK_MOST):
                return EST_NO_MEMORY
            got = readlinkat(directory, name, <char *>self.spare.data, LINK_MOST)
            if got > 0:
                self.spare.size = got
                return WALK_LINK
            if errno == EINVAL:
                (&errno)[0] = ENOTDIR
            if errno != ENOENT:
                return EST_PLACE_PARENT

    cdef int64_t make_directory(self, int64_t parent, const char *name, size_t size, bint replace) noexcept nogil:
        """A new directory's node. replace: of one that is there the node, and anything else there is removed."""
        cdef int directory = self.handle_of(parent)
        cdef int handle
        cdef int code
        if directory < 0:
            return EST_PLACE_PARENT
        while mkdirat(directory, name, 0o700):
            if errno != EEXIST or not replace:
                return EST_PLACE_CREATE
            handle = est_openat(directory, name, EST_DIRECTORY, 0)
            if handle < 0 and errno == EACCES and est_unlock_directory(directory, name) == 0:
                handle = est_openat(directory, name, EST_DIRECTORY, 0)
            if handle >= 0:
                unlock(handle)
                return self.add_node(parent, name, size, handle, False)
            if errno == ENOENT:
                continue
            if errno != ENOTDIR and errno != ELOOP:     # a directory may be there: no reason to remove it
                return EST_PLACE_CREATE
            if self.remove(directory, name):
                return EST_PLACE_REMOVE
        if self.rules.umask & 0o700 and est_set_mode(directory, name, 0o700):
            return EST_PLACE_META
        if not replace:
            code = self.count_entry()
            if code:
                return code
        return self.add_node(parent, name, size, -1, True)

    cdef int64_t add_node(self, int64_t parent, const char *name, size_t size, int handle, bint ours) noexcept nogil:
        cdef int64_t number = self.nodes.size // sizeof(directory_node)
        cdef uint8_t key[16 + NAME_MOST]
        cdef directory_node made
        cdef struct_stat found
        cdef int64_t *value
        memset(&made, 0, sizeof(made))
        made.parent = parent
        made.name_at = self.node_names.size
        made.name_size = <uint32_t>size
        made.handle = made.newer = made.older = made.last_block = made.layer = made.cleared = made.meta_at = -1
        made.ours = ours
        if ours:
            made.plain = self.node(parent).plain
            made.cleared = self.layer
        else:
            made.plain = fstat(handle, &found) == 0 and est_hands_nothing_down(handle, &found)
        if not (buffer_append(&self.node_names, name, size + 1) and buffer_append(&self.nodes, &made, sizeof(made))):
            return EST_NO_MEMORY
        if number == 0:
            self.node(0).handle = handle
            return 0
        value = map_insert(&self.children, key, self.key_of(key, parent, name, size), number)
        if value == NULL:
            return EST_NO_MEMORY
        value[0] = number
        if handle >= 0:
            self.keep_open(number, handle)
        return number

    cdef int imply(self, int64_t number) noexcept nogil:
        """The metadata of a directory that no layer states: the same whenever it is made."""
        cdef place_meta meta
        memset(&meta, 0, sizeof(meta))
        meta.mode = IMPLIED_MODE
        meta.uid, meta.gid = self.rules.uid, self.rules.gid
        self.mark(number)
        return self.set_meta(number, &meta)

    cdef int set_meta(self, int64_t number, const place_meta *meta) noexcept nogil:
        """Keeps what a directory gets in the end; the last entry that states it counts."""
        cdef directory_meta *row
        cdef directory_meta fresh
        cdef uint8_t *xattrs = NULL
        if self.node(number).meta_at < 0:
            memset(&fresh, 0, sizeof(fresh))
            self.node(number).meta_at = self.metas.size // sizeof(directory_meta)
            if not buffer_append(&self.metas, &fresh, sizeof(fresh)):
                self.node(number).meta_at = -1
                return EST_NO_MEMORY
        row = <directory_meta *>self.metas.data + self.node(number).meta_at
        self.xattrs_held += <int64_t>meta.xattrs_len - row.meta.xattrs_len
        if self.xattrs_held > XATTRS_MOST:
            return EST_LIMIT_XATTRS
        if meta.xattrs_len:
            xattrs = <uint8_t *>malloc(meta.xattrs_len)
            if xattrs == NULL:
                return EST_NO_MEMORY
            memcpy(xattrs, meta.xattrs, meta.xattrs_len)
        free(<void *>row.meta.xattrs)
        row.meta = meta[0]
        row.meta.xattrs = xattrs
        row.number, row.offset, row.layer = self.number, self.header_offset, max(self.layer, 0)
        return EST_OK

    cdef int drop(self, int64_t parent, const char *name) noexcept nogil:
        """Removes what is there, and what is known of it. No job for it, or for what is in it, may be under way."""
        cdef int64_t *child = self.find(&self.children, parent, name, strlen(name))
        cdef int directory = self.handle_of(parent)
        if directory < 0:
            return EST_PLACE_PARENT
        if self.remove(directory, name):
            return EST_PLACE_REMOVE
        if child != NULL and child[0] >= 0:
            self.node(child[0]).gone = True
            child[0] = -1
            self.last_parent_node = -1
        return EST_OK

    cdef int clear_lower(self, int64_t number) noexcept nogil:
        """Empties a directory of what this layer has not put there, at any depth."""
        cdef buffer waiting
        cdef int code
        memset(&waiting, 0, sizeof(waiting))
        if self.node(number).cleared == self.layer:
            return EST_OK
        code = EST_OK if buffer_append(&waiting, &number, sizeof(number)) else EST_NO_MEMORY
        while not code and waiting.size:
            waiting.size -= sizeof(int64_t)
            code = self.clear_one((<int64_t *>(waiting.data + waiting.size))[0], &waiting)
            if not code and not self.attend():
                (&errno)[0] = ECANCELED
                code = EST_PLACE_REMOVE
        buffer_free(&waiting)
        return code

    cdef int clear_one(self, int64_t number, buffer *waiting) noexcept nogil:
        """One directory; those in it that have to stay are left to be cleared in turn."""
        cdef int directory = self.handle_of(number)
        cdef const char *name
        cdef size_t at = 0
        cdef size_t size
        cdef int64_t child
        cdef int code
        if directory < 0:
            return EST_PLACE_PARENT
        lseek(directory, 0, SEEK_SET)
        if list_names(directory, &self.listing):
            return EST_PLACE_REMOVE
        while at < self.listing.size:
            name = <const char *>self.listing.data + at
            size = strlen(name)
            at += size + 1
            child = self.child_of(number, name, size)
            if child >= 0 and self.node(child).layer == self.layer:
                if self.node(child).cleared != self.layer and not buffer_append(waiting, &child, sizeof(child)):
                    return EST_NO_MEMORY
            elif child >= 0 or self.find(&self.names, number, name, size) == NULL:
                code = self.drop(number, name)
                if code:
                    return code
        self.node(number).cleared = self.layer
        return EST_OK

    cdef bint has_meta(self, int64_t number) noexcept nogil:
        return not self.node(number).gone and self.node(number).meta_at >= 0

    cdef directory_meta *meta_of(self, int64_t number) noexcept nogil:
        return <directory_meta *>self.metas.data + self.node(number).meta_at

    cdef void set_long_path(self, int64_t number) noexcept nogil:
        """The path of a directory, for messages; "/" for the root."""
        cdef size_t i
        self.long_path.size = self.climbed.size = 0
        while number:
            buffer_append(&self.climbed, &number, sizeof(number))
            number = self.node(number).parent
        if not self.climbed.size:
            buffer_append(&self.long_path, <const char *>b"/", 1)
        for i in range(self.climbed.size // sizeof(int64_t), 0, -1):
            number = (<int64_t *>self.climbed.data)[i - 1]
            buffer_append(&self.long_path, self.name_of(number), self.node(number).name_size)
            if i > 1:
                buffer_append(&self.long_path, <const char *>b"/", 1)

    # ------------------------------------------------------------------------------------------ handles

    cdef int handle_of(self, int64_t number) noexcept nogil:
        """A directory's handle, good until the next call at least, and as long as jobs of its last block are under way;
        -1 with errno. Directories above it are opened too, up to half of what may be: the next one is near them."""
        cdef int64_t above = number
        cdef size_t count = 0
        if number == 0:
            return self.node(0).handle
        if self.node(number).handle >= 0:
            self.unlist(number)
            self.list_newest(number)
            return self.node(number).handle
        self.climbed.size = 0
        while self.node(above).handle < 0:
            if not buffer_append(&self.climbed, &above, sizeof(above)):
                return -1
            above = self.node(above).parent
        count = self.climbed.size // sizeof(int64_t)
        if count > <size_t>self.open_most // 2:
            if self.open_far(above, count, self.open_most // 2) < 0:
                return -1
            count = self.open_most // 2
        while count:
            count -= 1
            if self.open_near((<int64_t *>self.climbed.data)[count]) < 0:
                return -1
        return self.node(number).handle

    cdef int open_near(self, int64_t number) noexcept nogil:
        """Opens a directory in one that is open."""
        cdef int above = self.node(self.node(number).parent).handle
        cdef int handle = est_openat(above, self.name_of(number), EST_DIRECTORY, 0)
        if handle >= 0:
            self.keep_open(number, handle)
        return handle

    cdef int open_far(self, int64_t above, size_t count, size_t end) noexcept nogil:
        """Opens the directory climbed[end] through all between it and one that is open."""
        cdef int64_t number
        cdef int handle
        self.long_path.size = 0
        while count > end:
            count -= 1
            number = (<int64_t *>self.climbed.data)[count]
            if self.long_path.size and not buffer_append(&self.long_path, <const char *>b"/", 1):
                return -1
            if not buffer_append(&self.long_path, self.name_of(number), self.node(number).name_size):
                return -1
        handle = open_beneath(self.node(above).handle, <const char *>self.long_path.data, self.long_path.size,
                              OPEN_DIRECTORY)
        if handle >= 0:
            self.keep_open((<int64_t *>self.climbed.data)[end], handle)
        return handle

    cdef void keep_open(self, int64_t number, int handle) noexcept nogil:
        while self.open_count >= self.open_most:
            self.close_oldest()
        self.node(number).handle = handle
        self.open_count += 1
        self.list_newest(number)

    cdef void close_oldest(self) noexcept nogil:
        cdef int64_t number = self.oldest
        self.wait_through(self.node(number).last_block)
        close(self.node(number).handle)
        self.node(number).handle = -1
        self.open_count -= 1
        self.unlist(number)

    cdef void close_handles(self) noexcept nogil:
        while self.oldest >= 0:
            close(self.node(self.oldest).handle)
            self.node(self.oldest).handle = -1
            self.unlist(self.oldest)
        self.open_count = 0

    cdef void unlist(self, int64_t number) noexcept nogil:
        cdef directory_node *n = self.node(number)
        if n.newer >= 0:
            self.node(n.newer).older = n.older
        else:
            self.newest = n.older
        if n.older >= 0:
            self.node(n.older).newer = n.newer
        else:
            self.oldest = n.newer

    cdef void list_newest(self, int64_t number) noexcept nogil:
        self.node(number).newer = -1
        self.node(number).older = self.newest
        if self.newest >= 0:
            self.node(self.newest).newer = number
        else:
            self.oldest = number
        self.newest = number


cdef bint attend_of(void *folders) noexcept with gil:
    cdef Folders who = <Folders>folders
    cdef bint going
    with nogil:
        going = who.attend()
    return going


cdef void unlock(int handle) noexcept nogil:
    """Lets us work in a directory of ours that will get its mode in the end."""
    cdef struct_stat found
    if fstat(handle, &found) == 0 and (found.st_mode & 0o700) != 0o700:
        fchmod(handle, 0o700)
