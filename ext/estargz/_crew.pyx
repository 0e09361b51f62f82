"""What builds that run side by side share: seats, compressors, and memory for batches.

A thread computes only while it has a seat, and seats are given to those that wait in the order in which they came. So a small
layer takes turns with a large one, of some batches each. A seat is kept while files are read and written, for hashing and
compressing, never while waiting for anything that depends on others: memory, a tar's next bytes, a pipe or an object that is
written to. So whoever has one always comes to give it up.

Every build is promised memory for two batches before its first one, in the order in which builds came. It can go on with
these whatever the others do. More it gets while there is more and nobody waits to begin, and gives back with each batch that
is written.
"""

from libc.errno cimport EINTR, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport calloc, free

from posix.time cimport CLOCK_MONOTONIC, CLOCK_REALTIME, clock_gettime, timespec
from posix.unistd cimport close, getpid, read, write

from estargz._codec cimport compressor, compressor_close, compressor_open
from estargz._rows cimport EST_NO_MEMORY, EST_OK, EST_POOL_FULL
from estargz.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_timedwait, pthread_cond_wait,
    pthread_equal, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
    pthread_self, pthread_t,
)

cdef extern from "pages.h" nogil:
    void *est_new_pages(size_t size)
    void est_free_pages(void *pages, size_t size)

cdef extern from "<fcntl.h>" nogil:
    enum: O_CLOEXEC

cdef extern from "glance.h" nogil:
    crew_waiter *est_glance(crew_waiter **place)
    void est_show(crew_waiter **place, crew_waiter *value)

cdef extern from "<unistd.h>" nogil:
    int pipe2(int *ends, int flags)

# How long a seat is kept that others wait for: some batches, so that changing seats costs less than 1 %.
cdef int64_t TURN_NS = 10000000


cdef class Crew:
    """threads >= 1 seats, and memory bytes for batches."""

    def __cinit__(self, int threads, int64_t memory):
        cdef crew *c = <crew *>calloc(1, sizeof(crew))
        cdef crew_tool *tools = <crew_tool *>calloc(threads, sizeof(crew_tool))
        if c == NULL or tools == NULL:
            free(c)
            free(tools)
            raise MemoryError
        pthread_mutex_init(&c.lock, NULL)
        pthread_cond_init(&c.freed, NULL)
        pthread_cond_init(&c.called, NULL)
        c.process = getpid()
        c.users = 1
        c.seats = c.free_seats = threads
        c.tools = tools
        c.memory = memory
        self.shared = c
        self.threads = threads
        self.memory = memory

    def __dealloc__(self):
        crew_drop(self.shared)

    def usage(self):
        """Just now: threads with a seat, builds with memory, bytes promised to them, bytes allocated, and compressors."""
        cdef crew *c = self.shared
        cdef crew_member *m
        cdef int i
        cdef int builds = 0
        cdef int tools = 0
        pthread_mutex_lock(&c.lock)
        m = c.members
        while m != NULL:
            builds += 1
            m = m.next
        for i in range(c.seats):
            tools += c.tools[i].lent or c.tools[i].opened   # a lent one belongs to its thread, which opens it
        found = (c.seats - c.free_seats, builds, c.promised, c.lent + c.idle, tools)
        pthread_mutex_unlock(&c.lock)
        return dict(zip(("seated", "builds", "promised", "allocated", "compressors"), found))


cdef void crew_keep(crew *c) noexcept nogil:
    if c != NULL:
        pthread_mutex_lock(&c.lock)
        c.users += 1
        pthread_mutex_unlock(&c.lock)


cdef void crew_drop(crew *c) noexcept nogil:
    cdef int users
    if c == NULL or c.process != getpid():
        return
    pthread_mutex_lock(&c.lock)
    c.users -= 1
    users = c.users
    pthread_mutex_unlock(&c.lock)
    if users:
        return
    tidy(c)
    free(c.tools)
    pthread_cond_destroy(&c.called)
    pthread_cond_destroy(&c.freed)
    pthread_mutex_destroy(&c.lock)
    free(c)


cdef void tidy(crew *c) noexcept nogil:
    """Frees all that nobody uses just now."""
    cdef int i
    while c.rooms != NULL:
        free_room(c)
    for i in range(c.seats):
        if not c.tools[i].lent and c.tools[i].opened:
            compressor_close(&c.tools[i].state)
            c.tools[i].opened = False


# ------------------------------------------------------------------------------------------------- seats

cdef int64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef bint crew_take(crew *c, int64_t *ends_ns) noexcept nogil:
    cdef bint waits = c != NULL and wait_for_seat(c)
    if c != NULL:
        ends_ns[0] = monotonic_ns() + TURN_NS
    return waits


