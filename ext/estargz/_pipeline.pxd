# The parallel middle of the build: batches of the tar stream in, members out in order (docs/architecture.md).
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from estargz._codec cimport compressor
from estargz._crew cimport crew, crew_member
from estargz._files cimport directory_cache
from estargz._memory cimport buffer
from estargz._rows cimport est_failure
from estargz._sha256 cimport sha256_stream
from estargz._toc cimport toc_table
from estargz.pthread cimport pthread_cond_t, pthread_mutex_t

# Payload bytes that a worker still has to read from a source tree.
ctypedef struct file_fill:
    size_t raw_at           # where in the batch
    size_t size
    int64_t file_offset
    int64_t path_at         # in the batch's paths, relative to root
    uint32_t path_size
    int root                # handle of the tree
    uint64_t device         # what the file was when it was listed
    uint64_t inode
    int64_t file_size
    int64_t mtime_s
    int64_t mtime_ns

# One member: raw[raw_at:raw_end] becomes out[previous out_end:out_end].
ctypedef struct member_span:
    size_t raw_at
    size_t raw_end
    size_t out_end

# One chunk of a file's payload, with the row of the table of contents it belongs to.
ctypedef struct chunk_span:
    size_t raw_at
    size_t size
    int64_t member          # index in the batch
    int64_t row             # number of the entry in the layer
    int64_t chunk_offset
    bint only               # the whole file
    bint last
    uint8_t digest[32]

cdef enum batch_kind:
    BATCH_MEMBERS           # whole members
    BATCH_PIECE             # a piece of one long member (the table of contents)

cdef enum batch_state:
    STATE_FREE
    STATE_FILLING
    STATE_READY
    STATE_WORKING
    STATE_DONE
    STATE_ORDERED

# A contiguous slice of the uncompressed stream with everything a worker and the sink need to know of it. Owned by the
# producer until submit, by one worker until it is done, by whoever puts it in order, and by whoever writes it.
ctypedef struct batch:
    int64_t number
    int kind
    int state
    uint8_t *raw
    size_t raw_size
    uint8_t *out
    size_t out_size
    buffer members          # member_span
    buffer chunks           # chunk_span
    buffer fills            # file_fill
    buffer paths
    buffer rows             # toc_row, strings_at counted from this batch's strings
    buffer strings
    bint first_piece
    bint last_piece
    size_t digest_from      # part of raw that the digest of a piece covers
    size_t digest_end
    bint tar_hashed         # raw is already part of the stream's hash
    est_failure failure

# What a thread's time goes to; STAGE_NAMES has the same order.
cdef enum stage:
    STAGE_SOURCE            # the producer: walking, headers, taking in a tar stream
    STAGE_TOC               # the producer again: the text of the table of contents
    STAGE_READ              # files of a tree
    STAGE_HASH              # chunk digests, and the stream's hash where it can be taken along
    STAGE_COMPRESS
    STAGE_ORDER             # in order: the stream's hash where it was not taken along, the blob's, the table's rows
    STAGE_WRITE
    STAGE_WAIT
    STAGE_COUNT

# What a measurement may leave out; the names are those of PARTS.
cdef enum part:
    PART_READ = 1
    PART_CHUNK_HASH = 2
    PART_STREAM_HASH = 4
    PART_COMPRESS = 8
    PART_BLOB_HASH = 16
    PART_WRITE = 32

# What one thread keeps from batch to batch.
ctypedef struct worker:
    compressor state            # of a build without a crew
    bint opened
    bint seated                 # has one of the crew's seats,
    int64_t turn_ends_ns        # which it keeps so long
    directory_cache directory
    int64_t since_ns            # up to when its time is accounted for
    int64_t spent_ns[STAGE_COUNT]

# Fills a failure in; the name is cut to fit.
cdef void set_failure(est_failure *failure, int code, int sys_errno, int64_t offset, const void *name,
                      size_t name_size) noexcept nogil

