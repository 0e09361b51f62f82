"""The changeset of directory trees, as containerd's walking differ and BuildKit's overlay differ define it.

One walk goes through the upper tree and, in step with it, through the lower one: a frame per directory on the way down,
names in byte order. The lower tree is a stack of directories, topmost first; one directory is the ordinary case, several
are an overlay's lower layers, merged while they are read. Headers are written here; payloads are left to the workers.

Paths that are to come first are visited one by one before that, by frames that are entered without listing anything, and
compared and written as the walk would do it; the walk then leaves out what has been written.
"""

from libc.errno cimport EINTR, EINVAL, ELOOP, ENAMETOOLONG, ENODATA, ENOENT, ENOTDIR, ERANGE, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset, strcmp, strlen

from posix.stat cimport S_ISBLK, S_ISCHR, S_ISDIR, S_ISLNK, S_ISREG, S_ISSOCK, struct_stat
from posix.unistd cimport close, dup, read

from estargz._files cimport OPEN_DIRECTORY, OPEN_FILE, open_beneath
from estargz._layer cimport LayerBuilder, source_file
from estargz._memory cimport buffer, buffer_append, buffer_free, buffer_reserve, byte_map, map_find, map_free, map_insert
from estargz._rows cimport (
    EST_CANCELLED, EST_LIST, EST_NO_MEMORY, EST_OK, EST_OPEN, EST_READ, EST_READ_LINK, EST_REDIRECT, EST_REPLACED,
    EST_RESERVED_NAME, EST_STAT, EST_XATTR, tar_entry,
)

cdef extern from "files.h" nogil:
    ssize_t est_getxattr_at(int directory, const char *name, const char *attribute, void *value, size_t size)
    enum: AT_SYMLINK_NOFOLLOW, ENOTSUP

cdef extern from "<sys/stat.h>" nogil:
    int fstatat(int directory, const char *name, struct_stat *found, int flags)
    int fstat(int handle, struct_stat *found)

cdef extern from "<sys/sysmacros.h>" nogil:
    unsigned int major(unsigned long long device)
    unsigned int minor(unsigned long long device)

cdef extern from "<dirent.h>" nogil:
    ctypedef struct DIR:
        pass
    struct dirent:
        char *d_name
    DIR *fdopendir(int handle)
    dirent *readdir(DIR *directory)
    int closedir(DIR *directory)

cdef extern from "<stdlib.h>" nogil:
    void qsort_r(void *base, size_t count, size_t size, int (*compare)(const void *, const void *, void *) noexcept nogil,
                 void *context)

cdef extern from "<unistd.h>" nogil:
    ssize_t readlinkat(int directory, const char *name, char *target, size_t size)

cdef enum:
    HANDLES_KEPT = 128          # directory handles that stay open over all frames; the rest are opened again by path
    COMPARE_SIZE = 128 << 10
    XATTR_LIMIT = 64 << 10      # Linux's own limit of a value
    CAPABILITY_USUAL = 64       # bytes that hold any capability there is today: capability.h knows 12, 20 and 24
    CAPABILITY_AT = 27          # in a packed attribute: two lengths and the key stand before the value
    LINK_WAITS = 1

# What becomes of a path, in containerd's terms.
cdef enum change_kind:
    CHANGE_ADD
    CHANGE_MODIFY
    CHANGE_UNMODIFIED

# What is known of a path that is to come first. The values are those of writing/priority.py.
cdef enum:
    PATH_ABSENT     # not in the layer
    PATH_PRESENT    # in the layer; written, unless nothing was to be written yet
    PATH_UNDECIDED  # in the layer only if something else is: a parent, or another name of an unmodified file

# What self.written holds of a path.
cdef enum:
    IS_WRITTEN = 1
    IS_WAITING = 2  # for another name of its inode

cdef enum frame_mode:
    COMPARE         # merge the names of both trees; whiteouts of an overlay are not shown
    OVERLAY         # take the names of the upper tree only; whiteouts are deletions


# Names of one directory, sorted by bytes.
ctypedef struct name_list:
    buffer text         # NUL-terminated names
    buffer order        # uint32 positions in text

# A directory in a stack of trees: which of them contribute to it.
ctypedef struct directory_set:
    int count
    int *trees          # indices, topmost first
    int *handles        # -1: closed, to be opened again by path

ctypedef struct frame:
    int mode
    size_t path_size    # of the directory in walk.path; 0 for the root
    directory_set upper
    directory_set lower
    name_list names
    name_list lower_names
    size_t next_name
    size_t next_lower

# A stack of trees.
ctypedef struct tree_stack:
    int count
    int *roots
    bint overlay        # whiteouts and opaque marks mean something


cdef int compare_names(const void *a, const void *b, void *text) noexcept nogil:
    return strcmp(<const char *>text + (<const uint32_t *>a)[0], <const char *>text + (<const uint32_t *>b)[0])


cdef inline const char *name_at(const name_list *names, size_t i) noexcept nogil:
    return <const char *>names.text.data + (<const uint32_t *>names.order.data)[i]


cdef inline size_t name_count(const name_list *names) noexcept nogil:
    return names.order.size // sizeof(uint32_t)


cdef inline bint is_whiteout(const struct_stat *found) noexcept nogil:
    return S_ISCHR(found.st_mode) and found.st_rdev == 0


cdef inline bint same_bytes(const uint8_t *a, ssize_t a_size, const uint8_t *b, ssize_t b_size) noexcept nogil:
    return a_size == b_size and (a_size <= 0 or memcmp(a, b, a_size) == 0)


