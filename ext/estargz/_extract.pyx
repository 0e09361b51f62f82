"""Tar streams into a directory: one thread reads and decides, every thread places.

The reader parses headers, makes directories and hard links, removes what whiteouts hide, and turns everything else
into jobs. A block of the stream carries the jobs whose payloads lie in it. Workers, and the reader whenever it has to
wait, take jobs from blocks in order; jobs of one layer do not depend on each other, because the reader waits before it
touches a name that a job under way is about to make.
"""

from _thread import start_new_thread

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EAGAIN, EBUSY, EEXIST, EISDIR, ENOTDIR, errno
from libc.stddef cimport size_t
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset, strcmp, strlen, strncmp

from posix.stat cimport S_IFBLK, S_IFCHR, S_IFIFO, struct_stat
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport close

from estargz._folders cimport (
    LISTEN_DIRECTORIES, NAME_MOST, WALK_LINK, WALK_MISSING, Folders, directory_meta, directory_node, unlock,
)
from estargz._memory cimport buffer, buffer_append, buffer_free, buffer_reserve, map_free
from estargz._place cimport (
    SKIP_DEVICE, list_names, place_directory, place_file, place_finish, place_meta, place_node, place_open,
    place_symlink, place_write, remove_tree,
)
from estargz._rows cimport (
    EST_CANCELLED, EST_DEVICE_RANGE, EST_LIMIT_SIZE, EST_LINK_TARGET, EST_LINK_UNSELECTED, EST_NO_MEMORY, EST_NO_THREAD,
    EST_OK,
    EST_OWNER_RANGE, EST_PLACE_LINK, EST_PLACE_META, EST_PLACE_PARENT, EST_PLACE_REMOVE, EST_PLACE_ROOT,
    EST_TAR_DANGLING_META, EST_TAR_LONE_ZERO, EST_TAR_TRUNCATED, EST_WHITEOUT_NAME, est_failure, tar_entry,
)
from estargz._tar cimport (
    TAR_META, TAR_ZERO, tar_parse_block, tar_parse_meta, tar_parser, tar_parser_free, tar_parser_init,
)
from estargz.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_signal, pthread_cond_t,
    pthread_cond_timedwait, pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_t, pthread_mutex_unlock,
)

from estargz.errors import from_status

cdef extern from "gil.h":      # what `with gil` means
    pass

cdef extern from "glance.h" nogil:
    int64_t est_glance(const int64_t *place)
    void est_show(int64_t *place, int64_t value)

cdef extern from "place.h" nogil:
    enum: AT_SYMLINK_NOFOLLOW, SEEK_SET
    int linkat(int old_directory, const char *old_name, int directory, const char *name, int flags)
    int unlinkat(int directory, const char *name, int flags)
    int fstatat(int directory, const char *name, struct_stat *found, int flags)
    int fchmod(int handle, unsigned int mode)
    int64_t lseek(int handle, int64_t offset, int whence)
    unsigned long long makedev(unsigned int major, unsigned int minor)

cdef extern from "Python.h":
    enum: PyBUF_WRITE

cdef enum:
    TAR_BLOCK = 512
    READ_SIZE = 1 << 20             # bytes of the stream that a block takes in
    TAIL_MOST = 1 << 20             # of the last block, in front of them: an extended header, a small file
    SMALL_FILE = 256 << 10          # a file that is placed in one go wherever it lies
    GROUP_JOBS = 16                 # taken at once
    GROUP_SIZE = 256 << 10
    MAJOR_MOST = (1 << 12) - 1      # the kernel's device numbers
    MINOR_MOST = (1 << 20) - 1
    NOTES_MOST = 1000               # things left out of which notes are kept
    NOTES_SIZE = 1 << 20            # bytes of all notes

cdef int64_t LISTEN_EVERY_NS = 100000000    # how often the caller looks for signals and reports progress
cdef int64_t ID_MOST = 0xFFFFFFFE           # the one above means "leave it as it is" to chown


# A file that comes in pieces, each a job of its own. It belongs to the reader and to the jobs that still write to it;
# whoever is last completes it, or removes it when a piece is missing.
ctypedef struct open_file:
    int handle
    int directory
    bint plain
    int pieces              # jobs under way, and one for the reader
    bint broken
    place_meta meta         # attributes are the file's own copy
    buffer xattrs
    buffer path             # ends in NUL
    uint32_t base
    int64_t number
    int64_t offset
    int64_t written         # bytes handed out to pieces
    int64_t size
    int64_t parent          # its node

cdef enum job_kind:
    JOB_FILE
    JOB_PIECE
    JOB_SYMLINK
    JOB_NODE

# One thing to place; strings are offsets into the block's.
ctypedef struct job:
    int kind
    int directory
    bint plain
    uint32_t path_size
    uint32_t base           # where the last component begins in the path
    uint32_t type           # of a node
    int64_t number          # of the entry, over all layers
    int64_t offset          # of its header in the layer's tar
    size_t path_at
    size_t link_at
    size_t xattrs_at
    size_t data_at
    size_t size
    int64_t file_offset
    open_file *file
    place_meta meta
    unsigned long long device

# A part of the tar stream with the jobs that it makes. Owned by the reader until it is submitted; free again when all
# its jobs are done. While jobs are taken nothing is added: the reader waits for all of them before it goes on.
ctypedef struct block:
    uint8_t *data
    size_t size
    int64_t sequence
    bint closed             # submitted
    size_t count            # jobs that may be taken
    size_t taken
    size_t done
    buffer jobs             # job
    buffer strings

cdef enum reading_state:
    READ_HEADER
    READ_META
    READ_ENTRY              # its header is complete; a small file waits for its payload
    READ_PIECES             # of a large one
    READ_SKIP
    READ_END

cdef enum:
    NEED_MORE = 1

cdef enum selection:
    SELECT_NONE
    SELECT_PARENT           # something below it is selected
    SELECT_THIS             # it is, or something above it


# What of an entry was left out, for whom it concerns.
ctypedef struct note_row:
    int64_t number
    int64_t count
    size_t path_size
    size_t size
    uint8_t *text           # the path, and as of `skipped` in _place.pxd


cdef inline size_t padding_of(int64_t size) noexcept nogil:
    return (TAR_BLOCK - size % TAR_BLOCK) % TAR_BLOCK


cdef inline bint begins(const char *name, const char *prefix) noexcept nogil:
    return strncmp(name, prefix, strlen(prefix)) == 0