cdef bint wait_for_seat(crew *c) noexcept nogil:
    cdef crew_waiter me
    cdef char rung
    cdef ssize_t got
    pthread_mutex_lock(&c.lock)
    if c.free_seats:
        c.free_seats -= 1
        pthread_mutex_unlock(&c.lock)
        return False
    if pipe2(me.bell, O_CLOEXEC):
        me.bell[0] = me.bell[1] = -1
    me.called = False
    me.next = NULL
    if c.first_waiter == NULL:
        est_show(&c.first_waiter, &me)
    else:
        c.last_waiter.next = &me
    c.last_waiter = &me
    while me.bell[0] < 0 and not me.called:
        pthread_cond_wait(&c.called, &c.lock)
    pthread_mutex_unlock(&c.lock)
    if me.bell[0] >= 0:
        got = read(me.bell[0], &rung, 1)
        while got < 0:                              # a signal
            got = read(me.bell[0], &rung, 1)
        close(me.bell[0])
        if got:                                     # else who called has closed it
            close(me.bell[1])
    return True


cdef void crew_give(crew *c) noexcept nogil:
    cdef crew_waiter *first
    cdef int bell = -1
    cdef ssize_t rung
    if c == NULL:
        return
    pthread_mutex_lock(&c.lock)
    first = c.first_waiter
    if first == NULL:
        c.free_seats += 1
    else:
        est_show(&c.first_waiter, first.next)
        first.called = True
        bell = first.bell[1]
        if bell < 0:
            pthread_cond_broadcast(&c.called)
    pthread_mutex_unlock(&c.lock)
    # A pipe, for who writes to one is taken to sleep soon: the other thread gets this one's CPU at once. After a condition's
    # signal it may stand in line for another, and the seat is empty for a millisecond.
    if bell >= 0:
        rung = write(bell, b"!", 1)
        while rung < 0 and errno == EINTR:
            rung = write(bell, b"!", 1)
        if rung < 0:                                # the kernel has no memory: the end of the pipe is a call, too
            close(bell)


cdef bint crew_turn(crew *c, int64_t *ends_ns) noexcept nogil:
    # A glance without the lock: who comes just now is seen the next time.
    if c == NULL or est_glance(&c.first_waiter) == NULL or monotonic_ns() < ends_ns[0]:
        return False
    crew_give(c)
    return crew_take(c, ends_ns)


# ------------------------------------------------------------------------------------------------- compressors

cdef compressor *crew_borrow(crew *c, int kind, int level) noexcept nogil:
    cdef crew_tool *found = NULL
    cdef crew_tool *tool
    cdef int i
    pthread_mutex_lock(&c.lock)
    for i in range(c.seats):
        tool = &c.tools[i]
        if tool.lent:
            continue
        if tool.opened and tool.state.kind == kind and tool.state.level == level:
            found = tool
            break
        if found == NULL or not tool.opened:
            found = tool
    found.lent = True
    pthread_mutex_unlock(&c.lock)
    if found.opened and (found.state.kind != kind or found.state.level != level):
        compressor_close(&found.state)
        found.opened = False
    if not found.opened:
        found.opened = compressor_open(&found.state, kind, level) == EST_OK
    if found.opened:
        return &found.state
    crew_return(c, &found.state)
    return NULL


cdef void crew_return(crew *c, compressor *state) noexcept nogil:
    cdef crew_tool *tool = <crew_tool *>state       # its first field
    pthread_mutex_lock(&c.lock)
    tool.lent = False
    pthread_mutex_unlock(&c.lock)


# ------------------------------------------------------------------------------------------------- memory

cdef int crew_join(crew *c, crew_member *m, int64_t wait_ns) noexcept nogil:
    cdef timespec until
    cdef int code = CREW_FULL
    pthread_mutex_lock(&c.lock)
    if not m.waiting:
        m.owner = pthread_self()
        queue(c, m)
    if owns(c, m.owner) and needed(c, m) > c.memory:
        code = EST_POOL_FULL
    elif not may_join(c, m):
        clock_gettime(CLOCK_REALTIME, &until)
        until.tv_nsec += wait_ns
        if until.tv_nsec >= 1000000000:
            until.tv_nsec -= 1000000000
            until.tv_sec += 1
        pthread_cond_timedwait(&c.freed, &c.lock, &until)
    if code == CREW_FULL and may_join(c, m):
        unqueue(c, m)
        c.promised += MEMBER_ROOMS * m.room
        m.joined = True
        m.next = c.members
        c.members = m
        pthread_cond_broadcast(&c.freed)    # there may be enough for the next one, too
        code = EST_OK
    pthread_mutex_unlock(&c.lock)
    return code


cdef bint may_join(crew *c, crew_member *m) noexcept nogil:
    return c.first_joining == m and c.promised + MEMBER_ROOMS * m.room <= c.memory


