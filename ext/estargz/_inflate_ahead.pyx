"""Inflating ahead of the reader: threads fill blocks, several members at once, and the blocks come out in order.

    fd | memory | object -> lanes, a decoder each -> blocks -> reader

A lane inflates the members that follow a place in the input. The first lane begins where the input does. Others guess: each
at the first place of a segment of the input where a table of contents says that a member begins, or where bytes look like a
header. A guess counts for nothing until the lanes before it have ended a member exactly there; then it joins the chain of
lanes that are read from, and what it made meanwhile is at hand. What wrong guesses made is dropped. So guesses decide how
fast the bytes come, never which, nor which error: a decoder that begins at a member depends on nothing in front of it.

A thread that cannot go on with a lane, for want of a block, of input or of certainty, leaves it and takes another.
"""

import os
import stat as stat_module

cimport cython

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.buffer cimport PyBUF_READ, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EINTR, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memchr, memcpy, memmove, memset

from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport getpid, pread

from estargz._crew cimport Crew, crew_drop, crew_give, crew_keep, crew_take, crew_turn
from estargz._inflate cimport (
    HISTORY, KIND_GZIP, decoder_close, decoder_finish, decoder_open, decoder_restart, decoder_run,
)
from estargz._rows cimport EST_FORKED, EST_NO_MEMORY, EST_NO_THREAD, EST_OK, EST_READ
from estargz.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_signal, pthread_cond_timedwait,
    pthread_cond_wait, pthread_create, pthread_join, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock, pthread_t,
)

from estargz._inflate import KINDS, stream_error
from estargz.descriptors import naming
from estargz.errors import from_status

cdef enum:
    BLOCK_SIZE = 262144         # of output
    INPUT_BLOCK = 262144        # a lane's window
    SEGMENT = 262144            # of input, by default
    RING_PART = 262144          # of input that is kept of an object for each decoder
    HEADER_SIZE = 10            # of a gzip member at least
    REACH = 8 << 20             # how far behind the last border to guess
    CHAIN_BLOCKS = 2            # that guesses leave to the chain, so that it always goes on
    CHAIN_LANES = 2             # likewise
    SEGMENT_MOST = 1 << 30
    THREADS_MOST = 1024
    LISTEN_EVERY_NS = 100000000
    DEFAULT_MEMORY = 2 << 20
    THREAD_MEMORY = 6 << 20
    READ_PIECE = 1 << 20

cdef int64_t MOST = 1 << 62     # no offset is as large

# What fetch has found.
cdef enum:
    FETCHED = 1
    FETCH_END = 2
    FETCH_LEFT = 3              # the lane is no longer this thread's


# ---------------------------------------------------------------------------------------------------------------------
# blocks; all with the lock held

cdef block *new_block(ahead *a) noexcept nogil:
    """An empty block, or NULL when the budget or the memory is used up."""
    cdef block *b = a.free_blocks
    if b != NULL:
        a.free_blocks = b.next
    elif a.used_blocks < a.block_count:
        b = &a.blocks[a.used_blocks]
        b.data = <uint8_t *> malloc(BLOCK_SIZE)
        if b.data == NULL:
            return NULL
        a.used_blocks += 1
    else:
        return NULL
    b.size = 0
    b.next = NULL
    return b


cdef void free_block(ahead *a, block *b) noexcept nogil:
    b.next = a.free_blocks
    a.free_blocks = b


cdef void pass_on(ahead *a, lane *l) noexcept nogil:
    """Queues the block that the lane has been filling."""
    cdef block *b = l.out
    l.out = NULL
    if b == NULL:
        return
    if b.size == 0:
        l.held -= 1
        free_block(a, b)
        return
    b.offset = l.begin + l.d.taken
    b.members = l.d.members
    if l.first == NULL:
        l.first = b
    else:
        l.last.next = b
    l.last = b
    if l.chained:
        a.reached = b.offset
        pthread_cond_signal(&a.news)


# ---------------------------------------------------------------------------------------------------------------------
# lanes; all with the lock held