cdef bint clean(buffer *out, const uint8_t *name, size_t size, uint32_t *base) noexcept nogil:
    """The name as Go's path.Clean makes it of one below "/", without that, with a NUL that size does not count; base is
    where the last component begins. Nothing is left of a name of the root. False when memory ran out."""
    cdef size_t at = 0
    cdef size_t end
    out.size = 0
    if not buffer_reserve(out, size + 2):
        return False
    while at < size:
        end = at
        while end < size and name[end] != c'/':
            end += 1
        if end - at == 2 and name[at] == c'.' and name[at + 1] == c'.':
            while out.size and out.data[out.size - 1] != c'/':
                out.size -= 1
            out.size -= out.size != 0
        elif end > at and not (end - at == 1 and name[at] == c'.'):
            if out.size:
                out.data[out.size] = c'/'
                out.size += 1
            memcpy(out.data + out.size, name + at, end - at)
            out.size += end - at
        at = end + 1
    out.data[out.size] = 0
    base[0] = <uint32_t>out.size
    while base[0] and out.data[base[0] - 1] != c'/':
        base[0] -= 1
    return True


cdef int64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef class Extractor(Folders):
    """Places the entries of layers, one layer after the other, in an open directory.

    Parameters: root: its handle, which stays the caller's; ours: it was made for this; owners and xattrs as in
    place_rules; uid, gid, umask of this process; threads >= 1; memory: bytes that parts of the stream may take;
    handles: directories kept open, 16 or more; max_size and max_entries: bytes and entries placed, or None; paths: None
    or cleaned paths as bytes, the only ones that count; salt: eight random bytes; progress: None or a callable that is
    given the bytes of tar read so far, about ten times a second, in the calling thread.

    After a failure: abandon, then nothing but clear.
    """

    cdef pthread_mutex_t lock
    cdef pthread_cond_t work_or_end      # workers wait here
    cdef pthread_cond_t progress_made    # the reader waits here
    cdef bint locks_ready

    cdef int threads
    cdef int64_t max_size

    cdef block *blocks
    cdef int64_t block_count
    cdef int64_t produced, taking               # blocks submitted; the one being taken from
    cdef block *current                         # the reader's
    cdef bint ended, cancelled
    cdef est_failure failure                    # code 0: none so far
    cdef int64_t dropped_behind                 # the failure's entry: what comes behind it is not placed
    cdef int64_t failed_layer
    cdef int running                # workers that have begun and have not ended
    cdef object interrupt, progress
    cdef int64_t progress_due_ns

    cdef tar_parser parser
    cdef int reading
    cdef bint zero_seen
    cdef int64_t stream_offset                  # of the block's first byte
    cdef int64_t total_read                     # over all layers
    cdef int64_t skip_payload, skip_padding
    cdef open_file *large
    cdef int64_t files_open                     # in pieces
    cdef buffer tail                            # of the last block, waiting for more

    cdef list layer_names
    cdef bint own_names                         # an eStargz blob: the format's own files are none of the tree's

    cdef buffer path, target, skipped
    cdef buffer selected                        # uint32 size, uint8 found, path; for each
    cdef buffer notes                           # note_row, in the entries' order
    cdef int64_t notes_count, notes_size        # things left out, and bytes, in them
    cdef int64_t notes_end                      # of entries from this on, none is kept
    cdef readonly int64_t entries, files, size, whiteouts
    cdef readonly int64_t skipped_count         # things left out, whether a note of them is kept or not

    def __cinit__(self, int root, *, bint ours, bint owners, bint xattrs, unsigned int uid, unsigned int gid,
                  unsigned int umask, int threads, int64_t memory, int64_t handles, max_size, max_entries, paths,
                  bytes salt, progress):
        self.layer_names = []
        self.rules.owners = owners
        self.rules.xattrs = xattrs
        self.rules.uid, self.rules.gid, self.rules.umask = uid, gid, umask
        self.threads = threads
        self.open_most = handles
        self.max_size = INT64_MAX if max_size is None else max_size
        self.max_entries = INT64_MAX if max_entries is None else max_entries
        self.progress = progress
        self.progress_due_ns = monotonic_ns() + LISTEN_EVERY_NS
        memcpy(self.salt, <const char *>salt, 8)
        self.notes_end = self.dropped_behind = INT64_MAX
        tar_parser_init(&self.parser)
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.work_or_end, NULL)
        pthread_cond_init(&self.progress_made, NULL)
        self.locks_ready = True
        self.block_count = max(2, memory // (READ_SIZE + TAIL_MOST // 4))
        self.blocks = <block *>calloc(self.block_count, sizeof(block))
        for path in paths or ():
            self._select(path)
        cdef int code = EST_NO_MEMORY if self.blocks == NULL else self.add_root(root, ours)
        if code:
            raise from_status(code, errno, "/")

    def _select(self, bytes path):
        cdef uint32_t size = len(path)
        cdef uint8_t found = 0
        if not (buffer_append(&self.selected, &size, sizeof(size)) and buffer_append(&self.selected, &found, 1)
                and buffer_append(&self.selected, <const char *>path, size)):
            raise MemoryError

    def __dealloc__(self):
        cdef int64_t i
        for i in range(self.block_count if self.blocks != NULL else 0):
            free(self.blocks[i].data)
            buffer_free(&self.blocks[i].jobs)
            buffer_free(&self.blocks[i].strings)
        free(self.blocks)
        buffer_free(&self.path)
        buffer_free(&self.target)
        buffer_free(&self.skipped)
        buffer_free(&self.selected)
        while self.notes.size:
            self.drop_note()
        buffer_free(&self.notes)
        buffer_free(&self.tail)
        tar_parser_free(&self.parser)
        if self.locks_ready:
            pthread_cond_destroy(&self.progress_made)
            pthread_cond_destroy(&self.work_or_end)
            pthread_mutex_destroy(&self.lock)

    # ------------------------------------------------------------------------------------------ Python's side

    def extract(self, readinto, str name, bint own_names):
        """Places everything of one layer and returns when it is there.

        ``readinto``: fills a buffer with the tar's bytes, 0 at the end. ``name``: the layer's, for messages.
        ``own_names``: leave out the files that belong to the eStargz format. Raises the first entry's error.
        """
        cdef block *b
        cdef bint more = True
        self._begin(name, own_names)
        try:
            while more:
                with nogil:
                    b = self.acquire()
                if b == NULL:
                    break
                more = self._fill(b, readinto)
                with nogil:
                    self.consume(b)
            with nogil:
                if self.attend():
                    self.end_of_input()
        except Exception:
            self._settle()      # what failed in front of this comes first
            raise
        self._settle()

    def _begin(self, str name, bint own_names):
        self.layer += 1
        self.layer_names.append(name)
        self.own_names = own_names
        map_free(&self.names)
        tar_parser_free(&self.parser)
        self.reading = READ_HEADER
        self.zero_seen = False
        self.stream_offset = self.skip_payload = self.skip_padding = 0
        self.tail.size = 0

    cdef bint _fill(self, block *b, readinto) except -1:
        """Takes in as much as there is room for. False at the end of the stream."""
        cdef size_t end = b.size + READ_SIZE
        cdef Py_ssize_t got = 1
        while b.size < end and got:
            with PyMemoryView_FromMemory(<char *>b.data + b.size, end - b.size, PyBUF_WRITE) as view:
                got = readinto(view)
            if got < 0 or <size_t>got > end - b.size:
                raise ValueError(f"readinto() gave {got} bytes for {end - b.size}")
            b.size += got
            self.total_read += got
        return got != 0

    def _settle(self):
        """Waits for all jobs; raises what failed first."""
        with nogil:
            self.wait_all()
        self.raise_failure()

    def raise_failure(self):
        if self.interrupt is not None:
            raise self.interrupt
        if self.failure.code:
            name = self.failure.name[:self.failure.name_len].decode("utf-8", "backslashreplace")
            layer = self.layer_names[self.failed_layer]
            raise from_status(self.failure.code, self.failure.sys_errno, f"{layer}: {name}", self.failure.offset)

    def finish(self):
        """Gives all directories their metadata and ends the threads. To be called after the last layer."""
        with nogil:
            self.finish_directories(False)
        self._join()
        self.raise_failure()

    def abandon(self):
        """Drops what is under way and ends the threads. What is complete stays, directories with their metadata."""
        with nogil:
            self.cancel()
            if self.large != NULL:
                self.end_piece(self.large, True, &self.skipped)
                self.large = NULL
            self.wait_all()
        self._join()
        with nogil:
            self.finish_directories(True)

    def clear(self):
        """Removes everything in the directory; for one that was made for an extraction that failed."""
        cdef int root = self.node(0).handle
        cdef size_t at = 0
        with nogil:
            fchmod(root, 0o700)
            lseek(root, 0, SEEK_SET)
            list_names(root, &self.listing)
            while at < self.listing.size:
                remove_tree(root, <const char *>self.listing.data + at, NULL, NULL)
                at += strlen(<const char *>self.listing.data + at) + 1

    def _join(self):
        with nogil:
            self.stop()
            pthread_mutex_lock(&self.lock)
            while self.running:
                pthread_cond_wait(&self.progress_made, &self.lock)
            pthread_mutex_unlock(&self.lock)

    def close(self):
        """Gives directory handles back; nothing may follow."""
        self.close_handles()

    def missing_paths(self):
        """The selected paths that no layer had."""
        cdef size_t at = 0
        cdef uint32_t size
        missing = []
        while at < self.selected.size:
            memcpy(&size, self.selected.data + at, sizeof(size))
            if not self.selected.data[at + 4]:
                missing.append(PyBytes_FromStringAndSize(<char *>self.selected.data + at + 5, size))
            at += 5 + size
        return missing

    def skipped_notes(self):
        """What was left out, in the entries' order: (path, [(skip_reason, attribute's key), ...]). The first of it, up
        to NOTES_MOST reasons and NOTES_SIZE bytes; skipped_count has no such bounds."""
        cdef note_row *row
        cdef size_t i
        cdef size_t left = NOTES_MOST
        cdef int64_t room = NOTES_SIZE
        found = []
        for i in range(self.notes.size // sizeof(note_row)):
            row = <note_row *>self.notes.data + i
            path = PyBytes_FromStringAndSize(<char *>row.text, row.path_size)
            reasons = PyBytes_FromStringAndSize(<char *>row.text + row.path_size, row.size - row.path_size)
            kept = []
            room -= row.path_size
            for part in reasons.split(b"\0", left)[:left]:
                room -= len(part) + 1
                if room < 0:
                    break
                if part:        # the last one ends in a separator
                    kept.append((part[0], part[1:]))
            left -= len(kept)
            if kept:
                found.append((path, kept))
            if room < 0 or not left:
                break
        return found

    # ------------------------------------------------------------------------------------------ blocks, threads

    cdef block *acquire(self) noexcept nogil:
        """The reader's next block, the rest of the last one in it; NULL after a failure. Places while it waits."""
        cdef block *b = &self.blocks[self.produced % self.block_count]
        cdef bint going
        pthread_mutex_lock(&self.lock)
        while not self.failure.code:
            if self.threads == 1 and self.step(&self.skipped):
                continue
            if self.produced - self.finished < self.block_count:
                break
            if not self.step(&self.skipped):
                self.wait_for_progress()
            self.listen()
        self.listen()
        going = not self.failure.code
        if going:           # under the lock: others may still look at the slot
            b.count = b.taken = b.done = 0
        pthread_mutex_unlock(&self.lock)
        if not going:
            return NULL
        if b.data == NULL:
            b.data = <uint8_t *>malloc(TAIL_MOST + READ_SIZE)
        if b.data == NULL:
            self.fail(EST_NO_MEMORY, 0, INT64_MAX, -1, NULL, 0)
            return NULL
        b.sequence = self.produced
        b.closed = False
        b.jobs.size = b.strings.size = 0
        b.size = self.tail.size
        if b.size:
            memcpy(b.data, self.tail.data, b.size)
        self.tail.size = 0
        pthread_mutex_lock(&self.lock)
        self.current = b
        pthread_mutex_unlock(&self.lock)
        return b

    cdef void submit(self, block *b) noexcept nogil:
        cdef bint start
        pthread_mutex_lock(&self.lock)
        b.count = b.jobs.size // sizeof(job)
        b.closed = True
        self.current = NULL
        self.produced += 1
        start = self.threads > 1 and self.produced == 1
        self.advance_finished()
        if b.count > b.taken:
            pthread_cond_broadcast(&self.work_or_end)
        pthread_mutex_unlock(&self.lock)
        if start:
            self.start_threads()

    cdef void advance_finished(self) noexcept nogil:
        cdef block *b
        while self.finished < self.produced:
            b = &self.blocks[self.finished % self.block_count]
            if b.done < b.count:
                break
            self.finished += 1

    cdef bint is_finished(self, int64_t sequence) noexcept nogil:
        """Whether all jobs up to those of a block are done, with the lock held."""
        cdef block *b = self.current
        if b != NULL and sequence >= b.sequence:
            return self.finished == b.sequence and b.done == b.count
        return self.finished > sequence or self.finished == self.produced

    cdef void wait_through(self, int64_t sequence) noexcept nogil:
        """Waits until no job of a block, or of those before it, is under way. Places meanwhile."""
        pthread_mutex_lock(&self.lock)
        if self.current != NULL and sequence >= self.current.sequence:
            self.current.count = self.current.jobs.size // sizeof(job)
            pthread_cond_broadcast(&self.work_or_end)
        while not self.is_finished(sequence):
            if not self.step(&self.skipped):
                self.wait_for_progress()
            self.listen()
        pthread_mutex_unlock(&self.lock)

    cdef bint attend(self) noexcept nogil:
        cdef bint going
        pthread_mutex_lock(&self.lock)
        self.listen()
        going = not self.failure.code
        pthread_mutex_unlock(&self.lock)
        return going

    cdef void wait_for_progress(self) noexcept nogil:
        cdef timespec until
        clock_gettime(CLOCK_REALTIME, &until)
        until.tv_nsec += LISTEN_EVERY_NS
        if until.tv_nsec >= 1000000000:
            until.tv_nsec -= 1000000000
            until.tv_sec += 1
        pthread_cond_timedwait(&self.progress_made, &self.lock, &until)

    cdef void listen(self) noexcept nogil:
        """Lets signal handlers and the progress callback run now and then; with the lock held, released meanwhile."""
        cdef bint go_on
        if self.cancelled or monotonic_ns() < self.progress_due_ns:
            return
        pthread_mutex_unlock(&self.lock)
        go_on = self.call_back()
        pthread_mutex_lock(&self.lock)
        self.progress_due_ns = monotonic_ns() + LISTEN_EVERY_NS
        if not go_on:
            self.drop_all()

    cdef bint call_back(self) noexcept with gil:
        try:
            PyErr_CheckSignals()
            if self.progress is not None:
                self.progress(self.total_read)
        except BaseException as error:
            self.interrupt = error
            return False
        return True

    cdef void start_threads(self) noexcept with gil:
        """See Pipeline.start_threads."""
        cdef int i, code
        for i in range(1, self.threads):
            try:
                start_new_thread(self._run, ())
            except BaseException as error:
                code = EST_NO_THREAD if isinstance(error, RuntimeError) else EST_NO_MEMORY
                with nogil:
                    self.fail(code, EAGAIN, self.number, -1, "", 0)
                    self.cancel()
                break

    cdef void cancel(self) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.drop_all()
        pthread_mutex_unlock(&self.lock)

    cdef void drop_all(self) noexcept nogil:
        """Nothing more is placed; with the lock held."""
        self.cancelled = True
        est_show(&self.dropped_behind, -1)
        if not self.failure.code:
            self.failure.code = EST_CANCELLED

    def _run(self):
        cdef buffer skipped
        memset(&skipped, 0, sizeof(skipped))
        with nogil:
            pthread_mutex_lock(&self.lock)
            if not self.ended:      # else nobody waits for this thread any more
                self.running += 1
                self.work_to_the_end(&skipped)
                self.running -= 1
                pthread_cond_broadcast(&self.progress_made)
            pthread_mutex_unlock(&self.lock)
            buffer_free(&skipped)

    cdef void work_to_the_end(self, buffer *skipped) noexcept nogil:
        """A worker's whole life; with the lock held, which is released meanwhile."""
        while True:
            if self.step(skipped):
                continue
            if self.ended:
                break
            pthread_cond_wait(&self.work_or_end, &self.lock)

    cdef void stop(self) noexcept nogil:
        pthread_mutex_lock(&self.lock)
        self.ended = True
        pthread_cond_broadcast(&self.work_or_end)
        pthread_mutex_unlock(&self.lock)

    cdef bint step(self, buffer *skipped) noexcept nogil:
        """Does some jobs if there are any; called with the lock held, which is released meanwhile."""
        cdef block *b = self.next_block()
        cdef size_t first, last, i
        cdef size_t size = 0
        if b == NULL:
            return False
        first = last = b.taken
        while last < b.count and last - first < GROUP_JOBS and size < GROUP_SIZE:
            size += (<job *>b.jobs.data)[last].size
            last += 1
        b.taken = last
        pthread_mutex_unlock(&self.lock)
        for i in range(first, last):
            self.run(b, <job *>b.jobs.data + i, skipped)
        pthread_mutex_lock(&self.lock)
        b.done += last - first
        self.advance_finished()
        pthread_cond_signal(&self.progress_made)
        return True

    cdef block *next_block(self) noexcept nogil:
        """The first block with a job to take."""
        cdef block *b
        while self.taking < self.produced:
            b = &self.blocks[self.taking % self.block_count]
            if b.taken < b.count:
                return b
            self.taking += 1
        if self.current != NULL and self.current.taken < self.current.count:
            return self.current
        return NULL

    cdef bint is_dropped(self, int64_t number) noexcept nogil:
        """Whether an entry comes behind a failure."""
        return number > est_glance(&self.dropped_behind)

    cdef void run(self, block *b, const job *j, buffer *skipped) noexcept nogil:
        cdef const char *path = <const char *>b.strings.data + j.path_at
        cdef const char *name = path + j.base
        cdef const char *link = <const char *>b.strings.data + j.link_at
        cdef place_meta meta = j.meta
        cdef bint dropped = self.is_dropped(j.number)
        cdef int code = EST_OK
        meta.xattrs = b.strings.data + j.xattrs_at
        skipped.size = 0
        if dropped and j.kind != JOB_PIECE:
            return
        if j.kind == JOB_FILE:
            code = place_file(&self.rules, j.directory, name, j.plain, &meta, b.data + j.data_at, j.size, skipped)
        elif j.kind == JOB_SYMLINK:
            code = place_symlink(&self.rules, j.directory, name, &meta, link, skipped)
        elif j.kind == JOB_NODE:
            code = place_node(&self.rules, j.directory, name, &meta, j.type, j.device, skipped)
        elif not dropped:
            code = place_write(j.file.handle, b.data + j.data_at, j.size, j.file_offset)
        if code:
            self.fail(code, errno, j.number, j.offset, path, j.path_size)
        if j.kind == JOB_PIECE:
            self.end_piece(j.file, dropped or code != EST_OK, skipped)
        elif skipped.size and not code:
            self.note(j.number, path, j.path_size, skipped)

    cdef void end_piece(self, open_file *file, bint broken, buffer *skipped) noexcept nogil:
        """One piece less; the last one completes the file."""
        cdef const char *name
        cdef int code
        cdef bint last
        pthread_mutex_lock(&self.lock)
        file.pieces -= 1
        file.broken |= broken
        last = file.pieces == 0
        self.files_open -= last
        pthread_mutex_unlock(&self.lock)
        if not last:
            return
        name = <const char *>file.path.data + file.base
        skipped.size = 0
        file.meta.xattrs = file.xattrs.data
        if file.broken:
            close(file.handle)
            unlinkat(file.directory, name, 0)
        else:
            code = place_finish(&self.rules, file.handle, file.plain, &file.meta, skipped)
            if code:
                self.fail(code, errno, file.number, file.offset, file.path.data, file.path.size - 1)
                unlinkat(file.directory, name, 0)
            elif skipped.size:
                self.note(file.number, file.path.data, file.path.size - 1, skipped)
        buffer_free(&file.path)
        buffer_free(&file.xattrs)
        free(file)

    cdef void fail(self, int code, int sys_errno, int64_t number, int64_t offset, const void *name,
                   size_t size) noexcept nogil:
        """Keeps the failure of the entry that comes first, so that the same layers always give the same error."""
        pthread_mutex_lock(&self.lock)
        if not self.failure.code or number < self.dropped_behind:
            self.failure.code = code
            self.failure.sys_errno = sys_errno
            self.failure.offset = offset
            self.failure.name_len = min(size, sizeof(self.failure.name))
            if self.failure.name_len:
                memcpy(self.failure.name, name, self.failure.name_len)
            est_show(&self.dropped_behind, number)
            self.failed_layer = self.layer
        pthread_cond_broadcast(&self.progress_made)
        pthread_mutex_unlock(&self.lock)

    cdef int note(self, int64_t number, const void *path, size_t size, buffer *skipped) noexcept nogil:
        """Remembers what was left out of an entry, if it is among the first: which ones are does not depend on the
        order in which they come."""
        cdef note_row row
        cdef bint kept = True
        cdef size_t i
        row.number, row.path_size, row.size = number, size, size + skipped.size
        row.count = 0
        for i in range(skipped.size):
            row.count += skipped.data[i] == 0
        pthread_mutex_lock(&self.lock)
        self.skipped_count += row.count
        if number < self.notes_end:
            row.text = <uint8_t *>malloc(row.size)
            kept = row.text != NULL
            if kept:
                memcpy(row.text, path, size)
                memcpy(row.text + size, skipped.data, skipped.size)
                kept = self.insert_note(&row)
        pthread_mutex_unlock(&self.lock)
        if not kept:
            self.fail(EST_NO_MEMORY, 0, number, -1, NULL, 0)
        return EST_OK

    cdef bint insert_note(self, const note_row *row) noexcept nogil:
        """Puts a note in its place, and drops those for which others leave no room. Its text is ours from now on."""
        cdef note_row *rows
        cdef size_t at = self.notes.size // sizeof(note_row)
        if not buffer_append(&self.notes, row, sizeof(row[0])):
            free(row.text)
            return False
        rows = <note_row *>self.notes.data
        while at and rows[at - 1].number > row.number:
            rows[at] = rows[at - 1]
            at -= 1
        rows[at] = row[0]
        self.notes_count += row.count
        self.notes_size += row.size
        while True:
            rows = <note_row *>(self.notes.data + self.notes.size) - 1
            if self.notes_count - rows.count < NOTES_MOST and self.notes_size - <int64_t>rows.size < NOTES_SIZE:
                return True
            self.notes_end = rows.number
            self.drop_note()

    cdef void drop_note(self) noexcept nogil:
        """The last one."""
        cdef note_row *row = <note_row *>(self.notes.data + self.notes.size) - 1
        self.notes_count -= row.count
        self.notes_size -= row.size
        free(row.text)
        self.notes.size -= sizeof(note_row)

    # ------------------------------------------------------------------------------------------ the tar

    cdef void consume(self, block *b) noexcept nogil:
        """Turns a block into jobs and submits it; what has to wait for more goes to the next one."""
        cdef size_t at = 0
        cdef int answer = EST_OK
        while answer == EST_OK:
            answer = self.advance(b, &at)
        if answer == NEED_MORE and not buffer_append(&self.tail, b.data + at, b.size - at):
            answer = EST_NO_MEMORY
        if answer < 0:
            self.fail_entry(answer, errno, self.stream_offset + at)
        self.stream_offset += at
        self.submit(b)

    cdef void fail_entry(self, int code, int sys_errno, int64_t offset) noexcept nogil:
        """The reader's own failure, at the entry at hand."""
        if -70 >= code:
            if code == EST_PLACE_LINK or code == EST_LINK_TARGET or code == EST_LINK_UNSELECTED:
                buffer_append(&self.path, <const char *>b" -> ", 4)
                buffer_append(&self.path, self.target.data, self.target.size)
            if not self.path.size:
                buffer_append(&self.path, <const char *>b"/", 1)
            self.fail(code, sys_errno, self.number, self.header_offset, self.path.data, self.path.size)
        else:
            self.fail(code, 0, self.number, offset, self.parser.entry.name, self.parser.entry.name_len)

    cdef int advance(self, block *b, size_t *at) noexcept nogil:
        """One step into the block: EST_OK, NEED_MORE at its end, or what is wrong."""
        cdef const uint8_t *data = b.data + at[0]
        cdef size_t left = b.size - at[0]
        cdef size_t size
        if self.reading == READ_HEADER:
            if left < TAR_BLOCK:
                return NEED_MORE
            if not self.parser.pending:
                self.header_offset = self.stream_offset + at[0]
            return self.take_header(data, at)
        if self.reading == READ_META:
            size = self.parser.meta_size + padding_of(self.parser.meta_size)
            if left < size:
                return NEED_MORE
            at[0] += size
            self.reading = READ_HEADER
            return tar_parse_meta(&self.parser, data)
        if self.reading == READ_ENTRY:
            return self.take_entry(data, left)
        if self.reading == READ_PIECES:
            return self.take_piece(b, at)
        if self.reading == READ_SKIP:
            return self.skip(left, at)
        at[0] = b.size
        return NEED_MORE

    cdef int take_header(self, const uint8_t *data, size_t *at) noexcept nogil:
        cdef int answer = tar_parse_block(&self.parser, data)
        if answer < 0:
            return answer
        if self.zero_seen and answer != TAR_ZERO:
            return EST_TAR_LONE_ZERO
        at[0] += TAR_BLOCK
        if answer == TAR_ZERO:
            self.reading = READ_END if self.zero_seen else READ_HEADER
            self.zero_seen = True
        elif answer == TAR_META:
            self.reading = READ_META
        else:
            self.number += 1
            self.reading = READ_ENTRY
        return EST_OK

    cdef int take_entry(self, const uint8_t *data, size_t left) noexcept nogil:
        cdef const tar_entry *entry = &self.parser.entry
        cdef bint whole = <size_t>entry.size <= left
        cdef int code
        if not whole and entry.size <= SMALL_FILE:
            return NEED_MORE
        self.skip_payload = entry.size
        self.skip_padding = padding_of(entry.size)
        self.reading = READ_SKIP
        code = self.place_entry(entry, data, whole)
        if self.large != NULL and not code:
            self.reading = READ_PIECES
        return code

    cdef int take_piece(self, block *b, size_t *at) noexcept nogil:
        cdef open_file *file = self.large
        cdef size_t size = min(b.size - at[0], <size_t>(file.size - file.written))
        cdef job j
        if size == 0:
            return NEED_MORE
        memset(&j, 0, sizeof(j))
        j.kind = JOB_PIECE
        j.number, j.offset = file.number, file.offset
        j.path_at, j.path_size, j.base = b.strings.size, <uint32_t>file.path.size - 1, file.base
        j.data_at, j.size, j.file_offset = at[0], size, file.written
        j.file = file
        if not (buffer_append(&b.strings, file.path.data, file.path.size) and buffer_append(&b.jobs, &j, sizeof(j))):
            return EST_NO_MEMORY
        pthread_mutex_lock(&self.lock)
        file.pieces += 1
        pthread_mutex_unlock(&self.lock)
        self.node(file.parent).last_block = b.sequence
        file.written += size
        at[0] += size
        if file.written == file.size:
            self.skip_payload = 0
            self.reading = READ_SKIP
            self.large = NULL
            if not self.remember(file.parent, <const char *>file.path.data + file.base, b.sequence):
                return EST_NO_MEMORY
            self.end_piece(file, False, &self.skipped)
        return EST_OK

    cdef int skip(self, size_t left, size_t *at) noexcept nogil:
        cdef size_t payload = min(left, <size_t>self.skip_payload)
        cdef size_t padding = min(left - payload, <size_t>self.skip_padding)
        self.skip_payload -= payload
        self.skip_padding -= padding
        at[0] += payload + padding
        if self.skip_payload or self.skip_padding:
            return NEED_MORE
        self.reading = READ_HEADER
        return EST_OK

    cdef void end_of_input(self) noexcept nogil:
        """Fails unless the stream ends at an entry's border, or in the padding behind it."""
        cdef int64_t offset = self.stream_offset + self.tail.size
        if self.reading == READ_HEADER and not self.tail.size:
            if self.parser.pending:
                self.fail_entry(EST_TAR_DANGLING_META, 0, offset)
        elif self.reading != READ_END and not (self.reading == READ_SKIP and not self.skip_payload):
            self.fail_entry(EST_TAR_TRUNCATED, 0, offset)

    # ------------------------------------------------------------------------------------------ entries

    cdef int place_entry(self, const tar_entry *entry, const uint8_t *data, bint whole) noexcept nogil:
        cdef int64_t parent
        cdef uint32_t base
        cdef const char *name
        cdef int selected
        if not clean(&self.path, entry.name, entry.name_len, &base):
            return EST_NO_MEMORY
        name = <const char *>self.path.data + base
        if self.own_names and base == 0 and is_own_name(name):
            return EST_OK
        if begins(name, ".wh."):
            return self.place_whiteout(base)
        selected = self.selects(self.path.data, self.path.size)
        if selected == SELECT_NONE:
            return EST_OK
        if self.path.size == 0:
            return self.place_root(entry)
        if selected == SELECT_PARENT and entry.type != c'5':
            return self.hide_selected(&self.path, base)
        parent = self.parent_of(&self.path, base, True)
        if parent < 0:
            return <int>parent
        name = <const char *>self.path.data + base
        if entry.type == c'5':
            return self.place_folder(entry, parent, name)
        if entry.type == c'1':
            return self.place_link(entry, parent, name)
        return self.place_leaf(entry, parent, base, data, whole)

    cdef int fill_meta(self, const tar_entry *entry, place_meta *meta) noexcept nogil:
        """What of the header counts. Without owners, set-id bits stay only where the owner is who extracts."""
        memset(meta, 0, sizeof(meta[0]))
        meta.mtime_s, meta.mtime_ns = entry.mtime_s, entry.mtime_ns
        meta.mode = entry.mode & 0o7777
        meta.xattrs = entry.xattrs
        meta.xattrs_len = entry.xattrs_len if self.rules.xattrs else 0
        if self.rules.owners:
            if not (0 <= entry.uid <= ID_MOST and 0 <= entry.gid <= ID_MOST):
                return EST_OWNER_RANGE
            meta.uid, meta.gid = <uint32_t>entry.uid, <uint32_t>entry.gid
            return EST_OK
        meta.uid, meta.gid = self.rules.uid, self.rules.gid
        if entry.uid != self.rules.uid:
            meta.mode &= ~<uint32_t>0o4000
        if entry.gid != self.rules.gid:
            meta.mode &= ~<uint32_t>0o2000
        return EST_OK

    cdef int place_root(self, const tar_entry *entry) noexcept nogil:
        cdef place_meta meta
        cdef int code
        if entry.type != c'5':
            return EST_PLACE_ROOT
        code = self.fill_meta(entry, &meta) or self.set_meta(0, &meta)
        self.entries += 1
        return code

    cdef int place_folder(self, const tar_entry *entry, int64_t parent, const char *name) noexcept nogil:
        """A directory: what is there may stay if it is one, and gets the entry's metadata."""
        cdef size_t size = strlen(name)
        cdef int64_t child = self.child_of(parent, name, size)
        cdef int64_t job_block
        cdef place_meta meta
        cdef int code = self.fill_meta(entry, &meta)
        if not code:
            code = self.count_entry()
        if code:
            return code
        if child < 0:
            job_block = self.block_of(parent, name, size)
            if job_block >= 0:
                self.wait_through(job_block)
            child = self.make_directory(parent, name, size, True)
        elif self.rules.uid and not self.node(child).ours:
            unlock(self.handle_of(child))
        if child < 0:
            return <int>child
        self.entries += 1
        self.mark(child)
        return self.set_meta(child, &meta)

    cdef int place_leaf(self, const tar_entry *entry, int64_t parent, uint32_t base, const uint8_t *data,
                        bint whole) noexcept nogil:
        """Everything but directories and hard links: a job."""
        cdef const char *name = <const char *>self.path.data + base
        cdef int code
        cdef job j
        memset(&j, 0, sizeof(j))
        code = self.fill_meta(entry, &j.meta)
        if not code:
            code = fill_kind(entry, &j)
        if code:
            return code
        code = self.count_entry()
        if code:
            return code
        if not self.rules.owners and (j.type == S_IFCHR or j.type == S_IFBLK):
            return self.note_device()
        if entry.size > self.max_size - self.size:
            return EST_LIMIT_SIZE
        code = self.make_room(parent, name)
        if code:
            return code
        self.entries += 1
        self.files += entry.type == c'0'
        self.size += entry.size
        self.mark(parent)
        return self.queue(entry, parent, base, &j, data, whole)

    cdef int note_device(self) noexcept nogil:
        cdef uint8_t reason[2]
        reason[0], reason[1] = SKIP_DEVICE, 0
        self.skipped.size = 0
        if not buffer_append(&self.skipped, reason, 2):
            return EST_NO_MEMORY
        return self.note(self.number, self.path.data, self.path.size, &self.skipped)

    cdef int make_room(self, int64_t parent, const char *name) noexcept nogil:
        """Waits until nothing is under way where an entry belongs. A directory there has to go, with all in it."""
        cdef size_t size = strlen(name)
        cdef int64_t job_block = self.block_of(parent, name, size)
        if job_block >= 0:
            self.wait_through(job_block)
        if self.child_of(parent, name, size) < 0:
            return EST_OK
        self.wait_all()
        return self.drop(parent, name)

    cdef int queue(self, const tar_entry *entry, int64_t parent, uint32_t base, job *j, const uint8_t *data,
                   bint whole) noexcept nogil:
        cdef const char *name = <const char *>self.path.data + base
        cdef uint8_t nul = 0
        cdef buffer *strings
        cdef block *b
        j.directory = self.handle_of(parent)
        if j.directory < 0:
            return EST_PLACE_PARENT
        b = self.current
        j.plain = self.node(parent).plain
        j.number, j.offset = self.number, self.header_offset
        j.path_size, j.base = <uint32_t>self.path.size, base
        if not whole:
            return self.open_large(entry, parent, j)
        j.size = <size_t>entry.size
        j.data_at = data - b.data
        strings = &b.strings
        j.path_at = strings.size
        j.link_at = j.path_at + self.path.size + 1
        if not buffer_append(strings, self.path.data, self.path.size + 1):
            return EST_NO_MEMORY
        if j.kind == JOB_SYMLINK and not buffer_append(strings, entry.link, entry.link_len):
            return EST_NO_MEMORY
        if not buffer_append(strings, &nul, 1):
            return EST_NO_MEMORY
        j.xattrs_at = strings.size
        if not (buffer_append(strings, j.meta.xattrs, j.meta.xattrs_len) and buffer_append(&b.jobs, j, sizeof(j[0]))):
            return EST_NO_MEMORY
        self.node(parent).last_block = b.sequence
        return EST_OK if self.remember(parent, name, b.sequence) else EST_NO_MEMORY

    cdef int open_large(self, const tar_entry *entry, int64_t parent, const job *j) noexcept nogil:
        """Begins a file whose pieces follow."""
        cdef int code
        cdef open_file *file
        cdef bint many
        pthread_mutex_lock(&self.lock)
        many = self.files_open >= self.open_most // 2
        pthread_mutex_unlock(&self.lock)
        if many:
            self.wait_all()
        file = <open_file *>calloc(1, sizeof(open_file))
        if file == NULL:
            return EST_NO_MEMORY
        if not (buffer_append(&file.path, self.path.data, self.path.size + 1)
                and buffer_append(&file.xattrs, j.meta.xattrs, j.meta.xattrs_len)):
            buffer_free(&file.path)
            free(file)
            return EST_NO_MEMORY
        file.handle = place_open(&self.rules, j.directory, <const char *>file.path.data + j.base, j.plain, &j.meta)
        if file.handle < 0:
            code = file.handle
            buffer_free(&file.path)
            buffer_free(&file.xattrs)
            free(file)
            return code
        file.directory, file.plain, file.base, file.meta = j.directory, j.plain, j.base, j.meta
        file.number, file.offset = j.number, j.offset
        file.size, file.parent = entry.size, parent
        file.pieces = 1
        self.large = file
        pthread_mutex_lock(&self.lock)
        self.files_open += 1
        pthread_mutex_unlock(&self.lock)
        return EST_OK

    cdef int place_link(self, const tar_entry *entry, int64_t parent, const char *name) noexcept nogil:
        """A hard link, at once: its target is there when everything in front of it is."""
        cdef struct_stat found
        cdef uint32_t base
        cdef int64_t place, job_block
        cdef int from_, to
        cdef int code
        cdef const char *first
        if not clean(&self.target, entry.link, entry.link_len, &base):
            return EST_NO_MEMORY
        if self.target.size == 0:
            (&errno)[0] = EISDIR
            return EST_LINK_TARGET
        if self.selects(self.target.data, self.target.size) != SELECT_THIS:
            return EST_LINK_UNSELECTED
        place = self.parent_of(&self.target, base, False)
        if place < 0:
            return EST_LINK_TARGET if place == WALK_MISSING else <int>place
        first = <const char *>self.target.data + base
        job_block = self.block_of(place, first, strlen(first))
        if job_block >= 0:
            self.wait_through(job_block)
        from_ = self.handle_of(place)
        if from_ < 0:
            return EST_PLACE_PARENT
        if fstatat(from_, first, &found, AT_SYMLINK_NOFOLLOW):
            return EST_LINK_TARGET
        self.entries += 1
        self.mark(parent)
        if place == parent and strcmp(first, name) == 0:
            return EST_OK
        if self.lies_below(place, parent, name):
            (&errno)[0] = EBUSY
            return EST_PLACE_LINK
        code = self.count_entry() or self.make_room(parent, name)
        if code:
            return code
        to = self.handle_of(parent)
        from_ = self.handle_of(place)
        if from_ < 0 or to < 0:
            return EST_PLACE_PARENT
        while linkat(from_, first, to, name, 0):
            if errno != EEXIST:
                return EST_PLACE_LINK
            if self.remove(to, name):
                return EST_PLACE_REMOVE
        return EST_OK if self.remember(parent, name, -1) else EST_NO_MEMORY

    cdef bint lies_below(self, int64_t number, int64_t parent, const char *name) noexcept nogil:
        """Whether a directory is parent/name or in it."""
        cdef int64_t above = self.child_of(parent, name, strlen(name))
        while above >= 0 and number >= above:       # parents come first
            if number == above:
                return True
            number = self.node(number).parent
        return False

    cdef int place_whiteout(self, uint32_t base) noexcept nogil:
        """Removes what lower layers have at a name, and nothing of this layer: its entries are not hidden by it, and no
        job under way is concerned."""
        cdef const char *name = <const char *>self.path.data + base + 4
        cdef bint opaque = strcmp(name, ".wh..opq") == 0
        cdef int64_t parent
        cdef int selected
        if begins(name, ".wh.") and not opaque:
            return EST_OK
        if name[0] == 0 or strcmp(name, ".") == 0 or strcmp(name, "..") == 0:
            return EST_WHITEOUT_NAME
        if not self.set_hidden(base, opaque):
            return EST_NO_MEMORY
        selected = self.selects(self.target.data, self.target.size)
        if selected == SELECT_NONE:
            return EST_OK
        self.whiteouts += 1
        if selected == SELECT_PARENT:
            return self.hide_selected(&self.target, base)
        if self.layer == 0 and self.empty:
            return EST_OK
        parent = self.parent_of(&self.path, base, False)
        if is_missing(parent):
            return EST_OK
        if parent < 0:
            return <int>parent
        return self.clear_lower(parent) if opaque else self.hide(parent, <const char *>self.path.data + base + 4)

    cdef bint set_hidden(self, uint32_t base, bint opaque) noexcept nogil:
        """In target, the path that a whiteout hides, or the directory that an opaque one empties."""
        self.target.size = 0
        if opaque:
            return buffer_append(&self.target, self.path.data, base - (base != 0))
        return (buffer_append(&self.target, self.path.data, base)
                and buffer_append(&self.target, self.path.data + base + 4, self.path.size - base - 4))

    cdef int hide(self, int64_t parent, const char *name) noexcept nogil:
        """Removes what lower layers have at a name. No job under way is concerned."""
        cdef size_t size = strlen(name)
        cdef int64_t child = self.child_of(parent, name, size)
        if child >= 0 and self.node(child).layer == self.layer:
            return self.clear_lower(child)
        if child < 0 and self.find(&self.names, parent, name, size) != NULL:
            return EST_OK
        return self.drop(parent, name)

    cdef int hide_selected(self, const buffer *hidden, uint32_t base) noexcept nogil:
        """Where the entry at hand hides a path: removes what was asked for below that, and nothing else."""
        cdef size_t at = 0
        cdef uint32_t length
        cdef const uint8_t *wanted
        cdef int64_t top
        cdef int code = EST_OK
        if self.layer == 0 and self.empty:
            return EST_OK
        top = self.parent_of(&self.path, base, False)
        if top < 0:
            return EST_OK if is_missing(top) else <int>top
        while at < self.selected.size and not code:
            memcpy(&length, self.selected.data + at, sizeof(length))
            wanted = self.selected.data + at + 5
            if length > hidden.size and is_at_or_below(wanted, length, hidden.data, hidden.size):
                code = self.hide_below(top, wanted + base, length - base)
            at += 5 + length
        return code

    cdef int hide_below(self, int64_t at, const uint8_t *path, size_t size) noexcept nogil:
        """Hides a path of lower layers. What is behind a link would be there without it, and stays."""
        cdef char name[NAME_MOST + 1]
        cdef size_t end
        cdef int64_t child
        while True:
            end = 0
            while end < size and path[end] != c'/':
                end += 1
            if end > NAME_MOST:     # nothing has such a name
                return EST_OK
            memcpy(name, path, end)
            name[end] = 0
            if end == size:
                return self.hide(at, name)
            child = self.child_of(at, name, end)
            if child < 0:
                child = self.enter(at, name, end, False)
            if child == WALK_LINK or is_missing(child):
                return EST_OK
            if child < 0:
                return <int>child
            at = child
            path += end + 1
            size -= end + 1

    cdef int selects(self, const uint8_t *path, size_t size) noexcept nogil:
        """How a cleaned path stands to those that were asked for."""
        cdef size_t at = 0
        cdef uint32_t length
        cdef const uint8_t *wanted
        cdef int answer = SELECT_NONE if self.selected.size else SELECT_THIS
        while at < self.selected.size:
            memcpy(&length, self.selected.data + at, sizeof(length))
            wanted = self.selected.data + at + 5
            if is_at_or_below(path, size, wanted, length):
                self.selected.data[at + 4] = 1
                answer = SELECT_THIS
            elif answer == SELECT_NONE and is_at_or_below(wanted, length, path, size):
                answer = SELECT_PARENT
            at += 5 + length
        return answer

    # ------------------------------------------------------------------------------------------ directories, in the end

    cdef void finish_directories(self, bint whatever) noexcept nogil:
        """Gives directories their metadata. whatever: go on after a failure.

        Parents come first, as they were made, because the next directory is then near those that are open. What bars
        its own owner from a directory comes in the end, and deepest first.
        """
        cdef int64_t count = self.nodes.size // sizeof(directory_node)
        cdef int64_t i
        for i in range(count):
            if self.node(self.node(i).parent).gone:
                self.node(i).gone = True
            if self.has_meta(i) and not self.finish_directory(i) and not whatever:
                return
            if i % LISTEN_DIRECTORIES == 0 and not self.attend() and not whatever:
                return
        for i in range(count - 1, -1, -1):
            if self.has_meta(i) and bars_owner(self.meta_of(i)) and not self.close_directory(i) and not whatever:
                return

    cdef bint finish_directory(self, int64_t number) noexcept nogil:
        cdef place_meta meta = self.meta_of(number).meta
        cdef int handle = self.handle_of(number)
        cdef int code = EST_PLACE_META
        meta.mode |= 0o700
        self.skipped.size = 0
        if handle >= 0:
            code = place_directory(&self.rules, handle, self.node(number).ours, &meta, &self.skipped)
        if code:
            return self.fail_directory(number, code)
        if self.skipped.size:
            self.set_long_path(number)
            self.note(self.meta_of(number).number, self.long_path.data, self.long_path.size, &self.skipped)
        return True

    cdef bint close_directory(self, int64_t number) noexcept nogil:
        cdef int handle = self.handle_of(number)
        if handle < 0 or fchmod(handle, self.meta_of(number).meta.mode):
            return self.fail_directory(number, EST_PLACE_META)
        return True

    cdef bint fail_directory(self, int64_t number, int code) noexcept nogil:
        """False, for whom it concerns."""
        cdef const directory_meta *row = self.meta_of(number)
        cdef int kept = errno
        self.set_long_path(number)
        self.layer = row.layer
        self.fail(code, kept, row.number, row.offset, self.long_path.data, self.long_path.size)
        return False


cdef int fill_kind(const tar_entry *entry, job *j) noexcept nogil:
    """What of an entry's type is to be made."""
    if entry.type == c'2':
        j.kind = JOB_SYMLINK
        return EST_OK
    if entry.type == c'0':
        j.kind = JOB_FILE
        return EST_OK
    j.kind = JOB_NODE
    if entry.type == c'6':
        j.type = S_IFIFO
        return EST_OK
    j.type = S_IFCHR if entry.type == c'3' else S_IFBLK
    if not (0 <= entry.dev_major <= MAJOR_MOST and 0 <= entry.dev_minor <= MINOR_MOST):
        return EST_DEVICE_RANGE
    j.device = makedev(<unsigned int>entry.dev_major, <unsigned int>entry.dev_minor)
    return EST_OK


cdef inline bint is_missing(int64_t answer) noexcept nogil:
    """Whether a walk met nothing, or something that has nothing below it."""
    return answer == WALK_MISSING or (answer == EST_PLACE_PARENT and errno == ENOTDIR)


cdef bint is_own_name(const char *name) noexcept nogil:
    """Of a file at the root that belongs to the eStargz format."""
    return (strcmp(name, "stargz.index.json") == 0 or strcmp(name, ".prefetch.landmark") == 0
            or strcmp(name, ".no.prefetch.landmark") == 0)


cdef bint is_at_or_below(const uint8_t *path, size_t size, const uint8_t *top, size_t top_size) noexcept nogil:
    if top_size == 0:
        return True
    return (size >= top_size and memcmp(path, top, top_size) == 0
            and (size == top_size or path[top_size] == c'/'))


cdef bint bars_owner(const directory_meta *row) noexcept nogil:
    return row.meta.mode & 0o700 != 0o700