cdef bint owns(crew *c, pthread_t owner) noexcept nogil:
    """Whether a thread has an unfinished build: while it waits for memory, that one would keep its own."""
    cdef crew_member *m = c.members
    while m != NULL and not pthread_equal(m.owner, owner):
        m = m.next
    return m != NULL


cdef int64_t needed(crew *c, const crew_member *last) noexcept nogil:
    """Bytes that builds cannot do without, of those that have joined and those that wait up to `last`. While it is no more
    than the budget, all of them will get it without that another one ends."""
    cdef crew_member *m = c.members
    cdef int64_t bytes = MEMBER_ROOMS * last.room
    while m != NULL:
        bytes += MEMBER_ROOMS * m.room
        m = m.next
    m = c.first_joining
    while m != last:
        bytes += MEMBER_ROOMS * m.room
        m = m.next
    return bytes


cdef void queue(crew *c, crew_member *m) noexcept nogil:
    m.waiting = True
    m.next = NULL
    if c.first_joining == NULL:
        c.first_joining = m
    else:
        c.last_joining.next = m
    c.last_joining = m


cdef void unqueue(crew *c, crew_member *m) noexcept nogil:
    cdef crew_member *before = c.first_joining
    m.waiting = False
    if before == m:
        c.first_joining = m.next
        return
    while before.next != m:
        before = before.next
    before.next = m.next
    if c.last_joining == m:
        c.last_joining = before


cdef void crew_part(crew *c, crew_member *m) noexcept nogil:
    cdef crew_member **at
    pthread_mutex_lock(&c.lock)
    if m.waiting:
        unqueue(c, m)
    if m.joined:
        at = &c.members
        while at[0] != m:
            at = &at[0].next
        at[0] = m.next
        c.promised -= MEMBER_ROOMS * m.room
        m.joined = False
    if c.members == NULL:
        tidy(c)
    pthread_cond_broadcast(&c.freed)
    pthread_mutex_unlock(&c.lock)


cdef int crew_lend(crew *c, crew_member *m, uint8_t **raw, uint8_t **out) noexcept nogil:
    cdef bint more = m.held >= MEMBER_ROOMS
    cdef int code = CREW_FULL
    pthread_mutex_lock(&c.lock)
    if not more or (c.first_joining == NULL and c.promised + m.room <= c.memory):
        code = EST_OK if reuse_room(c, m, raw, out) else new_room(c, m, raw, out)
    if code == EST_OK:
        m.held += 1
        c.lent += m.room
        c.promised += m.room if more else 0
    pthread_mutex_unlock(&c.lock)
    return code


cdef void crew_take_back(crew *c, crew_member *m, uint8_t *raw, uint8_t *out) noexcept nogil:
    cdef crew_idle *room = <crew_idle *>raw
    room.out = out
    room.raw_capacity = m.raw_capacity
    room.out_capacity = m.out_capacity
    room.room = m.room
    pthread_mutex_lock(&c.lock)
    room.next = c.rooms
    c.rooms = room
    c.lent -= m.room
    c.idle += m.room
    m.held -= 1
    if m.held >= MEMBER_ROOMS:
        c.promised -= m.room
        pthread_cond_broadcast(&c.freed)
    pthread_mutex_unlock(&c.lock)


cdef bint reuse_room(crew *c, const crew_member *m, uint8_t **raw, uint8_t **out) noexcept nogil:
    cdef crew_idle **at = &c.rooms
    cdef crew_idle *room
    while at[0] != NULL and not (at[0].raw_capacity == m.raw_capacity and at[0].out_capacity == m.out_capacity):
        at = &at[0].next
    room = at[0]
    if room == NULL:
        return False
    at[0] = room.next
    c.idle -= m.room
    raw[0] = <uint8_t *>room
    out[0] = room.out
    return True


cdef int new_room(crew *c, const crew_member *m, uint8_t **raw, uint8_t **out) noexcept nogil:
    while c.rooms != NULL and c.lent + c.idle + m.room > c.memory:
        free_room(c)
    raw[0] = <uint8_t *>est_new_pages(m.raw_capacity)
    out[0] = <uint8_t *>est_new_pages(m.out_capacity) if raw[0] != NULL and m.out_capacity else NULL
    if raw[0] != NULL and (out[0] != NULL or not m.out_capacity):
        return EST_OK
    est_free_pages(raw[0], m.raw_capacity)
    raw[0] = NULL
    return EST_NO_MEMORY


cdef void free_room(crew *c) noexcept nogil:
    cdef crew_idle *room = c.rooms
    c.rooms = room.next
    c.idle -= room.room
    if room.out_capacity:
        est_free_pages(room.out, room.out_capacity)
    est_free_pages(room, room.raw_capacity)
