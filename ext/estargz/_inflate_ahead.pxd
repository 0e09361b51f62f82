# Inflating ahead of the reader, for kernels that take blocks without a copy.
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t

from estargz._crew cimport crew
from estargz._inflate cimport decoder
from estargz.pthread cimport pthread_cond_t, pthread_mutex_t, pthread_t

# Some of the output, in order within its lane.
ctypedef struct block:
    uint8_t *data
    size_t size
    int64_t offset          # compressed bytes in front of what is not in it
    int64_t members         # of the lane that had ended by then
    block *next

cdef enum lane_state:
    LANE_FREE               # all but its buffers is void
    LANE_IDLE               # a thread may take it up when it has what it wants
    LANE_BUSY               # a thread has it
    LANE_ENDED              # nothing more comes: the input's end, an error, or the next of the chain begins here

cdef enum lane_want:
    WANT_NOTHING
    WANT_BLOCK
    WANT_INPUT
    WANT_CHAIN              # is through with its segment, and goes on only if it turns out to be right

# Inflates members from one place of the input on. What is not marked belongs to the thread that has the lane, if any.
ctypedef struct lane:
    decoder d
    bint opened
    uint8_t *input          # HISTORY bytes and a window; unused for memory
    int64_t begin           # locked: where its first member begins, -1 while it looks for one
    int64_t look_at         # where it looks for one, up to
    int64_t look_end        # the end of its segment
    int64_t fetched         # up to where input was given to the decoder
    int64_t seen_members
    block *out              # being filled
    # all of these: locked
    int state
    int want
    bint chained            # known to begin where a member does
    bint dropped            # while a thread has it: nobody wants it any more
    int64_t border          # where its last complete member ended
    block *first            # filled, in order
    block *last
    int64_t held            # of them, and out
    int status              # EST_OK or why it ended
    int sys_errno
    int64_t ended_at
    lane *next              # of the chain

ctypedef struct ahead:
    pthread_mutex_t lock
    pthread_cond_t work     # threads wait here
    pthread_cond_t news     # the reader waits here
    bint ready, cancelled
    crew *crew              # whose seats the threads need to inflate; NULL: none
    int kind
    bint strict
    # the input
    int fd                  # -1: memory or the ring
    const uint8_t *data     # memory
    int64_t begin, end      # of fd or memory
    uint8_t *ring           # what was read of an object, byte i of the input at i % ring_size
    int64_t ring_size, ring_begin, ring_end
    bint ring_closed        # the object has no more
    const int64_t *hints    # places of fd or memory where members begin, or not
    size_t hint_count
    # the lanes
    lane *lanes
    int lane_count
    bint guesses
    int64_t quota           # blocks that a lane may hold before it is of the chain
    lane *head              # the chain: what is read from ...
    lane *tail              # ... and what is made now
    int64_t reached         # how far the chain has come, in whole blocks,
    int64_t border          # and where its last member ended
    int64_t segment
    int64_t next_segment    # number of the one to guess in
    # the blocks
    block *blocks
    int64_t block_count, used_blocks
    block *free_blocks

cdef class InflateAhead:
    cdef ahead a
    cdef pthread_t *threads
    cdef int thread_count, started
    cdef int process                # that has the threads: a fork has not
    cdef readonly str name
    cdef object pull, read_raw      # of an object
    cdef object window              # of the ring
    cdef object source_error        # what the object raised, until the output in front of it is given out
    cdef Py_buffer view, hint_view
    cdef bint held, hint_held, busy, closing
    cdef block *current             # given out last,
    cdef size_t current_at          # and read up to here
    cdef int64_t taken, ended_members, base_members

    # The next bytes of the output, valid until the next call: 1, or 0 at the end. Raises what InflateReader would.
    cdef int next_block(self, const uint8_t **data, size_t *size) except -1
    cdef Py_ssize_t copy_out(self, uint8_t *out, Py_ssize_t room) except -1
    cdef int rest(self, const uint8_t **data, size_t *size) except -1
    cdef void give_out(self, lane *l) noexcept nogil
    cdef int end_of(self, lane *l) except -1
    cdef int wait(self) except -1
    cdef int fill_ring(self) except -1
    cdef int64_t pull_some(self, int64_t at, int64_t room) except -1
    cdef int start(self) except -1
    cdef void stop(self) noexcept