cdef class TreeWalk:
    """Writes the changeset of an upper tree over its lowers into a builder.

    upper: handle of the upper tree's root; lowers: handles of the lower trees, topmost first; overlay: the upper tree is
    an overlayfs upperdir and the lowers are its layers; epoch: upper bound of modification times in seconds, or None;
    landmarks_reserved: a landmark of the source would collide with the builder's. The handles must stay open until the
    builder is finished.
    """

    cdef LayerBuilder builder
    cdef tree_stack upper_trees, lower_trees
    cdef bint overlay, has_epoch, landmarks_reserved
    cdef int64_t epoch
    cdef buffer frames              # frame
    cdef buffer path                # of the directory or entry at hand, without leading slash
    cdef byte_map written           # directories in the layer, and everything that came first or waits since then
    cdef byte_map first_names       # device, inode -> position in link_names: the name it was first written under
    cdef byte_map waiting_names     # the same -> position in link_names: the last of its names not written yet
    cdef buffer link_names
    cdef buffer target              # of the symbolic link at hand
    cdef buffer component           # of the path that is sought, NUL-terminated
    cdef bint seeking               # paths one by one, instead of all of them
    cdef bint looking               # to say what would be written, without writing it
    cdef bint some_came_first
    cdef int state                  # of the path that is sought: PATH_...
    cdef uint8_t *capability
    cdef uint8_t *other_capability
    cdef uint8_t *compare_buffers

    def __cinit__(self, LayerBuilder builder not None, int upper, list lowers not None, *, bint overlay, epoch,
                  bint landmarks_reserved):
        self.builder = builder
        self.overlay = overlay
        self.has_epoch = epoch is not None
        self.epoch = epoch if epoch is not None else 0
        self.landmarks_reserved = landmarks_reserved
        make_trees(&self.upper_trees, [upper], overlay)
        # A single lower directory is taken as it is, as BuildKit mounts it: marks in it have nothing below to act on.
        make_trees(&self.lower_trees, lowers, overlay and len(lowers) > 1)
        self.capability = <uint8_t *>malloc(CAPABILITY_AT + XATTR_LIMIT)
        self.other_capability = <uint8_t *>malloc(CAPABILITY_AT + XATTR_LIMIT)
        self.compare_buffers = <uint8_t *>malloc(2 * COMPARE_SIZE)
        if self.capability == NULL or self.other_capability == NULL or self.compare_buffers == NULL:
            raise MemoryError

    def __dealloc__(self):
        while self.frames.size:
            self.leave()
        buffer_free(&self.frames)
        buffer_free(&self.path)
        buffer_free(&self.link_names)
        buffer_free(&self.target)
        buffer_free(&self.component)
        map_free(&self.written)
        map_free(&self.first_names)
        map_free(&self.waiting_names)
        free(self.upper_trees.roots)
        free(self.lower_trees.roots)
        free(self.capability)
        free(self.other_capability)
        free(self.compare_buffers)

    def run(self):
        """Walks; raises SourceError naming the path that cannot be read."""
        cdef int code
        with nogil:
            self.builder.begin_turn()
            code = self.walk()
            while self.frames.size:  # left open by a failure, whose traceback may keep this object for long
                self.leave()
            if not code:
                code = self.builder.end_archive()
            self.builder.end_turn()
        if code:
            self.builder.raise_failure()

    def look_up(self, bytes paths):
        """What `write_first` would answer now, without writing anything."""
        return self.seek_all(paths, True)

    def write_first(self, bytes paths):
        """Writes paths of the upper tree, each with its parents, in front of everything that `run` writes.

        paths: each followed by a NUL, relative to the root, without empty, "." or ".." components. Returns a byte for
        each: PATH_... Paths that are not in the upper tree, or not in the changeset, are left out.
        """
        return self.seek_all(paths, False)

    def decide(self, bytes paths, bytearray states):
        """Settles what `write_first` left undecided, once `run` has written everything."""
        cdef const uint8_t *at = paths
        cdef uint8_t *state = states
        cdef int64_t *known
        cdef Py_ssize_t i
        for i in range(len(states)):
            if state[i] == PATH_UNDECIDED:
                known = map_find(&self.written, at, strlen(<const char *>at))
                state[i] = PATH_PRESENT if known != NULL and known[0] == IS_WRITTEN else PATH_ABSENT
            at += strlen(<const char *>at) + 1

    def names_below(self, bytes directory):
        """All paths below a directory of the upper tree, each followed by a NUL; none when it is no directory."""
        cdef const uint8_t *path = directory
        cdef size_t size = len(directory)
        cdef buffer names
        cdef int code
        memset(&names, 0, sizeof(names))
        try:
            with nogil:
                self.builder.begin_turn()
                code = self.list_below(path, size, &names)
                while self.frames.size:
                    self.leave()
                self.builder.end_turn()
            if code:
                self.builder.raise_failure()
            return names.data[:names.size] if names.size else b""
        finally:
            buffer_free(&names)

    # --------------------------------------------------------------------------------------------- what comes first

    cdef bytearray seek_all(self, bytes paths, bint looking):
        cdef const uint8_t *at = paths
        cdef const uint8_t *end = at + len(paths)
        cdef bytearray states = bytearray(paths.count(b"\0"))
        cdef uint8_t *state = states
        cdef int code
        self.looking = looking
        self.seeking = True
        with nogil:
            self.builder.begin_turn()
            code = self.enter_root()
            while not code and at < end:
                code = self.seek(at, strlen(<const char *>at))
                state[0] = self.state
                state += 1
                at += strlen(<const char *>at) + 1
            while self.frames.size:
                self.leave()
            self.builder.end_turn()
        self.seeking = False
        self.looking = False
        self.some_came_first = True
        if code:
            self.builder.raise_failure()
        return states

    cdef int seek(self, const uint8_t *path, size_t size) noexcept nogil:
        """Goes to one path of the upper tree, from the deepest frame that lies on the way, and writes it; sets self.state."""
        cdef size_t at, end
        cdef int64_t *known = map_find(&self.written, path, size)
        cdef int code = EST_OK
        if not self.builder.attend():
            return EST_CANCELLED
        # The root is in every layer, without an entry.
        self.state = PATH_UNDECIDED if known != NULL and known[0] == IS_WAITING else PATH_PRESENT
        if size == 0 or known != NULL:
            return EST_OK
        while self.top().path_size and not is_above(self.path.data, self.top().path_size, path, size):
            self.leave()
        while not code:
            at = self.top().path_size
            at += 1 if at else 0
            end = at
            while end < size and path[end] != c'/':
                end += 1
            self.component.size = 0
            if not (buffer_append(&self.component, path + at, end - at) and buffer_append(&self.component, "", 1)):
                return self.failed(EST_NO_MEMORY, 0)
            self.path.size = self.top().path_size
            if not self.append_name(<const char *>self.component.data):
                return self.failed(EST_NO_MEMORY, 0)
            self.state = PATH_ABSENT
            code = self.visit_sought(<const char *>self.component.data, end == size)
            if end == size or self.path.size != self.top().path_size:
                break
        return code

    cdef int visit_sought(self, const char *name, bint last) noexcept nogil:
        """Writes the last component of a sought path; enters the directory that any other one is, if it is one."""
        cdef frame *f = self.top()
        cdef struct_stat upper_stat, lower_stat
        cdef directory_set lower
        cdef int handle = self.handle_of(&f.upper, &self.upper_trees, 0)
        cdef int found, code
        if handle < 0:
            return self.failed(EST_OPEN, errno)
        if fstatat(handle, name, &upper_stat, AT_SYMLINK_NOFOLLOW):
            return EST_OK if errno == ENOENT or errno == ENAMETOOLONG else self.failed(EST_STAT, errno)
        if (self.overlay and is_whiteout(&upper_stat)) or not (last or S_ISDIR(upper_stat.st_mode)):
            return EST_OK
        found = self.find_lower(name, &lower_stat, &lower)
        if found < 0:
            return found
        code = self.check_overlay_marks(handle, name, &upper_stat)
        if not code and last:
            code = self.report(handle, name, &upper_stat, found, &lower_stat, &lower)
        if code or last:
            free_set(&lower)
            return code
        return self.descend(handle, name, found, &lower)

    cdef int list_below(self, const uint8_t *path, size_t size, buffer *names) noexcept nogil:
        cdef struct_stat found
        cdef frame *f
        cdef int code
        cdef int handle = open_beneath(self.upper_trees.roots[0], <const char *>path, size, OPEN_DIRECTORY)
        if handle < 0 and (errno == ENOENT or errno == ENOTDIR or errno == ELOOP or errno == ENAMETOOLONG):
            return EST_OK
        if handle < 0:
            return self.builder.set_failure(EST_OPEN, errno, -1, path, size)
        close(handle)
        self.path.size = 0
        if not buffer_append(&self.path, path, size):
            return self.failed(EST_NO_MEMORY, 0)
        code = self.enter_upper()
        while not code and self.frames.size:
            f = self.top()
            self.path.size = f.path_size
            if f.next_name == name_count(&f.names):
                self.leave()
                continue
            if not self.builder.attend():
                return EST_CANCELLED
            f.next_name += 1
            if not (self.append_name(name_at(&f.names, f.next_name - 1))
                    and buffer_append(names, self.path.data, self.path.size) and buffer_append(names, "", 1)):
                return self.failed(EST_NO_MEMORY, 0)
            handle = self.handle_of(&f.upper, &self.upper_trees, 0)
            if handle < 0:
                return self.failed(EST_OPEN, errno)
            if fstatat(handle, name_at(&f.names, f.next_name - 1), &found, AT_SYMLINK_NOFOLLOW):
                return self.failed(EST_STAT, errno)
            if S_ISDIR(found.st_mode):
                code = self.enter_upper()
        return code

    cdef int enter_upper(self) noexcept nogil:
        """Enters the directory at self.path in the upper tree alone."""
        cdef directory_set upper, lower
        if not make_set(&upper, 1):
            return self.failed(EST_NO_MEMORY, 0)
        if not make_set(&lower, 0):
            free_set(&upper)
            return self.failed(EST_NO_MEMORY, 0)
        add_tree(&upper, 0)
        return self.enter(OVERLAY, &upper, &lower)

    # --------------------------------------------------------------------------------------------- the walk

    cdef int failed(self, int code, int sys_errno) noexcept nogil:
        """Keeps a failure of the path at hand. Whatever is looked at has been listed just before: if it is not there
        any more, or is of another kind, the tree has changed."""
        if (sys_errno == ENOENT or sys_errno == ENOTDIR or sys_errno == ELOOP
                or (code == EST_READ_LINK and sys_errno == EINVAL)):
            code = EST_REPLACED
        return self.builder.set_failure(code, sys_errno, -1, self.path.data, self.path.size)

    cdef inline frame *top(self) noexcept nogil:
        return <frame *>(self.frames.data + self.frames.size) - 1

    cdef int walk(self) noexcept nogil:
        cdef int code = self.enter_root()
        while not code and self.frames.size:
            code = self.advance()
        return code

    cdef int enter_root(self) noexcept nogil:
        cdef directory_set upper, lower
        cdef int i
        if not (make_set(&upper, 1) and make_set(&lower, self.lower_trees.count)):
            return self.failed(EST_NO_MEMORY, 0)
        for i in range(self.lower_trees.count):
            add_tree(&lower, i)
        add_tree(&upper, 0)
        self.path.size = 0
        return self.enter(OVERLAY if self.overlay else COMPARE, &upper, &lower)

    cdef int enter(self, int mode, directory_set *upper, directory_set *lower) noexcept nogil:
        """Opens the directory at self.path in both trees; takes the sets over."""
        cdef frame entered
        cdef frame *f
        cdef int code
        memset(&entered, 0, sizeof(entered))
        entered.mode = mode
        entered.path_size = self.path.size
        entered.upper = upper[0]
        entered.lower = lower[0]
        if not buffer_append(&self.frames, &entered, sizeof(frame)):
            free_set(upper)
            free_set(lower)
            return self.failed(EST_NO_MEMORY, 0)
        self.close_far_handles()
        if self.seeking:
            return EST_OK
        f = self.top()
        code = self.list_names(&f.upper, &self.upper_trees, &f.names)
        if not code and mode == COMPARE:
            code = self.list_names(&f.lower, &self.lower_trees, &f.lower_names)
        return code

    cdef void leave(self) noexcept nogil:
        cdef frame *f = self.top()
        free_set(&f.upper)
        free_set(&f.lower)
        buffer_free(&f.names.text)
        buffer_free(&f.names.order)
        buffer_free(&f.lower_names.text)
        buffer_free(&f.lower_names.order)
        self.frames.size -= sizeof(frame)

    cdef void close_far_handles(self) noexcept nogil:
        """A deep tree must not use up the process's file descriptors: frames far up are opened again when needed."""
        cdef size_t depth = self.frames.size // sizeof(frame)
        cdef size_t kept = HANDLES_KEPT // (1 + self.lower_trees.count)
        cdef frame *far
        if kept < 2:
            kept = 2
        if depth > kept:
            far = <frame *>self.frames.data + (depth - kept - 1)
            close_set(&far.upper)
            close_set(&far.lower)

    cdef int advance(self) noexcept nogil:
        """Deals with the next name of the deepest directory, or leaves it."""
        cdef frame *f = self.top()
        cdef bint has_upper = f.next_name < name_count(&f.names)
        cdef bint has_lower = f.next_lower < name_count(&f.lower_names)
        cdef const char *name
        cdef int order
        if not self.builder.attend():
            return EST_CANCELLED
        self.path.size = f.path_size
        if not has_upper and not has_lower:
            self.leave()
            return EST_OK
        if has_upper and has_lower:
            order = strcmp(name_at(&f.names, f.next_name), name_at(&f.lower_names, f.next_lower))
        else:
            order = -1 if has_upper else 1
        name = name_at(&f.names, f.next_name) if order <= 0 else name_at(&f.lower_names, f.next_lower)
        if order <= 0:
            f.next_name += 1
        if order >= 0 and has_lower:
            f.next_lower += 1
        if not self.append_name(name):
            return self.failed(EST_NO_MEMORY, 0)
        if order > 0:
            return self.visit_lower_only(name)
        return self.visit_upper(name, order == 0 or f.mode == OVERLAY)

    cdef bint append_name(self, const char *name) noexcept nogil:
        if self.path.size and not buffer_append(&self.path, "/", 1):
            return False
        return buffer_append(&self.path, name, strlen(name))

    cdef int visit_lower_only(self, const char *name) noexcept nogil:
        cdef directory_set lower
        cdef struct_stat lower_stat
        cdef int found = self.find_lower(name, &lower_stat, &lower)
        if found <= 0:
            return found
        free_set(&lower)
        return self.write_whiteout()

    cdef int visit_upper(self, const char *name, bint maybe_lower) noexcept nogil:
        cdef frame *f = self.top()
        cdef struct_stat upper_stat, lower_stat
        cdef directory_set lower
        cdef int found = 0
        cdef int code
        cdef int handle = self.handle_of(&f.upper, &self.upper_trees, 0)
        if handle < 0:
            return self.failed(EST_OPEN, errno)
        if fstatat(handle, name, &upper_stat, AT_SYMLINK_NOFOLLOW):
            return self.failed(EST_STAT, errno)
        memset(&lower, 0, sizeof(lower))
        if maybe_lower:
            found = self.find_lower(name, &lower_stat, &lower)
            if found < 0:
                return found
        if self.overlay and is_whiteout(&upper_stat):
            free_set(&lower)
            return self.write_whiteout() if found else EST_OK
        code = self.check_overlay_marks(handle, name, &upper_stat)
        if not code:
            code = self.report(handle, name, &upper_stat, found, &lower_stat, &lower)
        if code or not S_ISDIR(upper_stat.st_mode):
            free_set(&lower)
            return code
        return self.descend(handle, name, found, &lower)

    cdef int report(self, int handle, const char *name, const struct_stat *upper_stat, bint found,
                    const struct_stat *lower_stat, const directory_set *lower) noexcept nogil:
        """Decides what kind of change a path of the upper tree is, and writes it."""
        cdef int same = 0
        cdef int kind = CHANGE_ADD
        if self.some_came_first and map_find(&self.written, self.path.data, self.path.size) != NULL:
            return EST_OK
        if found:
            same = self.is_same(handle, name, upper_stat, lower_stat, lower)
            if same < 0:
                return same
            kind = CHANGE_UNMODIFIED if same else CHANGE_MODIFY
        if same and S_ISDIR(upper_stat.st_mode):
            self.state = PATH_UNDECIDED
            return EST_OK
        # The overlay differ never reports a path that is the same; the walking one needs to know of other links.
        if S_ISSOCK(upper_stat.st_mode) or (same and (self.top().mode == OVERLAY or upper_stat.st_nlink < 2)):
            return EST_OK
        self.state = PATH_UNDECIDED if same else PATH_PRESENT
        return EST_OK if self.looking else self.write_change(kind, handle, name, upper_stat)

    cdef int descend(self, int handle, const char *name, bint found, directory_set *lower) noexcept nogil:
        cdef directory_set upper
        cdef int mode = self.top().mode
        cdef int opaque = 0
        if not make_set(&upper, 1):
            free_set(lower)
            return self.failed(EST_NO_MEMORY, 0)
        add_tree(&upper, 0)
        if mode == OVERLAY and found:
            opaque = self.has_mark(handle, name, "opaque", True)
            if opaque < 0:
                free_set(&upper)
                free_set(lower)
                return opaque
            if opaque:
                mode = COMPARE
        return self.enter(mode, &upper, lower)

    # --------------------------------------------------------------------------------------------- trees

    cdef int handle_of(self, directory_set *directory, const tree_stack *trees, int i) noexcept nogil:
        """An open handle of the top frame's directory in its i-th tree; -1 with errno set."""
        if directory.handles[i] < 0:
            directory.handles[i] = open_beneath(trees.roots[directory.trees[i]], <const char *>self.path.data,
                                                self.top().path_size, OPEN_DIRECTORY)
        return directory.handles[i]

    cdef int list_names(self, directory_set *directory, const tree_stack *trees, name_list *names) noexcept nogil:
        """All names in a directory's trees, sorted and without repetition."""
        cdef uint32_t *order
        cdef size_t kept = 0
        cdef size_t i
        cdef int tree
        for tree in range(directory.count):
            if self.handle_of(directory, trees, tree) < 0:
                return self.failed(EST_OPEN, errno)
            if not read_names(directory.handles[tree], names):
                return self.failed(EST_LIST, errno)
        order = <uint32_t *>names.order.data
        if name_count(names) > 1:
            qsort_r(order, name_count(names), sizeof(uint32_t), compare_names, names.text.data)
        if directory.count > 1:
            for i in range(name_count(names)):
                if kept == 0 or strcmp(name_at(names, kept - 1), name_at(names, i)):
                    order[kept] = order[i]
                    kept += 1
            names.order.size = kept * sizeof(uint32_t)
        return EST_OK

    cdef int find_lower(self, const char *name, struct_stat *found_stat, directory_set *found) noexcept nogil:
        """Looks a name of the top frame up in the lower trees: 1 and what it is, 0 when there is none, or a code.

        `found` says which trees contribute to it when it is a directory.
        """
        cdef frame *f = self.top()
        cdef struct_stat one
        cdef bint any = False
        cdef int i, handle, opaque, code
        if not make_set(found, f.lower.count):
            return self.failed(EST_NO_MEMORY, 0)
        for i in range(f.lower.count):
            handle = self.handle_of(&f.lower, &self.lower_trees, i)
            if handle < 0:
                code = self.failed(EST_OPEN, errno)
                free_set(found)
                return code
            if fstatat(handle, name, &one, AT_SYMLINK_NOFOLLOW):
                if errno == ENOENT or errno == ENOTDIR:
                    continue
                code = self.failed(EST_STAT, errno)
                free_set(found)
                return code
            if self.lower_trees.overlay and is_whiteout(&one):
                break
            if not any:
                found_stat[0] = one
                any = True
            elif not S_ISDIR(one.st_mode):
                break
            add_tree(found, f.lower.trees[i])
            if not S_ISDIR(one.st_mode):
                break
            if self.lower_trees.overlay:
                code = self.check_overlay_marks(handle, name, &one)
                opaque = code if code else self.has_mark(handle, name, "opaque", True)
                if opaque < 0:
                    free_set(found)
                    return opaque
                if opaque:
                    break
        if any and not S_ISDIR(found_stat.st_mode):
            found.count = 0     # nothing to descend into; trees[0] still says where it is
        if not any:
            free_set(found)
        return any

    # --------------------------------------------------------------------------------------------- overlay marks

    cdef int has_mark(self, int handle, const char *name, const char *mark, bint is_yes) noexcept nogil:
        """Whether overlayfs has set trusted.overlay.MARK or user.overlay.MARK (to "y" if asked); or a code."""
        cdef char attribute[64]
        cdef char value[8]
        cdef ssize_t got
        cdef int i
        for i in range(2):
            attribute[0] = 0
            memcpy(attribute, b"trusted.overlay." if i == 0 else b"user.overlay.", 17 if i == 0 else 14)
            memcpy(attribute + strlen(attribute), mark, strlen(mark) + 1)
            got = est_getxattr_at(handle, name, attribute, value, sizeof(value))
            if got < 0 and errno == ERANGE:
                got = sizeof(value)
            if got < 0 and errno != ENODATA and errno != ENOTSUP:
                return self.failed(EST_XATTR, errno)
            if is_yes and got == 1 and value[0] == c'y':
                return 1
            if not is_yes and got >= 0:
                return 1
        return 0

    cdef int check_overlay_marks(self, int handle, const char *name, const struct_stat *found) noexcept nogil:
        """Refuses what has its content elsewhere: redirected directories and metadata-only copies."""
        cdef int marked = 0
        if not self.overlay:
            return EST_OK
        if S_ISDIR(found.st_mode):
            marked = self.has_mark(handle, name, "redirect", False)
        elif S_ISREG(found.st_mode):
            marked = self.has_mark(handle, name, "metacopy", False)
        if marked < 0:
            return marked
        return self.failed(EST_REDIRECT, 0) if marked else EST_OK

    # --------------------------------------------------------------------------------------------- comparing

    cdef int is_same(self, int handle, const char *name, const struct_stat *upper, const struct_stat *lower,
                     const directory_set *lower_set) noexcept nogil:
        """1 if a path is the same in both trees by containerd's rule, 0 if not; or a code."""
        cdef int lower_handle, code
        if not self.overlay and upper.st_dev == lower.st_dev and upper.st_ino == lower.st_ino:
            return 1
        if (upper.st_mode != lower.st_mode or upper.st_uid != lower.st_uid or upper.st_gid != lower.st_gid
                or upper.st_rdev != lower.st_rdev):
            return 0
        if not S_ISDIR(upper.st_mode) and (upper.st_size != lower.st_size
                                           or upper.st_mtim.tv_sec != lower.st_mtim.tv_sec
                                           or upper.st_mtim.tv_nsec != lower.st_mtim.tv_nsec):
            return 0
        lower_handle = self.lower_handle(lower_set)
        if lower_handle < 0:
            return self.failed(EST_OPEN, errno)
        cdef int same = self.same_capability(handle, lower_handle, name)
        # Equal times tell files apart only where they have a fraction: archives cut it off.
        if same != 1 or S_ISDIR(upper.st_mode) or upper.st_mtim.tv_nsec:
            return same
        if S_ISLNK(upper.st_mode):
            return self.same_target(handle, lower_handle, name)
        if upper.st_size == 0:
            return 1
        code = self.check_overlay_marks(lower_handle, name, lower)
        return code if code else self.same_content(handle, lower_handle, name)

    cdef int lower_handle(self, const directory_set *found) noexcept nogil:
        """The handle of the lower directory that holds the entry that find_lower found."""
        cdef frame *f = self.top()
        cdef int i
        for i in range(f.lower.count):
            if f.lower.trees[i] == found.trees[0]:
                return self.handle_of(&f.lower, &self.lower_trees, i)
        return -1

    cdef ssize_t read_capability(self, int handle, const char *name, uint8_t *value) noexcept nogil:
        """Bytes of security.capability, 0 when there is none; -1 with errno set."""
        # The kernel allocates and clears as much as it is offered, for every file, before it looks whether there is one.
        cdef ssize_t got = est_getxattr_at(handle, name, "security.capability", value, CAPABILITY_USUAL)
        if got < 0 and errno == ERANGE:
            got = est_getxattr_at(handle, name, "security.capability", value, XATTR_LIMIT)
        if got < 0 and (errno == ENODATA or errno == ENOTSUP):
            return 0
        return got

    cdef int same_capability(self, int handle, int lower_handle, const char *name) noexcept nogil:
        cdef ssize_t size = self.read_capability(handle, name, self.capability)
        cdef ssize_t lower_size = self.read_capability(lower_handle, name, self.other_capability) if size >= 0 else 0
        if size < 0 or lower_size < 0:
            return self.failed(EST_XATTR, errno)
        return same_bytes(self.capability, size, self.other_capability, lower_size)

    cdef int same_target(self, int handle, int lower_handle, const char *name) noexcept nogil:
        cdef char *a = <char *>self.compare_buffers
        cdef char *b = a + COMPARE_SIZE
        cdef ssize_t size = readlinkat(handle, name, a, COMPARE_SIZE)
        cdef ssize_t lower_size = readlinkat(lower_handle, name, b, COMPARE_SIZE) if size >= 0 else 0
        if size < 0 or lower_size < 0:
            return self.failed(EST_READ_LINK, errno)
        return same_bytes(<uint8_t *>a, size, <uint8_t *>b, lower_size)

    cdef int same_content(self, int handle, int lower_handle, const char *name) noexcept nogil:
        cdef int a = open_beneath(handle, name, strlen(name), OPEN_FILE)
        cdef int b = open_beneath(lower_handle, name, strlen(name), OPEN_FILE) if a >= 0 else -1
        cdef uint8_t *buffer_a = self.compare_buffers
        cdef uint8_t *buffer_b = buffer_a + COMPARE_SIZE
        cdef ssize_t size, lower_size
        cdef int same = 1
        if a < 0 or b < 0:
            same = self.failed(EST_OPEN, errno)
        while same == 1:
            if not self.builder.attend():
                same = EST_CANCELLED
                break
            size = read_fully(a, buffer_a, COMPARE_SIZE)
            lower_size = read_fully(b, buffer_b, COMPARE_SIZE)
            if size < 0 or lower_size < 0:
                same = self.failed(EST_READ, errno)
            elif not same_bytes(buffer_a, size, buffer_b, lower_size):
                same = 0
            elif size < COMPARE_SIZE:
                break
        if a >= 0:
            close(a)
        if b >= 0:
            close(b)
        return same

    # --------------------------------------------------------------------------------------------- writing

    cdef int write_whiteout(self) noexcept nogil:
        """The path at hand is gone: an empty file whose name says so."""
        cdef tar_entry entry
        cdef buffer name
        cdef size_t parent = parent_size(self.path.data, self.path.size)
        cdef size_t base = parent + 1 if parent else 0
        cdef int code = self.write_parents(self.path.data, self.path.size)
        if code:
            return code
        memset(&name, 0, sizeof(name))
        if not (buffer_append(&name, self.path.data, base) and buffer_append(&name, ".wh.", 4)
                and buffer_append(&name, self.path.data + base, self.path.size - base)):
            buffer_free(&name)
            return self.failed(EST_NO_MEMORY, 0)
        memset(&entry, 0, sizeof(entry))
        entry.name = name.data
        entry.name_len = name.size
        entry.type = c'0'
        code = self.builder.add_entry(&entry)
        buffer_free(&name)
        return code

    cdef int write_change(self, int kind, int handle, const char *name, const struct_stat *found) noexcept nogil:
        """One path of the upper tree, with its parents before it and the links that waited for it behind it."""
        cdef tar_entry entry
        cdef int64_t waiting = -1
        cdef int code
        if self.landmarks_reserved and is_landmark(self.path.data, self.path.size):
            return self.failed(EST_RESERVED_NAME, 0)
        code = self.describe(&entry, handle, name, found)
        if code:
            return code
        if not S_ISDIR(found.st_mode) and found.st_nlink > 1:
            code = self.resolve_link(kind, found, &entry, &waiting)
            if code == LINK_WAITS:
                # The walk must not let it wait a second time.
                if self.seeking and not self.note(entry.name, entry.name_len, IS_WAITING):
                    return self.failed(EST_NO_MEMORY, 0)
                return EST_OK
            if code:
                return code
        elif kind == CHANGE_UNMODIFIED:
            return EST_OK
        code = self.write_parents(self.path.data, self.path.size)
        if not code:
            code = self.write_entry(&entry)
        if not code and entry.type == c'0' and entry.size:
            code = self.write_payload(found)
        if not code and waiting >= 0:
            code = self.write_waiting_links(&entry, waiting)
        return code

    cdef int describe(self, tar_entry *entry, int handle, const char *name, const struct_stat *found) noexcept nogil:
        """The header fields of the path at hand. Strings lie in this object until the next call."""
        cdef ssize_t capability_size
        cdef int code = EST_OK
        memset(entry, 0, sizeof(tar_entry))
        entry.type = type_of(found.st_mode)
        if entry.type == c'5':
            if not buffer_append(&self.path, "/", 1):
                return self.failed(EST_NO_MEMORY, 0)
            self.path.size -= 1
        entry.name = self.path.data
        entry.name_len = self.path.size + (1 if entry.type == c'5' else 0)
        entry.mode = found.st_mode & 0o7777
        entry.uid = found.st_uid
        entry.gid = found.st_gid
        entry.mtime_s = found.st_mtim.tv_sec
        if self.has_epoch and entry.mtime_s >= self.epoch:
            entry.mtime_s = self.epoch
        if entry.type == c'0':
            entry.size = found.st_size
        if entry.type == c'3' or entry.type == c'4':
            entry.dev_major = major(found.st_rdev)
            entry.dev_minor = minor(found.st_rdev)
        if entry.type == c'2':
            code = self.read_target(handle, name, entry)
        if code:
            return code
        capability_size = self.read_capability(handle, name, self.capability + CAPABILITY_AT)
        if capability_size < 0:
            return self.failed(EST_XATTR, errno)
        if capability_size:
            pack_capability(self.capability, capability_size)
            entry.xattrs = self.capability
            entry.xattrs_len = CAPABILITY_AT + capability_size
        return EST_OK

    cdef int read_target(self, int handle, const char *name, tar_entry *entry) noexcept nogil:
        cdef ssize_t got
        self.target.size = 0
        if not buffer_reserve(&self.target, 8192):
            return self.failed(EST_NO_MEMORY, 0)
        got = readlinkat(handle, name, <char *>self.target.data, self.target.capacity)
        if got < 0:
            return self.failed(EST_READ_LINK, errno)
        entry.link = self.target.data
        entry.link_len = got
        return EST_OK

    cdef int write_entry(self, const tar_entry *entry) noexcept nogil:
        cdef size_t size = entry.name_len - (1 if entry.type == c'5' else 0)
        cdef bint noted = entry.type == c'5' or self.seeking or (
            self.some_came_first and entry.type == c'1' and map_find(&self.written, entry.name, size) != NULL)
        if noted and not self.note(entry.name, size, IS_WRITTEN):
            return self.failed(EST_NO_MEMORY, 0)
        return self.builder.add_entry(entry)

    cdef bint note(self, const uint8_t *path, size_t size, int64_t how) noexcept nogil:
        cdef int64_t *known = map_insert(&self.written, path, size, how)
        if known != NULL:
            known[0] = how
        return known != NULL

    cdef int write_payload(self, const struct_stat *found) noexcept nogil:
        cdef source_file source
        source.root = self.upper_trees.roots[0]
        source.path = <const char *>self.path.data
        source.path_size = self.path.size
        source.device = found.st_dev
        source.inode = found.st_ino
        source.size = found.st_size
        source.mtime_s = found.st_mtim.tv_sec
        source.mtime_ns = found.st_mtim.tv_nsec
        return self.builder.add_payload_file(&source)

    # --------------------------------------------------------------------------------------------- parents

    cdef int write_parents(self, const uint8_t *path, size_t size) noexcept nogil:
        """Writes the directories above a path that the layer does not have yet, outermost first."""
        cdef size_t parent = parent_size(path, size)
        cdef size_t at = 0
        cdef int code
        if not parent or map_find(&self.written, path, parent) != NULL:
            return EST_OK
        while at < parent:
            at += 1
            while at < parent and path[at] != c'/':
                at += 1
            if map_find(&self.written, path, at) == NULL:
                code = self.write_parent(path, at)
                if code:
                    return code
        return EST_OK

    cdef int write_parent(self, const uint8_t *path, size_t size) noexcept nogil:
        cdef tar_entry entry
        cdef struct_stat found
        cdef buffer kept_path = self.path
        cdef uint8_t *kept_capability = self.capability
        cdef buffer kept_target = self.target
        cdef int code
        cdef int handle = open_beneath(self.upper_trees.roots[0], <const char *>path, size, OPEN_DIRECTORY)
        if handle < 0 or fstat(handle, &found):
            code = self.builder.set_failure(EST_STAT, errno, -1, path, size)
            if handle >= 0:
                close(handle)
            return code
        # The entry at hand is already described: its strings must outlive this one's.
        memset(&self.path, 0, sizeof(buffer))
        memset(&self.target, 0, sizeof(buffer))
        self.capability = self.other_capability
        code = EST_OK
        if not buffer_append(&self.path, path, size):
            code = self.failed(EST_NO_MEMORY, 0)
        if not code:
            code = self.describe(&entry, handle, ".", &found)
        if not code:
            code = self.write_entry(&entry)
        buffer_free(&self.path)
        buffer_free(&self.target)
        self.path = kept_path
        self.target = kept_target
        self.capability = kept_capability
        close(handle)
        return code

    # --------------------------------------------------------------------------------------------- hard links

    cdef int resolve_link(self, int kind, const struct_stat *found, tar_entry *entry, int64_t *waiting) noexcept nogil:
        """Makes the entry a link if its inode has been written, else makes it the one that others will link to.

        An unmodified name that has nothing to link to waits: LINK_WAITS. `waiting`: the last name that waits for this
        inode, or -1. Inodes are told apart by their device, too: mounts number theirs alike. containerd's differ, which
        does not, would give a file another one's content there.
        """
        cdef uint64_t inode[2]
        cdef int64_t *first
        cdef int64_t *waiters
        cdef int64_t position = self.link_names.size
        inode[0], inode[1] = found.st_dev, found.st_ino
        first = map_find(&self.first_names, inode, sizeof(inode))
        if first != NULL:
            link_name(self.link_names.data, first[0], &entry.link, &entry.link_len)
            entry.type = c'1'
            entry.size = 0
            return EST_OK
        if not self.keep_link_name(entry.name, entry.name_len):
            return self.failed(EST_NO_MEMORY, 0)
        if kind == CHANGE_UNMODIFIED:
            waiters = map_insert(&self.waiting_names, inode, sizeof(inode), -1)
            if waiters == NULL:
                return self.failed(EST_NO_MEMORY, 0)
            self.chain(waiters, position)
            return LINK_WAITS
        if map_insert(&self.first_names, inode, sizeof(inode), position) == NULL:
            return self.failed(EST_NO_MEMORY, 0)
        waiters = map_find(&self.waiting_names, inode, sizeof(inode))
        if waiters != NULL:
            waiting[0] = waiters[0]
        return EST_OK

    cdef bint keep_link_name(self, const uint8_t *name, uint32_t size) noexcept nogil:
        """Appends a record to link_names: position of the next record in its ring, at first itself; size, bytes."""
        cdef int64_t position = self.link_names.size
        return (buffer_append(&self.link_names, &position, 8) and buffer_append(&self.link_names, &size, 4)
                and buffer_append(&self.link_names, name, size))

    cdef void chain(self, int64_t *last, int64_t position) noexcept nogil:
        """Makes a record the last of a ring, whose last leads to its first: an inode may have many names."""
        cdef uint8_t *names = self.link_names.data
        if last[0] >= 0:
            memcpy(names + position, names + last[0], 8)
            memcpy(names + last[0], &position, 8)
        last[0] = position

    cdef int write_waiting_links(self, const tar_entry *written, int64_t last) noexcept nogil:
        """Writes the names that waited for an inode's first entry, in the order in which they were met."""
        cdef int64_t position = last
        cdef int code = EST_OK
        while not code:
            memcpy(&position, self.link_names.data + position, 8)
            code = self.write_waiting_link(written, position)
            if position == last:
                break
        return code

    cdef int write_waiting_link(self, const tar_entry *written, int64_t position) noexcept nogil:
        cdef tar_entry entry = written[0]
        cdef int code
        link_name(self.link_names.data, position, &entry.name, &entry.name_len)
        entry.link = written.name
        entry.link_len = written.name_len
        entry.type = c'1'
        entry.size = 0
        code = self.write_parents(entry.name, entry.name_len)
        if not code:
            code = self.write_entry(&entry)
        return code


