"""The parallel middle of the build: batches of the tar stream in, members out in order (docs/architecture.md).

Every thread runs the same loop: write the next batch if it is in order and nobody writes, else put the next one in order
if it is done and nobody else does, else work on the next batch that waits. The producer, which is the caller, joins that
loop whenever no batch is free. So one thread needs no other, and N threads are never more than N.
"""

import fcntl
import os
import stat as stat_module
from _thread import start_new_thread

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport PyThread_get_thread_ident
from libc.errno cimport EAGAIN, EINTR, EISDIR, ELOOP, ENOENT, ENOTDIR, ESPIPE, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from posix.stat cimport S_ISREG, fstat, struct_stat
from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport close, getpid, pread, write

from estargz._codec cimport (
    CODEC_COPY, CODEC_NONE, PIECE_MARGIN, compresses, compressor_close, compressor_open, member_bound, member_write, piece_write,
)
from estargz._crew cimport (
    CREW_FULL, MEMBER_ROOMS, Crew, crew_borrow, crew_drop, crew_give, crew_join, crew_keep, crew_lend, crew_part, crew_return,
    crew_take, crew_take_back, crew_turn,
)
from estargz._files cimport directory_cache_close, directory_cache_init, open_cached
from estargz._memory cimport buffer_append, buffer_free
from estargz._rows cimport (
    EST_CANCELLED, EST_FORKED, EST_GREW, EST_NO_MEMORY, EST_NO_THREAD, EST_OK, EST_OPEN, EST_POOL_FULL, EST_READ, EST_REPLACED,
    EST_SHRANK, EST_SINK, EST_STAT, EST_WRITE,
    chunk_row, est_failure, toc_row,
)
from estargz._sha256 cimport sha256_finish, sha256_job, sha256_run, sha256_start, sha256_stream
from estargz._toc cimport toc_free, toc_table
from estargz.isal cimport crc32_gzip_refl
from estargz.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_signal, pthread_cond_timedwait,
    pthread_cond_wait, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)

from estargz.errors import EstargzError, from_status

cdef extern from "<poll.h>" nogil:
    enum: POLLOUT
    struct pollfd:
        int fd
        short events
    int poll(pollfd *fds, unsigned long count, int milliseconds)

cdef extern from "gil.h":      # what `with gil` means
    pass

cdef extern from "glance.h" nogil:
    bint est_glance(const bint *place)
    void est_show(bint *place, bint value)

cdef extern from "pages.h" nogil:
    void *est_new_pages(size_t size)
    void est_free_pages(void *pages, size_t size)

cdef extern from "files.h" nogil:
    void est_start_writeback(int handle, int64_t offset, int64_t size)
    bint est_is_stream(int handle)
    ssize_t est_send_some(int handle, const void *data, size_t size)

cdef enum:
    HASHED_TOGETHER = 64        # chunk hashes that are offered to the interleaved kernel at once
    GZIP_HEADER_SIZE = 10
    GZIP_TRAILER_SIZE = 8
    WRITEBACK_STEP = 8 << 20
    MEMBER_OVERHEAD = 64        # what a member costs beyond member_bound of all their bytes: header, trailer, block ends
    PIPE_PIECE = 4096           # what a pipe takes without blocking once it is ready: PIPE_BUF
    PIPE_SIZE = 1 << 20         # what a pipe is asked to hold, so that neither end waits for the other at every page

# A run of chunks of one file within a batch.
ctypedef struct file_part:
    sha256_job job
    int64_t row
    bint last
    size_t next         # index of the chunk behind it

STAGE_NAMES = ("source", "toc", "read", "hash", "compress", "order", "write", "wait")
PARTS = {
    "read": PART_READ, "chunk hash": PART_CHUNK_HASH, "stream hash": PART_STREAM_HASH, "compress": PART_COMPRESS,
    "blob hash": PART_BLOB_HASH, "write": PART_WRITE,
}

cdef int64_t LISTEN_EVERY_NS = 100000000    # how often the caller looks for signals and reports progress
cdef uint8_t GZIP_HEADER[10]
GZIP_HEADER[:] = [0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 0xFF]


cdef void set_failure(est_failure *failure, int code, int sys_errno, int64_t offset, const void *name,
                      size_t name_size) noexcept nogil:
    failure.code = code
    failure.sys_errno = sys_errno
    failure.offset = offset
    failure.name_len = min(name_size, sizeof(failure.name))
    if failure.name_len:
        memcpy(failure.name, name, failure.name_len)


cdef int64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef inline void charge(worker *w, int spent_on) noexcept nogil:
    """Accounts the thread's time since the last call. Called some times a batch, never per file."""
    cdef int64_t now = monotonic_ns()
    w.spent_ns[spent_on] += now - w.since_ns
    w.since_ns = now


