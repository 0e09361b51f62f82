# What builds that run side by side share: seats, compressors, and memory for batches. A NULL crew is that of a build alone:
# it has a seat for everybody. Nothing here touches Python objects, and nothing but crew_take and crew_join waits.
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t

from estargz._codec cimport compressor
from estargz.pthread cimport pthread_cond_t, pthread_mutex_t, pthread_t

# A thread in the queue for a seat.
ctypedef struct crew_waiter:
    int bell[2]             # a pipe; -1: none was to be had, and the thread waits for `called` to change
    bint called
    crew_waiter *next

# A compressor and what it was opened for. There are as many as seats, so one is free for everybody who has a seat.
ctypedef struct crew_tool:
    compressor state
    bint opened, lent

# What one build has of the memory. All but the first two: locked.
ctypedef struct crew_member:
    size_t raw_capacity     # of a batch's two buffers, set by the build;
    size_t out_capacity     # 0: it needs no second one
    int64_t room            # bytes that count for a batch
    int64_t held            # batches that have memory; the first MEMBER_ROOMS never have to wait for it
    bint joined, waiting
    pthread_t owner         # the thread that joined
    crew_member *next       # of those that have joined, or wait to

# Memory that no build has just now: this is written to its beginning.
ctypedef struct crew_idle:
    uint8_t *out
    size_t raw_capacity, out_capacity
    int64_t room
    crew_idle *next

ctypedef struct crew:
    pthread_mutex_t lock
    pthread_cond_t freed            # builds that wait to join wait here
    pthread_cond_t called           # and threads without a bell here
    int process                     # that made it: to a child forked from it, it is nothing but memory
    int users                       # who keeps it alive
    int seats, free_seats           # free ones only while nobody waits
    crew_waiter *first_waiter
    crew_waiter *last_waiter
    crew_tool *tools
    int64_t memory                  # the budget,
    int64_t promised                # of it to the builds that have joined: at least what they have
    int64_t lent, idle              # what was allocated: never more than the budget
    crew_idle *rooms
    crew_member *members
    crew_member *first_joining
    crew_member *last_joining

cdef enum:
    MEMBER_ROOMS = 2        # batches that a build cannot do without
    CREW_FULL = 1

cdef class Crew:
    cdef crew *shared
    cdef readonly int threads
    cdef readonly int64_t memory

cdef void crew_keep(crew *c) noexcept nogil
cdef void crew_drop(crew *c) noexcept nogil

# Waits for a seat, first come first served; True if it had to wait. Not to be called with a lock held, nor with the GIL,
# and a seat is not to be kept while waiting for anything else. ends_ns: for crew_turn.
cdef bint crew_take(crew *c, int64_t *ends_ns) noexcept nogil
cdef void crew_give(crew *c) noexcept nogil

# Lets the others of the queue go first, if there are any and the caller's turn is over; True if it had to wait.
cdef bint crew_turn(crew *c, int64_t *ends_ns) noexcept nogil

# For who has a seat: a compressor, to be returned before the seat is given up. NULL: no memory.
cdef compressor *crew_borrow(crew *c, int kind, int level) noexcept nogil
cdef void crew_return(crew *c, compressor *state) noexcept nogil

# Waits, up to wait_ns, until the memory suffices for one more build: EST_OK; CREW_FULL, to be called again; or EST_POOL_FULL,
# because nobody waits who keeps others waiting: the calling thread has an unfinished build. Who gives up calls crew_part.
cdef int crew_join(crew *c, crew_member *m, int64_t wait_ns) noexcept nogil
cdef void crew_part(crew *c, crew_member *m) noexcept nogil

# Memory for one more batch: EST_OK, CREW_FULL (never for the first MEMBER_ROOMS), EST_NO_MEMORY. And back again.
cdef int crew_lend(crew *c, crew_member *m, uint8_t **raw, uint8_t **out) noexcept nogil
cdef void crew_take_back(crew *c, crew_member *m, uint8_t *raw, uint8_t *out) noexcept nogil