cdef void pack_capability(uint8_t *packed, uint32_t value_size) noexcept nogil:
    cdef uint32_t key_size = 19
    memcpy(packed, &key_size, 4)
    memcpy(packed + 4, &value_size, 4)
    memcpy(packed + 8, b"security.capability", 19)


cdef void link_name(const uint8_t *names, int64_t position, const uint8_t **name, uint32_t *size) noexcept nogil:
    memcpy(size, names + position + 8, 4)
    name[0] = names + position + 12


cdef size_t parent_size(const uint8_t *path, size_t size) noexcept nogil:
    """Bytes of the parent's path; 0 for an entry of the root."""
    while size and path[size - 1] != c'/':
        size -= 1
    return size - 1 if size else 0


cdef bint is_above(const uint8_t *directory, size_t directory_size, const uint8_t *path, size_t size) noexcept nogil:
    return size > directory_size and path[directory_size] == c'/' and memcmp(directory, path, directory_size) == 0


cdef bint is_landmark(const uint8_t *path, size_t size) noexcept nogil:
    return ((size == 18 and memcmp(path, b".prefetch.landmark", 18) == 0)
            or (size == 21 and memcmp(path, b".no.prefetch.landmark", 21) == 0))


cdef uint8_t type_of(unsigned int mode) noexcept nogil:
    if S_ISREG(mode):
        return c'0'
    if S_ISDIR(mode):
        return c'5'
    if S_ISLNK(mode):
        return c'2'
    if S_ISCHR(mode):
        return c'3'
    if S_ISBLK(mode):
        return c'4'
    return c'6'