cdef bint may_run(ahead *a, lane *l) noexcept nogil:
    """Whether an idle lane has what it waits for."""
    if l.state != LANE_IDLE or l.want == WANT_CHAIN:
        return False
    if l.out == NULL and l.begin >= 0:
        if a.free_blocks == NULL and a.used_blocks == a.block_count or not l.chained and l.held >= a.quota:
            return False
    return l.want != WANT_INPUT or a.ring_closed or a.ring_end > l.fetched


cdef lane *next_lane(ahead *a) noexcept nogil:
    """What a thread should do now: the chain before guesses, and of these the first in the input."""
    cdef lane *best = NULL
    cdef lane *l
    cdef int i
    if may_run(a, a.tail):
        return a.tail
    for i in range(a.lane_count):
        l = &a.lanes[i]
        if may_run(a, l) and (best == NULL or l.look_end < best.look_end):
            best = l
    return best if best != NULL else new_guess(a)


cdef lane *new_guess(ahead *a) noexcept nogil:
    """A lane for the next segment that is worth a guess: not far behind the last border, so that a stream of one long
    member costs nothing."""
    cdef lane *found = NULL
    cdef int64_t segment, end
    cdef int i
    cdef int guesses = 0
    if not a.guesses or a.tail.state == LANE_ENDED:
        return NULL
    for i in range(a.lane_count):
        if a.lanes[i].state == LANE_FREE:
            found = &a.lanes[i]
        elif not a.lanes[i].chained:
            guesses += 1
    if found == NULL or guesses >= a.lane_count - CHAIN_LANES:
        return NULL
    segment = max(a.next_segment, max(a.border, a.reached) // a.segment + 1)
    if a.hints != NULL:
        segment = max(segment, hint_behind(a, segment * a.segment) // a.segment)
    end = a.ring_end if a.ring != NULL else a.end - a.begin
    if segment * a.segment >= end or segment * a.segment > a.border + REACH:
        return NULL
    if not open_lane(a, found):
        return NULL
    a.next_segment = segment + 1
    found.look_at = segment * a.segment
    found.look_end = found.look_at + a.segment
    return found


cdef bint open_lane(ahead *a, lane *l) noexcept nogil:
    """An idle lane without a place; its memory is used again. False: none is left."""
    if not l.opened:
        if decoder_open(&l.d, a.kind) != EST_OK:
            return False
        l.opened = True
    if l.input == NULL and (a.ring != NULL or a.fd >= 0):
        l.input = <uint8_t *> malloc(HISTORY + INPUT_BLOCK)
        if l.input == NULL:
            return False
        memset(l.input, 0, HISTORY)
    l.d.strict = a.strict
    l.d.pauses = a.kind == KIND_GZIP
    l.state = LANE_IDLE
    l.want = WANT_NOTHING
    l.begin = -1
    l.chained = l.dropped = False
    return True


cdef void place_lane(lane *l, int64_t offset) noexcept nogil:
    decoder_restart(&l.d)
    l.fetched = offset
    l.d.next_in = l.input + HISTORY


cdef void release(ahead *a, lane *l) noexcept nogil:
    drop_output(a, l)
    l.state = LANE_FREE
    l.chained = l.dropped = False
    l.next = NULL
    pthread_cond_broadcast(&a.work)


cdef void drop_output(ahead *a, lane *l) noexcept nogil:
    cdef block *b
    if l.out != NULL:
        free_block(a, l.out)
        l.out = NULL
    while l.first != NULL:
        b = l.first
        l.first = b.next
        free_block(a, b)
    l.held = 0


cdef void drop(ahead *a, lane *l) noexcept nogil:
    """Nobody wants the lane any more."""
    if l.state == LANE_BUSY:
        l.dropped = True
    else:
        release(a, l)


cdef bint hand_over(ahead *a, lane *l) noexcept nogil:
    """A member of the chain's last lane has ended: whether another lane has begun there, which then goes on from there."""
    cdef lane *found = NULL
    cdef lane *other
    cdef int i
    a.border = l.border
    for i in range(a.lane_count):
        other = &a.lanes[i]
        if other.state == LANE_FREE or other.chained or other.dropped:
            continue
        if other.begin == l.border and (a.ring == NULL or other.state == LANE_ENDED or other.fetched >= a.ring_begin):
            found = other
        elif other.begin <= l.border and (other.begin >= 0 or other.look_end <= l.border):
            drop(a, other)
    pthread_cond_broadcast(&a.work)
    if found == NULL:
        return False
    found.chained = True
    a.tail = l.next = found
    pass_on(a, l)
    end_lane(a, l, EST_OK, l.border)
    if found.state == LANE_IDLE and found.want == WANT_CHAIN:
        if not hand_over(a, found):
            found.want = WANT_NOTHING
    else:
        a.border = found.border
    return True


cdef void end_lane(ahead *a, lane *l, int status, int64_t offset) noexcept nogil:
    l.state = LANE_ENDED
    l.status = status
    l.ended_at = offset
    pthread_cond_signal(&a.news)


# ---------------------------------------------------------------------------------------------------------------------
# one thread; without the lock

cdef void *work(void *argument) noexcept nogil:
    cdef ahead *a = <ahead *> argument
    cdef lane *l
    cdef int64_t turn_ends_ns = 0
    pthread_mutex_lock(&a.lock)
    while not a.cancelled:
        l = next_lane(a)
        if l == NULL:
            pthread_cond_wait(&a.work, &a.lock)
            continue
        l.state = LANE_BUSY
        l.want = WANT_NOTHING
        pthread_mutex_unlock(&a.lock)
        crew_take(a.crew, &turn_ends_ns)
        run(a, l, &turn_ends_ns)
        crew_give(a.crew)
        pthread_mutex_lock(&a.lock)
    pthread_mutex_unlock(&a.lock)
    return NULL


cdef void run(ahead *a, lane *l, int64_t *turn_ends_ns) noexcept nogil:
    """Goes on with a lane until it ends or wants what is not there."""
    cdef int64_t members
    cdef size_t made
    cdef int status
    if l.begin < 0 and not find_member(a, l):
        return
    while take_block(a, l):
        members = l.d.members
        status = decoder_run(&l.d, l.out.data + l.out.size, BLOCK_SIZE - l.out.size, &made)
        l.out.size += made
        crew_turn(a.crew, turn_ends_ns)
        if status != EST_OK:
            finish(a, l, status, l.begin + l.d.taken)
            return
        if l.d.pauses and l.d.members != members:
            if not pass_border(a, l):
                return
        elif l.out.size < BLOCK_SIZE and not more_input(a, l):
            return


cdef bint take_block(ahead *a, lane *l) noexcept nogil:
    """Has the lane hold a block with room. False: it is no longer this thread's."""
    cdef block *b = NULL
    if l.out != NULL and l.out.size < BLOCK_SIZE:
        return True
    pthread_mutex_lock(&a.lock)
    pass_on(a, l)
    if (l.chained or l.held < a.quota) and not a.cancelled:
        b = new_block(a)
    if l.dropped:
        if b != NULL:
            free_block(a, b)
            b = NULL
        release(a, l)
    elif b != NULL:
        l.out = b
        l.held += 1
    elif l.chained and a.used_blocks < CHAIN_BLOCKS:    # less than it can do with
        end_lane(a, l, EST_NO_MEMORY, l.begin)
    else:
        l.state = LANE_IDLE
        l.want = WANT_BLOCK
    pthread_mutex_unlock(&a.lock)
    return b != NULL


cdef bint pass_border(ahead *a, lane *l) noexcept nogil:
    """A member has ended. False: the lane is no longer this thread's."""
    cdef bint goes_on = True
    pthread_mutex_lock(&a.lock)
    l.border = l.begin + l.d.taken
    if l.dropped:
        release(a, l)
        goes_on = False
    elif l.chained:
        goes_on = not hand_over(a, l)
    elif l.border >= l.look_end:
        goes_on = False
        l.state = LANE_IDLE
        l.want = WANT_CHAIN
    pthread_mutex_unlock(&a.lock)
    return goes_on


cdef bint more_input(ahead *a, lane *l) noexcept nogil:
    """Gives the decoder more. False: the lane is no longer this thread's."""
    cdef int found = fetch(a, l)
    if found == FETCH_END:
        finish(a, l, decoder_finish(&l.d), l.begin + l.d.taken + <int64_t> l.d.avail_in)
    elif found < 0:
        finish(a, l, found, l.fetched)
    return found == FETCHED


cdef void finish(ahead *a, lane *l, int status, int64_t offset) noexcept nogil:
    """Nothing more comes of the lane, unless it was a guess whose first member is none: then it looks for another."""
    pthread_mutex_lock(&a.lock)
    if l.dropped or status == EST_READ and not l.chained:
        release(a, l)
    elif status != EST_OK and not l.chained and l.d.members == 0:
        drop_output(a, l)
        l.look_at = l.begin + 1
        l.begin = -1
        l.state = LANE_IDLE
    else:
        pass_on(a, l)
        end_lane(a, l, status, offset)
    pthread_mutex_unlock(&a.lock)


# --- input

cdef int fetch(ahead *a, lane *l) noexcept nogil:
    """Gives the decoder what follows in the input: FETCHED, FETCH_END, FETCH_LEFT, or EST_READ."""
    cdef int64_t left = a.end - a.begin - l.fetched
    cdef int64_t room
    cdef ssize_t count
    cdef uint8_t *start
    if a.ring == NULL and left <= 0:
        return FETCH_END
    if a.ring == NULL and a.fd < 0:
        if l.d.avail_in == 0:
            l.d.next_in = <uint8_t *> a.data + a.begin + l.fetched
        count = min(left, <int64_t> INPUT_BLOCK)
        l.d.avail_in += count
        l.fetched += count
        return FETCHED
    memmove(l.input, l.d.next_in - HISTORY, HISTORY + l.d.avail_in)
    l.d.next_in = l.input + HISTORY
    start = l.d.next_in + l.d.avail_in
    room = INPUT_BLOCK - <int64_t> l.d.avail_in
    if a.ring != NULL:
        return fetch_ring(a, l, start, room)
    count = pread(a.fd, start, min(room, left), a.begin + l.fetched)
    while count < 0 and errno == EINTR:
        count = pread(a.fd, start, min(room, left), a.begin + l.fetched)
    if count < 0:
        l.sys_errno = errno
        return EST_READ
    l.d.avail_in += count
    l.fetched += count
    return FETCHED if count else FETCH_END


cdef int fetch_ring(ahead *a, lane *l, uint8_t *start, int64_t room) noexcept nogil:
    cdef int found = FETCHED
    cdef int64_t count, at, part
    pthread_mutex_lock(&a.lock)
    count = min(room, a.ring_end - l.fetched)
    if l.dropped or l.fetched < a.ring_begin:    # a guess so far behind the chain that its input is gone
        release(a, l)
        found = FETCH_LEFT
    elif count > 0:
        at = l.fetched % a.ring_size
        part = min(count, a.ring_size - at)
        memcpy(start, a.ring + at, part)
        memcpy(start + part, a.ring, count - part)
        l.d.avail_in += count
        l.fetched += count
    elif a.ring_closed:
        found = FETCH_END
    else:
        l.state = LANE_IDLE
        l.want = WANT_INPUT
        if l.chained:
            pass_on(a, l)
            pthread_cond_signal(&a.news)
        found = FETCH_LEFT
    pthread_mutex_unlock(&a.lock)
    return found


# --- guesses

cdef int64_t hint_behind(ahead *a, int64_t offset) noexcept nogil:
    """The first hint at or behind a place in the input; MOST: there is none."""
    cdef size_t low = 0
    cdef size_t high = a.hint_count
    cdef size_t middle
    while low < high:
        middle = (low + high) // 2
        if a.hints[middle] - a.begin < offset:
            low = middle + 1
        else:
            high = middle
    return max(a.hints[low] - a.begin, offset) if low < a.hint_count else MOST


cdef bint is_header(const uint8_t *p) noexcept nogil:
    """Whether a gzip header that any known program writes begins here: fewer than one in 2**36 random places."""
    return (p[0] == 0x1f and p[1] == 0x8b and p[2] == 8 and p[3] & 0xe0 == 0
            and (p[8] == 0 or p[8] == 2 or p[8] == 4) and (p[9] <= 13 or p[9] == 255))


cdef bint find_member(ahead *a, lane *l) noexcept nogil:
    """Looks for a place to begin. False: there is none, or the lane is no longer this thread's."""
    cdef int64_t at = l.look_at
    cdef int64_t span
    cdef const uint8_t *p
    cdef int found = FETCHED
    place_lane(l, at)
    while at < l.look_end:
        if a.hints != NULL:
            at = hint_behind(a, at)
            if at >= l.look_end:
                break
            place_lane(l, at)
        while found == FETCHED and l.d.avail_in < HEADER_SIZE:
            found = fetch(a, l)
            if found == FETCH_LEFT:
                return False
        if found != FETCHED:
            break
        span = min(<int64_t> (l.d.avail_in - HEADER_SIZE + 1), l.look_end - at)
        p = l.d.next_in
        if not is_header(p):
            p = l.d.next_in + 1
            if a.hints == NULL:
                p = <const uint8_t *> memchr(p, 0x1f, span - 1)
                if p == NULL:
                    p = l.d.next_in + span
            l.d.avail_in -= p - l.d.next_in
            at += p - l.d.next_in
            l.d.next_in = <uint8_t *> p
            continue
        return begin_guess(a, l, at)
    pthread_mutex_lock(&a.lock)
    release(a, l)
    pthread_mutex_unlock(&a.lock)
    return False


cdef bint begin_guess(ahead *a, lane *l, int64_t offset) noexcept nogil:
    cdef bint early
    pthread_mutex_lock(&a.lock)
    early = not l.dropped and offset > a.border
    if early:
        l.begin = l.border = offset
    else:
        release(a, l)
    pthread_mutex_unlock(&a.lock)
    return early


# ---------------------------------------------------------------------------------------------------------------------
# the reader

@cython.no_gc_clear     # its threads use what it holds until they are joined
cdef class InflateAhead:
    """The decompressed bytes of a stream, inflated by threads of its own in front of who reads them.

    source:   a descriptor, a bytes-like object, or an object with ``readinto`` or ``read``. A regular file is read with pread
              and its position left alone; an object is read in order, by the reader's own thread, and never closed.
    kind:     "gzip", "zstd" or "plain", as for InflateReader
    threads:  1..1024. One inflates ahead of the reader; more work on several gzip members at once
    memory:   bytes of output under way, at least two blocks of 256 KiB; by default 2 MiB and 6 MiB for each further thread
    members:  where gzip members may begin, a contiguous int64 array in ascending order: offsets in ``source``. They only say
              where to try. Without it such places are looked for
    begin, end: the part of a file or of memory that is the stream, ``end`` None for all of it
    segment:  bytes of the input in which one place to begin is looked for
    crew:     None, or a pool's (_crew): the threads then inflate only while they have one of its seats
    name, strict: as for InflateReader

    Bytes, errors and their offsets are those of InflateReader, whatever the threads and the memory. Beyond ``memory`` it takes
    0.4 MiB for each of at most 2 * threads + 2 decoders and, for an object, up to 0.5 MiB for each and 4 MiB more.
    Threads begin with the first read and end with ``close``, or with the object.
    """

    def __cinit__(self, source, str kind, *, int threads=1, memory=None, members=None, int64_t begin=0, end=None,
                  int64_t segment=SEGMENT, Crew crew=None, str name="input", bint strict=False):
        cdef int64_t budget
        if kind not in KINDS:
            raise ValueError(f'kind must be "gzip", "zstd" or "plain", not {kind!r}')
        if not 1 <= threads <= THREADS_MOST:
            raise ValueError(f"threads must be 1 to {<int>THREADS_MOST}, not {threads}")
        if not 1 <= segment <= SEGMENT_MOST:
            raise ValueError(f"segment must be 1 to {<int>SEGMENT_MOST}, not {segment}")
        self.name = name
        self.process = -1
        self.a.kind = KINDS[kind]
        self.a.strict = strict
        self.a.segment = segment
        if crew is not None:
            self.a.crew = crew.shared
            crew_keep(self.a.crew)
        self.thread_count = threads if self.a.kind == KIND_GZIP else 1
        self.a.guesses = self.thread_count > 1
        budget = DEFAULT_MEMORY + THREAD_MEMORY * (self.thread_count - 1) if memory is None else memory
        self.a.block_count = max(budget // BLOCK_SIZE, CHAIN_BLOCKS)
        self.a.lane_count = 1
        if self.a.guesses:
            self.a.lane_count = min(2 * self.thread_count, self.a.block_count - CHAIN_BLOCKS) + CHAIN_LANES
            self.a.quota = (self.a.block_count - CHAIN_BLOCKS) // max(self.a.lane_count - CHAIN_LANES, 1)
        self._open(source, begin, end, members)
        self.threads = <pthread_t *> calloc(self.thread_count, sizeof(pthread_t))
        self.a.lanes = <lane *> calloc(self.a.lane_count, sizeof(lane))
        self.a.blocks = <block *> calloc(self.a.block_count, sizeof(block))
        if self.threads == NULL or self.a.lanes == NULL or self.a.blocks == NULL or not open_lane(&self.a, self.a.lanes):
            raise stream_error(EST_NO_MEMORY, name, 0)
        place_lane(self.a.lanes, 0)
        self.a.head = self.a.tail = self.a.lanes
        self.a.head.begin = 0
        self.a.head.chained = True
        pthread_mutex_init(&self.a.lock, NULL)
        pthread_cond_init(&self.a.work, NULL)
        pthread_cond_init(&self.a.news, NULL)
        self.a.ready = True

    def _open(self, source, int64_t begin, end, members):
        self.a.fd = -1
        self.a.begin = begin
        self.a.end = MOST if end is None else end
        if not 0 <= begin <= self.a.end:
            raise ValueError("begin and end must ascend from 0")
        if isinstance(source, int):
            if source < 0:
                raise ValueError(f"not a file descriptor: {source}")
            with naming(self.name):
                status = os.fstat(source)
            if stat_module.S_ISREG(status.st_mode) and status.st_size:
                self.a.fd = source
                self.a.end = min(self.a.end, status.st_size)
            else:
                source = open(source, "rb", buffering=0, closefd=False)
        elif not hasattr(source, "read") and not hasattr(source, "readinto"):
            PyObject_GetBuffer(source, &self.view, PyBUF_SIMPLE)
            self.held = True
            self.a.data = <const uint8_t *> self.view.buf
            self.a.end = min(self.a.end, self.view.len)
        if self.a.fd < 0 and not self.held:
            if begin or end is not None:
                raise ValueError("an object is read from where it stands to its end")
            self.pull = getattr(source, "readinto", None)
            self.read_raw = None if self.pull is not None else source.read
            self.a.ring_size = (4 if not self.a.guesses else self.a.lane_count + 16) * RING_PART
            ring = bytearray(self.a.ring_size)
            self.window = memoryview(ring)
            self.a.ring = <uint8_t *> PyByteArray_AS_STRING(ring)
        self.a.begin = min(self.a.begin, self.a.end)
        if members is not None:
            PyObject_GetBuffer(members, &self.hint_view, PyBUF_SIMPLE)
            self.hint_held = True
            if self.hint_view.len % 8 or memoryview(members).format not in ("l", "q", "<l", "<q"):
                raise ValueError("members must be an array of int64")
            self.a.hints = <const int64_t *> self.hint_view.buf
            self.a.hint_count = self.hint_view.len // 8

    def __dealloc__(self):
        cdef int i
        cdef int64_t n
        self.stop()
        if self.a.lanes != NULL:
            for i in range(self.a.lane_count):
                if self.a.lanes[i].opened:
                    decoder_close(&self.a.lanes[i].d)
                free(self.a.lanes[i].input)
        if self.a.blocks != NULL:
            for n in range(self.a.used_blocks):
                free(self.a.blocks[n].data)
        free(self.threads)
        free(self.a.lanes)
        free(self.a.blocks)
        crew_drop(self.a.crew)
        if self.a.ready and self.process in (-1, getpid()):
            pthread_cond_destroy(&self.a.news)
            pthread_cond_destroy(&self.a.work)
            pthread_mutex_destroy(&self.a.lock)
        if self.held:
            PyBuffer_Release(&self.view)
        if self.hint_held:
            PyBuffer_Release(&self.hint_view)

    # ------------------------------------------------------------------------------------------------ as InflateReader

    @property
    def offset(self):
        """Compressed bytes in front of what is not read yet, as far as is known; exact at the end and after an error."""
        return self.taken

    @property
    def members(self):
        """gzip members or zstd frames that ended by then."""
        return self.ended_members

    def readinto(self, buffer):
        """Fill the writable ``buffer``; returns the number of bytes, less than its length only at the end."""
        cdef Py_buffer view
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            self._begin()
            try:
                return self.copy_out(<uint8_t *> view.buf, view.len)
            finally:
                self.busy = False
        finally:
            PyBuffer_Release(&view)

    def read(self, Py_ssize_t size=-1):
        """At most ``size`` bytes, or all that are left; empty at the end."""
        parts = []
        cdef Py_ssize_t count
        while size:
            piece = bytearray(READ_PIECE if size < 0 else min(size, READ_PIECE))
            count = self.readinto(piece)
            parts.append(piece if count == len(piece) else piece[:count])
            if count < len(piece):
                break
            if size > 0:
                size -= count
        return b"".join(parts)

    def blocks(self):
        """The output as memoryviews of at most 256 KiB, none empty, without a copy: each is released when the next is
        asked for."""
        cdef const uint8_t *data = NULL
        cdef size_t size = 0
        cdef int found
        while True:
            self._begin()
            try:
                found = self.rest(&data, &size)
            finally:
                self.busy = False
            if not found:
                return
            view = PyMemoryView_FromMemory(<char *> data, size, PyBUF_READ)
            try:
                yield view
            finally:
                view.release()

    def readable(self):
        """True: with this and the next three, io.BufferedReader and tarfile take the reader."""
        return True

    def writable(self):
        return False

    def seekable(self):
        return False

    @property
    def closed(self):
        return self.closing

    def flush(self):
        """Does nothing."""

    def close(self):
        """Ends the threads. The source is not closed: it is not the reader's."""
        self.closing = True
        self.stop()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    # ------------------------------------------------------------------------------------------------ inside

    def _begin(self):
        if self.closing:
            raise ValueError(f"{self.name}: read after close()")
        if self.busy:
            raise RuntimeError(f"{self.name}: read by two threads at once")
        if self.started and self.process != getpid():
            raise from_status(EST_FORKED)
        self.busy = True

    cdef Py_ssize_t copy_out(self, uint8_t *out, Py_ssize_t room) except -1:
        cdef const uint8_t *data = NULL
        cdef size_t size = 0
        cdef size_t part
        cdef Py_ssize_t total = 0
        while total < room:
            if not self.rest(&data, &size):
                break
            part = min(size, <size_t> (room - total))
            with nogil:
                memcpy(out + total, data, part)
            self.current_at -= size - part
            total += part
        return total

    cdef int rest(self, const uint8_t **data, size_t *size) except -1:
        """What is left of the block at hand, or the next one; counts as read."""
        if self.current == NULL or self.current_at == self.current.size:
            return self.next_block(data, size)
        data[0] = self.current.data + self.current_at
        size[0] = self.current.size - self.current_at
        self.current_at = self.current.size
        return 1

    cdef int next_block(self, const uint8_t **data, size_t *size) except -1:
        cdef ahead *a = &self.a
        cdef lane *l
        self.start()
        pthread_mutex_lock(&a.lock)
        try:
            if self.current != NULL:
                free_block(a, self.current)
                self.current = NULL
                pthread_cond_signal(&a.work)
            while True:
                l = a.head
                if l.first != NULL:
                    self.give_out(l)
                    data[0] = self.current.data
                    size[0] = self.current_at = self.current.size
                    return 1
                if l.state == LANE_ENDED:
                    if l.next == NULL:
                        self.end_of(l)
                        return 0
                    self.base_members += l.d.members
                    a.head = l.next
                    release(a, l)
                elif not self.fill_ring():
                    self.wait()
        finally:
            pthread_mutex_unlock(&a.lock)

    cdef void give_out(self, lane *l) noexcept nogil:
        self.current = l.first
        l.first = l.first.next
        l.held -= 1
        self.taken = self.current.offset
        self.ended_members = self.base_members + self.current.members

    cdef int end_of(self, lane *l) except -1:
        self.taken = l.ended_at
        self.ended_members = self.base_members + l.d.members
        if l.status != EST_OK:
            raise stream_error(l.status, self.name, l.ended_at, l.sys_errno)
        return 0

    cdef int wait(self) except -1:
        """Waits for news, with the lock held, which is released meanwhile; lets signal handlers run."""
        cdef timespec until
        cdef bint cancelled
        clock_gettime(CLOCK_REALTIME, &until)
        until.tv_nsec += LISTEN_EVERY_NS
        if until.tv_nsec >= 1000000000:
            until.tv_nsec -= 1000000000
            until.tv_sec += 1
        with nogil:
            pthread_cond_timedwait(&self.a.news, &self.a.lock, &until)
            cancelled = self.a.cancelled
            pthread_mutex_unlock(&self.a.lock)
        try:
            PyErr_CheckSignals()
            if cancelled:
                raise ValueError(f"{self.name}: closed while it was read")
        finally:
            pthread_mutex_lock(&self.a.lock)
        return 0

    cdef int fill_ring(self) except -1:
        """Reads on in the object if that is of use; called with the lock held, which is released meanwhile.

        What the object raises is raised here when all output in front of it was given out, as InflateReader does.
        """
        cdef ahead *a = &self.a
        cdef lane *tail = a.tail
        cdef int64_t at, room, count
        cdef bint starving = tail.state == LANE_IDLE and tail.want == WANT_INPUT and tail.fetched == a.ring_end
        if a.ring == NULL or a.ring_closed or tail.state == LANE_ENDED:
            return 0
        if self.source_error is not None:
            if not starving:
                return 0
            error, self.source_error = self.source_error, None
            raise error
        at = a.ring_end % a.ring_size
        room = a.ring_size - (a.ring_end - tail.fetched)
        if room < a.ring_size // 2 and not starving:
            return 0
        room = min(room, a.ring_size - at)
        a.ring_begin = max(a.ring_begin, a.ring_end + room - a.ring_size)
        pthread_mutex_unlock(&a.lock)
        try:
            count = self.pull_some(at, room)
        except Exception as error:
            self.source_error = error
            count = -1
        finally:
            pthread_mutex_lock(&a.lock)
        if count >= 0:
            a.ring_end += count
            a.ring_closed = count == 0
            pthread_cond_broadcast(&a.work)
        return 1

    cdef int64_t pull_some(self, int64_t at, int64_t room) except -1:
        if self.pull is not None:
            count = self.pull(self.window[at:at + room])
        else:
            data = self.read_raw(room)
            count = None if data is None else len(data)
            if count and count <= room:
                self.window[at:at + count] = data
        if count is None:
            raise BlockingIOError(f"{self.name}: no data yet; estargz reads blocking streams only")
        if not 0 <= count <= room:
            raise ValueError(f"{self.name}: read() gave {count} bytes when {room} were asked for")
        return count

    cdef int start(self) except -1:
        cdef int error = 0
        if self.started:
            return 0
        self.process = getpid()
        while self.started < self.thread_count:
            error = pthread_create(&self.threads[self.started], NULL, work, &self.a)
            if error:
                break
            self.started += 1
        if not self.started:
            raise stream_error(EST_NO_THREAD, self.name, 0, error)
        return 0

    cdef void stop(self) noexcept:
        """Ends and joins the threads."""
        cdef int i
        if not self.started or self.process != getpid():
            return
        with nogil:
            pthread_mutex_lock(&self.a.lock)
            self.a.cancelled = True
            pthread_cond_broadcast(&self.a.work)
            pthread_cond_broadcast(&self.a.news)
            pthread_mutex_unlock(&self.a.lock)
            for i in range(self.started):
                pthread_join(self.threads[i], NULL)
        self.started = 0