cdef class Pipeline:
    """Turns batches into members on `threads` threads and writes them in order.

    Parameters: codec and level as in _codec; raw_capacity bytes of the stream per batch; slot_count batches in all;
    threads >= 1; producer_helps: the producing thread is one of them; keep_rows: digest chunks and keep the table of
    contents; write: None, a file descriptor, or a callable that takes bytes; output: its name for messages; progress:
    None or a callable that is given the uncompressed bytes written so far, about ten times a second, in the producing
    thread; members_most: in a batch; crew: None, or what is shared with other pipelines (_crew); parts: None, or the names
    of PARTS that are done at all, which only measurements want: what comes out is then no layer.
    """

    def __cinit__(self, int codec, int level, size_t raw_capacity, int64_t slot_count, int threads,
                  bint producer_helps, bint keep_rows, write, str output, progress, size_t members_most,
                  Crew crew=None, parts=None):
        cdef int64_t i
        self.codec = codec
        self.level = level
        for name in PARTS if parts is None else parts:
            if name not in PARTS:
                raise ValueError(f"no part {name!r}; there are {', '.join(PARTS)}")
            self.parts |= PARTS[name]
        self.raw_capacity = raw_capacity
        self.out_capacity = member_bound(codec, raw_capacity) + PIECE_MARGIN + members_most * MEMBER_OVERHEAD
        if crew is not None:
            self.crew = crew.shared
            crew_keep(self.crew)
            self.member.raw_capacity = raw_capacity
            self.member.out_capacity = self.out_capacity if compresses(codec) else 0
            self.member.room = raw_capacity * (2 if compresses(codec) else 1)
        self.process = getpid()
        self.threads = threads
        self.slot_count = slot_count
        self.producer_helps = producer_helps
        self.keep_rows = keep_rows
        self.worker_count = threads if producer_helps else threads + 1
        self.progress = progress
        self.progress_due_ns = monotonic_ns() + LISTEN_EVERY_NS
        self.sink_fd = write if isinstance(write, int) else -1
        self.sink_write = None if isinstance(write, int) else write
        if self.sink_fd >= 0:
            try:
                mode = os.fstat(self.sink_fd).st_mode
            except OSError as error:
                raise from_status(EST_WRITE, error.errno, output) from error
            self.sink_is_file = stat_module.S_ISREG(mode)
            self.sink_is_socket = stat_module.S_ISSOCK(mode) and est_is_stream(self.sink_fd)
            if stat_module.S_ISFIFO(mode):
                self.pipe_fd = own_pipe(self.sink_fd)
                self.pipe_open = self.pipe_fd >= 0
        self.producing = STAGE_SOURCE
        self.output = output.encode("utf-8", "surrogateescape")
        self.failed_batch = -1
        sha256_start(&self.tar_hash)
        sha256_start(&self.blob_hash)
        sha256_start(&self.piece_hash)
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.work_or_end, NULL)
        pthread_cond_init(&self.progress_made, NULL)
        self.locks_ready = True
        self.slots = <batch *>calloc(slot_count, sizeof(batch))
        self.ring = <batch **>calloc(slot_count, sizeof(batch *))
        self.workers = <worker *>calloc(self.worker_count, sizeof(worker))
        for i in range(self.worker_count if self.workers != NULL else 0):   # before an error may have them closed
            directory_cache_init(&self.workers[i].directory)
            self.workers[i].since_ns = monotonic_ns()
        if self.slots == NULL or self.ring == NULL or self.workers == NULL:
            raise MemoryError("estargz: out of memory; lower --threads or --memory")

    def __dealloc__(self):
        cdef int64_t i
        self.elsewhere()
        if self.slots != NULL:
            self.release()
            for i in range(self.slot_count):
                free_batch(&self.slots[i], self.raw_capacity, self.out_capacity)
        if self.workers != NULL:
            for i in range(self.worker_count):
                if self.workers[i].opened:
                    compressor_close(&self.workers[i].state)
                directory_cache_close(&self.workers[i].directory)
        self.close_pipe()
        crew_drop(self.crew)
        free(self.slots)
        free(self.ring)
        free(self.workers)
        toc_free(&self.table)
        if self.locks_ready:
            pthread_cond_destroy(&self.progress_made)
            pthread_cond_destroy(&self.work_or_end)
            pthread_mutex_destroy(&self.lock)

    # --------------------------------------------------------------------------------------------- producer's side

    cdef batch *acquire(self) noexcept nogil:
        """An empty batch, or NULL when the pipeline has failed. Works while it waits. A seated producer comes back seated."""
        cdef worker *w = &self.workers[0]
        cdef bint seated = w.seated
        cdef batch *found = NULL
        charge(w, self.producing)
        self.attend()
        if not self.join():
            return NULL
        pthread_mutex_lock(&self.lock)
        while not self.failure.code:
            found = self.free_slot()
            if found != NULL:
                break
            if not (self.producer_helps and self.step(w)):
                self.wait_for_progress()
            if not self.listen():
                break
        if self.failure.code:
            found = NULL
        if found != NULL and not open_batch(found, self.raw_capacity, self.out_capacity, self.codec):
            self.failure.code = EST_NO_MEMORY
            found = NULL
        if found != NULL:
            found.state = STATE_FILLING
        pthread_mutex_unlock(&self.lock)
        if seated:
            self.take_turn(w)
        else:
            self.stand(w)
        return found

    cdef batch *free_slot(self) noexcept nogil:
        """A batch that is free and has memory, if there is one; with the lock held."""
        cdef batch *empty = NULL
        cdef batch *b
        cdef int64_t i
        cdef int code
        if self.produced - self.written >= self.slot_count:
            return NULL
        if self.threads == 1 and self.producer_helps and self.produced > self.written:
            return NULL
        for i in range(self.slot_count):
            b = &self.slots[i]
            if b.state == STATE_FREE:
                if self.crew == NULL or b.raw != NULL:
                    return b
                empty = b
        if empty == NULL:
            return NULL
        code = crew_lend(self.crew, &self.member, &empty.raw, &empty.out)
        if code == EST_NO_MEMORY:
            self.failure.code = code
        return empty if code == EST_OK else NULL

    cdef void submit(self, batch *b) noexcept nogil:
        """Hands a filled batch over; order of submission is order of output."""
        cdef bint start
        pthread_mutex_lock(&self.lock)
        b.number = self.produced
        b.state = STATE_READY
        self.ring[b.number % self.slot_count] = b
        self.produced += 1
        # A layer of one batch needs no other thread.
        start = self.produced == (2 if self.producer_helps else 1)
        pthread_cond_signal(&self.work_or_end)
        pthread_mutex_unlock(&self.lock)
        if start and self.start_threads() != EST_OK:
            self.stop()

    cdef int drain(self) noexcept nogil:
        """Waits until every submitted batch is written, working meanwhile. EST_OK, or the failure's code."""
        charge(&self.workers[0], self.producing)
        self.stand(&self.workers[0])
        pthread_mutex_lock(&self.lock)
        while self.written < self.produced:
            if self.failure.code and (self.failed_batch < 0 or self.written >= self.failed_batch):
                break
            if not (self.producer_helps and self.step(&self.workers[0])):
                self.wait_for_progress()
            if not self.listen():
                break
        cdef int code = self.failure.code
        pthread_mutex_unlock(&self.lock)
        self.stand(&self.workers[0])
        return code

    cdef void wait_for_progress(self) noexcept nogil:
        cdef timespec until
        self.stand(&self.workers[0])
        clock_gettime(CLOCK_REALTIME, &until)
        until.tv_nsec += LISTEN_EVERY_NS
        if until.tv_nsec >= 1000000000:
            until.tv_nsec -= 1000000000
            until.tv_sec += 1
        pthread_cond_timedwait(&self.progress_made, &self.lock, &until)
        charge(&self.workers[0], STAGE_WAIT)

    cdef bint attend(self) noexcept nogil:
        """`listen` for the producer between two batches."""
        cdef bint go_on
        cdef int64_t now = monotonic_ns()
        if self.workers[0].seated and now >= self.workers[0].turn_ends_ns:
            self.let_others()
        if now < self.progress_due_ns:
            return True
        charge(&self.workers[0], self.producing)
        pthread_mutex_lock(&self.lock)
        go_on = self.listen()
        pthread_mutex_unlock(&self.lock)
        return go_on

    cdef bint listen(self) noexcept nogil:
        """Lets signal handlers and the progress callback run now and then; False once one of them has raised.

        Called with the lock held, which is released meanwhile: a callback may take its time.
        """
        cdef bint go_on
        cdef bint seated = self.workers[0].seated
        if monotonic_ns() < self.progress_due_ns:
            return True
        self.stand(&self.workers[0])
        pthread_mutex_unlock(&self.lock)
        go_on = self.call_back()
        charge(&self.workers[0], STAGE_WAIT)
        if seated:
            self.sit(&self.workers[0])
        pthread_mutex_lock(&self.lock)
        self.progress_due_ns = monotonic_ns() + LISTEN_EVERY_NS
        if not go_on:
            est_show(&self.cancelled, True)
            if not self.failure.code:
                set_failure(&self.failure, EST_CANCELLED, 0, -1, NULL, 0)
        return go_on

    cdef bint call_back(self) noexcept with gil:
        cdef int64_t written
        pthread_mutex_lock(&self.lock)
        written = self.tar_size
        pthread_mutex_unlock(&self.lock)
        try:
            PyErr_CheckSignals()
            if self.progress is not None:
                self.progress(written)
        except BaseException as error:
            self.interrupt = error
            self.elsewhere()
            return False
        return not self.elsewhere()

    cdef bint elsewhere(self) noexcept nogil:
        """Whether this is a child of the process that began the build, in which none of its other threads exist. A lock that
        one of them held would stay locked, and what they have of the crew would never come back: so both are left behind."""
        if getpid() == self.process:
            return False
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.work_or_end, NULL)
        pthread_cond_init(&self.progress_made, NULL)
        self.crew = NULL
        self.running = 0
        self.cancelled = True
        if self.failure.code != EST_FORKED:
            set_failure(&self.failure, EST_FORKED, 0, -1, NULL, 0)
            self.failed_batch = -1
        return True

    cdef void fail(self, const est_failure *failure, int64_t batch_number) noexcept nogil:
        """Keeps the failure that comes first in the stream, so that the same input always gives the same error.

        batch_number -1: the producer's own failure, which comes after everything it has submitted.
        """
        pthread_mutex_lock(&self.lock)
        if (not self.failure.code or 0 <= batch_number < self.failed_batch
                or (batch_number >= 0 > self.failed_batch and self.failure.code != EST_CANCELLED)):
            self.failure = failure[0]
            self.failed_batch = batch_number
        pthread_cond_broadcast(&self.work_or_end)
        pthread_cond_broadcast(&self.progress_made)
        pthread_mutex_unlock(&self.lock)

    cdef void cancel(self) noexcept nogil:
        """Drops all that is not written yet."""
        cdef est_failure cancelled
        memset(&cancelled, 0, sizeof(cancelled))
        cancelled.code = EST_CANCELLED
        pthread_mutex_lock(&self.lock)
        est_show(&self.cancelled, True)
        pthread_mutex_unlock(&self.lock)
        self.fail(&cancelled, -1)

    cdef bint has_failed(self) noexcept nogil:
        cdef bint failed
        pthread_mutex_lock(&self.lock)
        failed = self.failure.code != EST_OK
        pthread_mutex_unlock(&self.lock)
        return failed

    cdef void stop(self) noexcept nogil:
        """Ends the workers: all at once after a failure, else when nothing is left to do."""
        pthread_mutex_lock(&self.lock)
        self.ended = True
        pthread_cond_broadcast(&self.work_or_end)
        pthread_mutex_unlock(&self.lock)

    def close(self, bint cancel=False):
        """Ends and joins the workers. cancel: unfinished batches are dropped."""
        cdef int i
        self.elsewhere()
        if self.sink_thread == PyThread_get_thread_ident():     # which would wait for itself
            raise EstargzError("a layer is not to be closed by its own destination; raise an error there, which ends the build")
        with nogil:
            if cancel:
                self.cancel()
            self.stop()
            pthread_mutex_lock(&self.lock)
            while self.running > 0:
                pthread_cond_wait(&self.progress_made, &self.lock)
            est_show(&self.closed, True)
            pthread_mutex_unlock(&self.lock)
        if not cancel:      # else the producer may be another thread, and its clock is its own
            charge(&self.workers[0], self.producing)
        self.close_pipe()
        for i in range(self.worker_count):  # at once: the traceback of a failure may keep this object for long
            directory_cache_close(&self.workers[i].directory)

    cdef void close_pipe(self) noexcept nogil:
        # As long as it is open, the reader does not see the end.
        if self.pipe_open:
            close(self.pipe_fd)
        self.pipe_open = False

    def raise_failure(self):
        """Raises what went wrong; call it after close."""
        if self.interrupt is not None:
            raise self.interrupt
        if self.failure.code == EST_SINK:
            raise self.sink_error
        if self.failure.code:
            name = self.failure.name[:self.failure.name_len].decode("utf-8", "backslashreplace")
            raise from_status(self.failure.code, self.failure.sys_errno, name, self.failure.offset)

    # --------------------------------------------------------------------------------------------- what others share

    cdef void sit(self, worker *w) noexcept nogil:
        """Waits for a seat, if the thread has none. Not with the lock held."""
        if self.crew != NULL and not w.seated:
            if crew_take(self.crew, &w.turn_ends_ns):
                charge(w, STAGE_WAIT)
            w.seated = True

    cdef void stand(self, worker *w) noexcept nogil:
        """Gives the seat up: before anything that may take long and is no work."""
        if w.seated:
            w.seated = False
            crew_give(self.crew)

    cdef void take_turn(self, worker *w) noexcept nogil:
        """A seat for one more piece of work, after those that wait if the thread has had its turn."""
        if w.seated:
            if crew_turn(self.crew, &w.turn_ends_ns):
                charge(w, STAGE_WAIT)
        else:
            self.sit(w)

    cdef void begin_turn(self) noexcept nogil:
        """The producer is going to work for long."""
        self.sit(&self.workers[0])

    cdef void end_turn(self) noexcept nogil:
        self.stand(&self.workers[0])

    cdef void let_others(self) noexcept nogil:
        """Interrupts the producer's work for others, if it is seated and they wait."""
        if self.workers[0].seated:
            charge(&self.workers[0], self.producing)
            self.take_turn(&self.workers[0])

    cdef bint join(self) noexcept nogil:
        """Waits, before the first batch, until the crew has memory for them; False after a failure."""
        cdef int code = EST_OK
        if self.crew == NULL or self.member.joined:
            return True
        pthread_mutex_lock(&self.lock)
        if self.closed:
            code = EST_CANCELLED
        pthread_mutex_unlock(&self.lock)
        if code:
            return False
        self.stand(&self.workers[0])
        while True:
            code = crew_join(self.crew, &self.member, LISTEN_EVERY_NS)
            charge(&self.workers[0], STAGE_WAIT)
            pthread_mutex_lock(&self.lock)
            if code == EST_POOL_FULL and not self.failure.code:
                set_failure(&self.failure, code, 0, -1, NULL, 0)
            self.listen()
            if self.failure.code or self.ended:
                code = self.failure.code or EST_CANCELLED
            pthread_mutex_unlock(&self.lock)
            if code != CREW_FULL:
                break
        if code:
            crew_part(self.crew, &self.member)
        return code == EST_OK

    cdef void free_memory(self, batch *b) noexcept nogil:
        if b.raw != NULL:
            crew_take_back(self.crew, &self.member, b.raw, b.out)
        b.raw = b.out = NULL

    cdef void release(self) noexcept nogil:
        """Gives back all memory of the crew's. Only when no thread is at work on a batch any more."""
        cdef int64_t i
        if self.crew == NULL:
            return
        for i in range(self.slot_count):
            self.free_memory(&self.slots[i])
        crew_part(self.crew, &self.member)

    # --------------------------------------------------------------------------------------------- workers

    cdef int start_threads(self) noexcept with gil:
        """Starts the workers. Not by threading.Thread: its start() never ends when the new thread has no memory for Python."""
        cdef est_failure failure
        cdef int i
        cdef int code = EST_OK
        memset(&failure, 0, sizeof(failure))
        for i in range(1, self.worker_count):
            try:
                start_new_thread(self._run, (i,))
            except BaseException as error:      # the thread may have begun all the same
                code = EST_NO_THREAD if isinstance(error, RuntimeError) else EST_NO_MEMORY
                set_failure(&failure, code, EAGAIN, -1, NULL, 0)
                with nogil:
                    self.fail(&failure, -1)
                    self.cancel()
                break
        return code

    def _run(self, int index):
        cdef worker *w = &self.workers[index]
        with nogil:
            pthread_mutex_lock(&self.lock)
            if not self.ended:                  # else nobody waits for this thread any more
                charge(w, STAGE_WAIT)
                self.running += 1
                self.work_to_the_end(w)
                self.running -= 1
                pthread_cond_broadcast(&self.progress_made)     # who aborts waits for it beside the producer
            pthread_mutex_unlock(&self.lock)

    cdef void work_to_the_end(self, worker *w) noexcept nogil:
        """A worker's whole life; with the lock held, which is released meanwhile."""
        while True:
            if self.step(w):
                continue
            if self.failure.code or (self.ended and self.taken == self.produced):
                break
            self.stand(w)
            pthread_cond_wait(&self.work_or_end, &self.lock)
            charge(w, STAGE_WAIT)
        pthread_mutex_unlock(&self.lock)
        self.stand(w)
        pthread_mutex_lock(&self.lock)

    cdef bint step(self, worker *w) noexcept nogil:
        """Does one piece of work if there is any; called with the lock held, which is released meanwhile."""
        cdef batch *b
        cdef int code
        if self.cancelled:
            return False
        if not self.writing and self.written < self.ordered and not self.failed_before(self.written):
            b = self.ring[self.written % self.slot_count]
            self.writing = True
            if not self.sink_is_file:
                self.stand(w)
            pthread_mutex_unlock(&self.lock)
            code = self.write_batch(b)
            if code:
                self.give_up(b, code)
            charge(w, STAGE_WRITE)
            pthread_mutex_lock(&self.lock)
            self.writing = False
            if not code:
                b.state = STATE_FREE
                self.written += 1
                self.tar_size += b.raw_size
                if self.member.held > MEMBER_ROOMS:
                    self.free_memory(b)
            pthread_cond_signal(&self.progress_made)
            pthread_cond_signal(&self.work_or_end)
            return True
        if (not self.ordering and self.ordered < self.taken and not self.failed_before(self.ordered)
                and self.ring[self.ordered % self.slot_count].state == STATE_DONE):
            b = self.ring[self.ordered % self.slot_count]
            self.ordering = True
            pthread_mutex_unlock(&self.lock)
            self.sit(w)
            code = self.order(b)
            if code:
                self.give_up(b, code)
            charge(w, STAGE_ORDER)
            pthread_mutex_lock(&self.lock)
            self.ordering = False
            if not code:
                b.state = STATE_ORDERED
                self.ordered += 1
            pthread_cond_signal(&self.progress_made)
            pthread_cond_signal(&self.work_or_end)
            return True
        if self.taken < self.produced and not (self.failure.code and self.taken > self.failed_batch >= 0):
            b = self.ring[self.taken % self.slot_count]
            self.taken += 1
            b.state = STATE_WORKING
            pthread_mutex_unlock(&self.lock)
            self.take_turn(w)
            b.failure.code = EST_OK
            self.work(b, w)
            if b.failure.code:
                self.fail(&b.failure, b.number)
            pthread_mutex_lock(&self.lock)
            b.state = STATE_DONE
            if self.ordered == b.number:
                pthread_cond_signal(&self.progress_made)
            return True
        return False

    cdef bint failed_before(self, int64_t number) noexcept nogil:
        """Whether a batch is, or comes behind, one that has failed; the producer's own failure comes behind them all."""
        return self.failure.code and 0 <= self.failed_batch <= number

    cdef void give_up(self, batch *b, int code) noexcept nogil:
        cdef int64_t offset
        cdef bint over
        pthread_mutex_lock(&self.lock)
        offset = self.tar_size
        over = self.cancelled and self.failure.code  # the error that was there first is the one to tell
        pthread_mutex_unlock(&self.lock)
        if over:
            return
        if b.failure.code != code:
            set_failure(&b.failure, code, 0, offset, NULL, 0)
        self.fail(&b.failure, b.number)

    cdef compressor *take_compressor(self, worker *w) noexcept nogil:
        """The worker's own, or one of the crew's; NULL: no memory."""
        if self.crew != NULL and compresses(self.codec):
            return crew_borrow(self.crew, self.codec, self.level)
        if not w.opened:
            w.opened = compressor_open(&w.state, self.codec, self.level) == EST_OK
        return &w.state if w.opened else NULL

    cdef void work(self, batch *b, worker *w) noexcept nogil:
        cdef compressor *state = self.take_compressor(w)
        cdef int code = EST_OK if state != NULL else EST_NO_MEMORY
        charge(w, STAGE_COMPRESS)
        cdef bint hashed = not self.keep_rows or b.kind == BATCH_PIECE
        if not code and self.parts & PART_READ:
            code = self.fill_files(b, w)
        charge(w, STAGE_READ)
        # A chunk's hash costs least side by side with the stream's over the same bytes. If that has not come so far yet,
        # it may have after the compression.
        if not code and not hashed and self.take_tar_hash(b):
            self.hash_chunks(b, True)
            hashed = True
        charge(w, STAGE_HASH)
        if not code and self.parts & PART_COMPRESS:
            code = self.compress(b, state)
        charge(w, STAGE_COMPRESS)
        if not code and not hashed:
            self.hash_chunks(b, self.take_tar_hash(b))
        charge(w, STAGE_HASH)
        if state != NULL and state != &w.state:
            crew_return(self.crew, state)
        if code and not b.failure.code:
            set_failure(&b.failure, code, 0, -1, NULL, 0)

    cdef int fill_files(self, batch *b, worker *w) noexcept nogil:
        cdef file_fill *fills = <file_fill *>b.fills.data
        cdef size_t i
        cdef int code
        for i in range(b.fills.size // sizeof(file_fill)):
            code = fill_file(&fills[i], b, &w.directory)
            if code:
                set_failure(&b.failure, code, errno, fills[i].file_offset, b.paths.data + fills[i].path_at,
                            fills[i].path_size)
                return code
        return EST_OK

    cdef bint take_tar_hash(self, batch *b) noexcept nogil:
        """Whether the stream's hash has come to this batch and is the caller's now, to be given back."""
        cdef bint taken
        pthread_mutex_lock(&self.lock)
        taken = self.parts & PART_STREAM_HASH and not self.tar_hash_taken and self.tar_hash_next == b.number
        self.tar_hash_taken = self.tar_hash_taken or taken
        pthread_mutex_unlock(&self.lock)
        return taken

    cdef void return_tar_hash(self, batch *b) noexcept nogil:
        b.tar_hashed = True
        pthread_mutex_lock(&self.lock)
        self.tar_hash_taken = False
        self.tar_hash_next = b.number + 1
        pthread_mutex_unlock(&self.lock)

    cdef int hash_chunks(self, batch *b, bint with_tar) noexcept nogil:
        """Digests the chunks, and with_tar the whole batch as part of the stream's hash."""
        cdef sha256_stream streams[HASHED_TOGETHER]
        cdef sha256_job jobs[HASHED_TOGETHER + 1]
        cdef chunk_span *chunks = <chunk_span *>b.chunks.data
        cdef size_t count = b.chunks.size // sizeof(chunk_span) if self.parts & PART_CHUNK_HASH else 0
        cdef size_t at = 0
        cdef size_t i, group, end
        cdef size_t tar_at = 0
        while at < count or (with_tar and tar_at < b.raw_size):
            group = min(count - at, <size_t>HASHED_TOGETHER)
            for i in range(group):
                sha256_start(&streams[i])
                jobs[i + 1].stream = &streams[i]
                jobs[i + 1].data = b.raw + chunks[at + i].raw_at
                jobs[i + 1].size = chunks[at + i].size
            # The stream's part that these chunks lie in.
            end = b.raw_size if at + group == count else chunks[at + group].raw_at
            jobs[0].stream = &self.tar_hash
            jobs[0].data = b.raw + tar_at
            jobs[0].size = end - tar_at
            tar_at = end
            sha256_run(&jobs[0 if with_tar else 1], group + with_tar)
            for i in range(group):
                sha256_finish(&streams[i], chunks[at + i].digest)
            at += group
        if with_tar:
            self.return_tar_hash(b)
        return EST_OK

    cdef int compress(self, batch *b, compressor *state) noexcept nogil:
        cdef member_span *members = <member_span *>b.members.data
        cdef ssize_t written
        cdef size_t i
        b.out_size = 0
        if not compresses(self.codec):
            return EST_OK
        if b.kind == BATCH_PIECE:
            if b.first_piece:
                memcpy(b.out, GZIP_HEADER, GZIP_HEADER_SIZE)
                b.out_size = GZIP_HEADER_SIZE
            written = piece_write(state, b.raw, b.raw_size, b.last_piece, b.out + b.out_size,
                                  self.out_capacity - b.out_size)
            if written < 0:
                return written
            b.out_size += written
            return EST_OK
        for i in range(b.members.size // sizeof(member_span)):
            written = member_write(state, b.raw + members[i].raw_at, members[i].raw_end - members[i].raw_at,
                                   b.out + b.out_size, self.out_capacity - b.out_size)
            if written < 0:
                return written
            b.out_size += written
            members[i].out_end = b.out_size
        return EST_OK

    # --------------------------------------------------------------------------------------------- in order

    cdef int order(self, batch *b) noexcept nogil:
        """What follows from the place in the stream: offsets, and the hashes that run over all of it."""
        cdef int code = EST_OK
        if b.kind == BATCH_PIECE:
            code = self.finish_pieces(b)
        elif self.keep_rows:
            code = self.record(b)
        if code:
            return code
        self.hash_in_order(b)
        self.placed_size += self.blob_part(b)
        return EST_OK

    cdef size_t blob_part(self, const batch *b) noexcept nogil:
        """Bytes of the blob that a batch makes; without a codec the stream itself counts as the blob."""
        return b.out_size if compresses(self.codec) else b.raw_size

    cdef int write_batch(self, batch *b) noexcept nogil:
        cdef size_t size = self.blob_part(b)
        cdef int code = EST_OK
        if size and self.codec != CODEC_NONE and self.parts & PART_WRITE:
            code = self.write_out(b.out if compresses(self.codec) else b.raw, size)
        if code:
            self.describe_sink_failure(code, &b.failure)
        return code

    cdef void hash_in_order(self, batch *b) noexcept nogil:
        """The hashes that run over the whole stream: DiffID, blob, and the table of contents while it passes."""
        cdef sha256_job jobs[4]
        cdef size_t count = 0
        cdef file_part part
        # Every batch before this one is hashed, and workers take the stream's hash only for the batch it has come to:
        # which is this one, if its worker has not done it.
        if not b.tar_hashed and self.parts & PART_STREAM_HASH:
            jobs[count].stream = &self.tar_hash
            jobs[count].data = b.raw
            jobs[count].size = b.raw_size
            count += 1
        if compresses(self.codec) and self.parts & PART_BLOB_HASH:
            jobs[count].stream = &self.blob_hash
            jobs[count].data = b.out
            jobs[count].size = b.out_size
            count += 1
        if b.kind == BATCH_PIECE:
            jobs[count].stream = &self.piece_hash
            jobs[count].data = b.raw + b.digest_from
            jobs[count].size = b.digest_end - b.digest_from
            count += 1
        memset(&part, 0, sizeof(part))
        while next_file_part(self, b, &part):
            jobs[count] = part.job
            sha256_run(jobs, count + 1)
            count = 0
            if part.last:
                sha256_finish(&self.file_hash, (<toc_row *>self.table.rows.data + part.row).digest)
        sha256_run(jobs, count)
        if not b.tar_hashed:
            self.return_tar_hash(b)

    cdef int finish_pieces(self, batch *b) noexcept nogil:
        """The trailer of a member made of pieces needs the checksum over all of them."""
        cdef sha256_stream so_far
        cdef uint32_t size
        if b.first_piece:
            self.piece_offset = self.placed_size
            so_far = self.tar_hash      # a copy: the stream's own hash goes on over the pieces
            sha256_finish(&so_far, self.tar_digest)
        self.piece_crc = crc32_gzip_refl(self.piece_crc, b.raw, b.raw_size)
        self.piece_raw_size += b.raw_size
        if b.last_piece:
            size = <uint32_t>self.piece_raw_size
            memcpy(b.out + b.out_size, &self.piece_crc, 4)
            memcpy(b.out + b.out_size + 4, &size, 4)
            b.out_size += GZIP_TRAILER_SIZE
        return EST_OK

    cdef int record(self, batch *b) noexcept nogil:
        """Adds the batch's entries to the table of contents and gives its chunks their place in the blob."""
        cdef toc_table *table = &self.table
        cdef int64_t strings_at = table.strings.size
        cdef toc_row *rows = <toc_row *>b.rows.data
        cdef chunk_span *chunks = <chunk_span *>b.chunks.data
        cdef size_t i
        cdef int code
        for i in range(b.rows.size // sizeof(toc_row)):
            rows[i].strings_at += strings_at
        if not (buffer_append(&table.rows, b.rows.data, b.rows.size)
                and buffer_append(&table.strings, b.strings.data, b.strings.size)):
            return EST_NO_MEMORY
        for i in range(b.chunks.size // sizeof(chunk_span)):
            code = record_chunk(self, b, &chunks[i])
            if code:
                return code
        return EST_OK

    cdef void describe_sink_failure(self, int code, est_failure *failure) noexcept nogil:
        cdef int sys_errno = errno
        with gil:
            set_failure(failure, code, sys_errno if code == EST_WRITE else 0, self.blob_size, <char *>self.output,
                        len(self.output))

    cdef int write_out(self, const uint8_t *data, size_t size) noexcept nogil:
        cdef int code = EST_OK
        if self.sink_fd >= 0:
            code = self.write_fd(data, size)
        elif self.sink_write is not None:
            code = self.write_object(data, size)
        self.blob_size += size
        return code

    cdef int write_fd(self, const uint8_t *data, size_t size) noexcept nogil:
        cdef ssize_t written
        cdef int code
        while size:
            if self.sink_is_file:
                written = write(self.sink_fd, data, size)
            else:
                # A reader that has stopped must not keep a cancelled build from ending.
                code = self.wait_writable()
                if code:
                    return code
                written = self.write_some(data, size)
            if written < 0 and errno != EINTR and errno != EAGAIN:
                return EST_WRITE
            if written > 0:
                data += written
                size -= written
                self.fd_written += written
        # Has the disk begin early, so that the sync at the end has little left to wait for. Only a hint: pipes refuse it.
        if self.fd_written - self.fd_started >= WRITEBACK_STEP:
            est_start_writeback(self.sink_fd, self.fd_started, self.fd_written - self.fd_started)
            self.fd_started = self.fd_written
        return EST_OK

    cdef ssize_t write_some(self, const uint8_t *data, size_t size) noexcept nogil:
        """Writes what does not block. The descriptor may be somebody else's too, so it is not for us to make it so."""
        if self.sink_is_socket:
            return est_send_some(self.sink_fd, data, size)
        if self.pipe_open:
            return write(self.pipe_fd, data, size)
        return write(self.sink_fd, data, min(size, <size_t>PIPE_PIECE))

    cdef int wait_writable(self) noexcept nogil:
        cdef pollfd waiting
        waiting.fd = self.pipe_fd if self.pipe_open else self.sink_fd
        waiting.events = POLLOUT
        while poll(&waiting, 1, LISTEN_EVERY_NS // 1000000) <= 0:
            if est_glance(&self.cancelled) or not self.no_signal():
                return EST_CANCELLED
        return EST_CANCELLED if est_glance(&self.cancelled) else EST_OK

    cdef bint no_signal(self) noexcept with gil:
        """False once a signal handler has raised; only the main thread runs handlers."""
        try:
            PyErr_CheckSignals()
        except BaseException as error:
            self.interrupt = error
            self.elsewhere()
            return False
        return not self.elsewhere()

    cdef int write_object(self, const uint8_t *data, size_t size) noexcept with gil:
        # A copy: the writer may keep what it is given, and the batch will be used again.
        self.sink_thread = PyThread_get_thread_ident()
        try:
            self.sink_write(PyBytes_FromStringAndSize(<const char *>data, size))
        except BaseException as error:
            self.sink_error = error
            self.elsewhere()
            return EST_SINK
        finally:
            self.sink_thread = 0
        return EST_FORKED if self.elsewhere() else EST_OK

    # --------------------------------------------------------------------------------------------- results

    def result(self):
        """(blob size, blob digest, tar size, DiffID, digest of the pieces): sizes in bytes, digests of 32 bytes each."""
        cdef uint8_t tar_digest[32]
        cdef uint8_t blob_digest[32]
        cdef uint8_t piece_digest[32]
        sha256_finish(&self.tar_hash, tar_digest)
        sha256_finish(&self.blob_hash, blob_digest)
        sha256_finish(&self.piece_hash, piece_digest)
        if self.codec == CODEC_COPY:
            memcpy(blob_digest, tar_digest, 32)
        if not self.piece_raw_size:
            memcpy(self.tar_digest, tar_digest, 32)
        return self.blob_size, blob_digest[:32], self.tar_size, tar_digest[:32], piece_digest[:32]

    def stages(self):
        """Seconds that each thread has spent in each of STAGE_NAMES, the producing thread first; after close."""
        cdef int i
        if self.running:
            raise ValueError("the threads have not ended")
        return [dict(zip(STAGE_NAMES, [ns * 1e-9 for ns in self.workers[i].spent_ns]))
                for i in range(self.worker_count)]

    def extent(self):
        """What the batches were: how many, how many at once, and the bytes that the budget counts for each."""
        return {"batches": self.produced, "slots": self.slot_count,
                "slot_bytes": self.raw_capacity * (2 if compresses(self.codec) else 1)}

    def tables(self):
        """(rows, chunks, strings) as bytes: toc_row and chunk_row structs and the strings the rows point into."""
        return (
            PyBytes_FromStringAndSize(<char *>self.table.rows.data, self.table.rows.size),
            PyBytes_FromStringAndSize(<char *>self.table.chunks.data, self.table.chunks.size),
            PyBytes_FromStringAndSize(<char *>self.table.strings.data, self.table.strings.size),
        )


def own_pipe(fd):
    """A descriptor of the same pipe that does not block, for a pipe that holds more; -1 where the system has reasons not
    to give one, and the pipe is then written to by pieces that surely fit."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < PIPE_SIZE:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, <int>PIPE_SIZE)
    except OSError:
        pass
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return -1


# ------------------------------------------------------------------------------------------------- batches

cdef bint open_batch(batch *b, size_t raw_capacity, size_t out_capacity, int codec) noexcept nogil:
    """An empty batch with its memory; memory once taken is used again."""
    if b.raw == NULL:
        b.raw = <uint8_t *>est_new_pages(raw_capacity)
    if b.out == NULL and compresses(codec):
        b.out = <uint8_t *>est_new_pages(out_capacity)
    b.kind = BATCH_MEMBERS
    b.raw_size = 0
    b.out_size = 0
    b.members.size = 0
    b.chunks.size = 0
    b.fills.size = 0
    b.paths.size = 0
    b.rows.size = 0
    b.strings.size = 0
    b.tar_hashed = False
    b.failure.code = EST_OK
    return b.raw != NULL and (b.out != NULL or not compresses(codec))


cdef void free_batch(batch *b, size_t raw_capacity, size_t out_capacity) noexcept nogil:
    est_free_pages(b.raw, raw_capacity)
    est_free_pages(b.out, out_capacity)
    buffer_free(&b.members)
    buffer_free(&b.chunks)
    buffer_free(&b.fills)
    buffer_free(&b.paths)
    buffer_free(&b.rows)
    buffer_free(&b.strings)


cdef int record_chunk(Pipeline p, batch *b, const chunk_span *chunk) noexcept nogil:
    cdef toc_row *row = <toc_row *>p.table.rows.data + chunk.row
    cdef const member_span *members = <member_span *>b.members.data
    cdef int64_t offset = p.placed_size + (members[chunk.member - 1].out_end if chunk.member else 0)
    cdef int64_t inner_offset = chunk.raw_at - members[chunk.member].raw_at
    cdef chunk_row place
    if p.codec == CODEC_NONE:       # nothing is compressed: the place in the stream
        offset, inner_offset = p.placed_size + chunk.raw_at, 0
    if chunk.chunk_offset == 0:
        row.offset = offset
        row.inner_offset = inner_offset
        row.has_digest = 1
    if chunk.only:
        row.chunk_count = 1
        memcpy(row.digest, chunk.digest, 32)
        return EST_OK
    if chunk.chunk_offset == 0:
        row.first_chunk = p.table.chunks.size // sizeof(chunk_row)
    row.chunk_count += 1
    place.offset = offset
    place.inner_offset = inner_offset
    place.chunk_offset = chunk.chunk_offset
    place.chunk_size = chunk.size
    memcpy(place.digest, chunk.digest, 32)
    return EST_OK if buffer_append(&p.table.chunks, &place, sizeof(place)) else EST_NO_MEMORY


cdef bint next_file_part(Pipeline p, batch *b, file_part *part) noexcept nogil:
    """The batch's next run of chunks of one file that has several: its digest runs over all of them, in order."""
    cdef const chunk_span *chunks = <chunk_span *>b.chunks.data
    cdef size_t count = b.chunks.size // sizeof(chunk_span)
    cdef size_t i = part.next
    if not (p.keep_rows and p.parts & PART_CHUNK_HASH):
        return False
    while i < count and chunks[i].only:
        i += 1
    if i == count:
        return False
    if chunks[i].chunk_offset == 0:
        sha256_start(&p.file_hash)
    part.row = chunks[i].row
    part.job.stream = &p.file_hash
    part.job.data = b.raw + chunks[i].raw_at
    part.job.size = 0
    while i < count and chunks[i].row == part.row:      # nothing lies between the chunks of one file
        part.job.size += chunks[i].size
        part.last = chunks[i].last
        i += 1
    part.next = i
    return True


# ------------------------------------------------------------------------------------------------- files

cdef int fill_file(const file_fill *fill, batch *b, directory_cache *directory) noexcept nogil:
    """Reads the bytes and makes sure that the file is still the one that was listed."""
    cdef int handle = open_cached(directory, fill.root, <const char *>b.paths.data + fill.path_at, fill.path_size)
    cdef size_t done = 0
    cdef ssize_t got
    cdef int code = EST_OK
    cdef int kept_errno
    if handle < 0:  # it was there when it was listed
        return EST_REPLACED if errno == ENOENT or errno == ENOTDIR or errno == ELOOP else EST_OPEN
    while done < fill.size:
        got = pread(handle, b.raw + fill.raw_at + done, fill.size - done, fill.file_offset + done)
        if got < 0 and errno == EINTR:
            continue
        if got <= 0:
            code = EST_READ if got < 0 else EST_SHRANK
            break
        done += got
    if code != EST_READ or errno == EISDIR or errno == ESPIPE:
        code = check_unchanged(handle, fill, code)
    kept_errno = errno
    close(handle)
    (&errno)[0] = kept_errno
    return code


cdef int check_unchanged(int handle, const file_fill *fill, int code) noexcept nogil:
    cdef struct_stat now
    if fstat(handle, &now):
        return EST_STAT
    if not S_ISREG(now.st_mode) or <uint64_t>now.st_ino != fill.inode or <uint64_t>now.st_dev != fill.device:
        return EST_REPLACED
    if now.st_size > fill.file_size:
        return EST_GREW
    if now.st_size < fill.file_size:
        return EST_SHRANK
    if code == EST_OK and (now.st_mtim.tv_sec != fill.mtime_s or now.st_mtim.tv_nsec != fill.mtime_ns):
        return EST_REPLACED
    return code