cdef ssize_t read_fully(int handle, uint8_t *data, size_t size) noexcept nogil:
    cdef size_t done = 0
    cdef ssize_t got
    while done < size:
        got = read(handle, data + done, size - done)
        if got < 0:
            if errno == EINTR:
                continue
            return -1
        if got == 0:
            break
        done += got
    return done


cdef bint read_names(int handle, name_list *names) noexcept nogil:
    """Appends a directory's names, without "." and ".."; False with errno set."""
    cdef int copy = dup(handle)
    cdef DIR *directory
    cdef dirent *entry
    cdef uint32_t at
    cdef bint ok = True
    if copy < 0:
        return False
    directory = fdopendir(copy)
    if directory == NULL:
        close(copy)
        return False
    while ok:
        (&errno)[0] = 0
        entry = readdir(directory)
        if entry == NULL:
            ok = errno == 0
            break
        if strcmp(entry.d_name, ".") == 0 or strcmp(entry.d_name, "..") == 0:
            continue
        at = names.text.size
        ok = (names.text.size < <size_t>0xFFFF0000 and buffer_append(&names.text, entry.d_name, strlen(entry.d_name) + 1)
              and buffer_append(&names.order, &at, sizeof(at)))
    closedir(directory)
    return ok


# ------------------------------------------------------------------------------------------------- sets of directories

cdef int make_trees(tree_stack *trees, list handles, bint overlay) except -1:
    cdef int i
    trees.count = len(handles)
    trees.overlay = overlay
    trees.roots = <int *>calloc(trees.count + 1, sizeof(int))
    if trees.roots == NULL:
        raise MemoryError
    for i in range(trees.count):
        trees.roots[i] = handles[i]
    return 0


cdef bint make_set(directory_set *made, int most) noexcept nogil:
    made.count = 0
    made.trees = <int *>malloc(2 * (most + 1) * sizeof(int))
    made.handles = made.trees + most + 1 if made.trees != NULL else NULL
    return made.trees != NULL


cdef void add_tree(directory_set *directory, int tree) noexcept nogil:
    directory.trees[directory.count] = tree
    directory.handles[directory.count] = -1
    directory.count += 1


cdef void close_set(directory_set *directory) noexcept nogil:
    cdef int i
    for i in range(directory.count):
        if directory.handles[i] >= 0:
            close(directory.handles[i])
        directory.handles[i] = -1


cdef void free_set(directory_set *directory) noexcept nogil:
    close_set(directory)
    free(directory.trees)
    directory.trees = NULL
    directory.count = 0