cdef class Pipeline:
    cdef pthread_mutex_t lock
    cdef pthread_cond_t work_or_end      # workers wait here
    cdef pthread_cond_t progress_made    # the producer waits here
    cdef bint locks_ready

    cdef int codec, level, parts
    cdef readonly int threads
    cdef bint producer_helps
    cdef bint keep_rows
    cdef readonly size_t raw_capacity
    cdef size_t out_capacity

    cdef int process                     # that began it

    cdef crew *crew                      # NULL: none
    cdef crew_member member              # of it
    cdef bint closed

    cdef batch *slots
    cdef batch **ring
    cdef readonly int64_t slot_count
    cdef int64_t produced, taken, ordered, written
    cdef bint ordering, writing, ended, cancelled
    cdef est_failure failure             # code 0: none so far
    cdef int64_t failed_batch

    cdef worker *workers
    cdef int worker_count
    cdef int producing                   # the stage that the producer's own time goes to
    cdef int running                     # workers that have begun and have not ended
    cdef object interrupt                # exception raised by a signal handler or the progress callback
    cdef object progress
    cdef int64_t progress_due_ns

    cdef int sink_fd                     # -1: none
    cdef bint sink_is_file, sink_is_socket
    cdef bint pipe_open                  # pipe_fd is the same pipe by a description of our own that never blocks
    cdef int pipe_fd
    cdef int64_t fd_written, fd_started  # bytes written to it, and of them those whose writeback was started
    cdef object sink_write               # or a callable
    cdef unsigned long sink_thread       # who is in it at the moment; 0: nobody
    cdef object sink_error
    cdef bytes output

    cdef sha256_stream tar_hash, blob_hash, file_hash, piece_hash
    cdef uint32_t piece_crc
    cdef int64_t piece_raw_size
    cdef readonly int64_t piece_offset   # blob offset of the first piece
    cdef int64_t tar_size                # of what is written: locked
    cdef int64_t blob_size               # the same, of whoever writes
    cdef int64_t placed_size             # of the blob as far as it is in order
    cdef int64_t tar_hash_next           # number of the batch that the stream's hash has come to
    cdef bint tar_hash_taken             # by a worker or the sink
    cdef uint8_t tar_digest[32]          # of the stream in front of the pieces
    cdef toc_table table

    cdef batch *acquire(self) noexcept nogil
    cdef void submit(self, batch *b) noexcept nogil
    cdef int drain(self) noexcept nogil
    cdef int write_out(self, const uint8_t *data, size_t size) noexcept nogil
    cdef void fail(self, const est_failure *failure, int64_t batch_number) noexcept nogil
    cdef void cancel(self) noexcept nogil
    cdef bint has_failed(self) noexcept nogil
    cdef void stop(self) noexcept nogil

    cdef void sit(self, worker *w) noexcept nogil
    cdef void stand(self, worker *w) noexcept nogil
    cdef void take_turn(self, worker *w) noexcept nogil
    cdef void begin_turn(self) noexcept nogil
    cdef void end_turn(self) noexcept nogil
    cdef void let_others(self) noexcept nogil
    cdef bint join(self) noexcept nogil
    cdef batch *free_slot(self) noexcept nogil
    cdef void free_memory(self, batch *b) noexcept nogil
    cdef void release(self) noexcept nogil
    cdef compressor *take_compressor(self, worker *w) noexcept nogil

    cdef bint step(self, worker *w) noexcept nogil
    cdef void work(self, batch *b, worker *w) noexcept nogil
    cdef int fill_files(self, batch *b, worker *w) noexcept nogil
    cdef bint take_tar_hash(self, batch *b) noexcept nogil
    cdef void return_tar_hash(self, batch *b) noexcept nogil
    cdef int hash_chunks(self, batch *b, bint with_tar) noexcept nogil
    cdef int compress(self, batch *b, compressor *state) noexcept nogil
    cdef int order(self, batch *b) noexcept nogil
    cdef int write_batch(self, batch *b) noexcept nogil
    cdef bint failed_before(self, int64_t number) noexcept nogil
    cdef void give_up(self, batch *b, int code) noexcept nogil
    cdef size_t blob_part(self, const batch *b) noexcept nogil
    cdef void hash_in_order(self, batch *b) noexcept nogil
    cdef int record(self, batch *b) noexcept nogil
    cdef int finish_pieces(self, batch *b) noexcept nogil
    cdef void describe_sink_failure(self, int code, est_failure *failure) noexcept nogil
    cdef int write_fd(self, const uint8_t *data, size_t size) noexcept nogil
    cdef int write_object(self, const uint8_t *data, size_t size) noexcept with gil
    cdef int start_threads(self) noexcept with gil
    cdef void work_to_the_end(self, worker *w) noexcept nogil
    cdef bint attend(self) noexcept nogil
    cdef bint listen(self) noexcept nogil
    cdef ssize_t write_some(self, const uint8_t *data, size_t size) noexcept nogil
    cdef int wait_writable(self) noexcept nogil
    cdef void close_pipe(self) noexcept nogil
    cdef bint no_signal(self) noexcept with gil
    cdef bint call_back(self) noexcept with gil
    cdef bint elsewhere(self) noexcept nogil
    cdef void wait_for_progress(self) noexcept nogil
