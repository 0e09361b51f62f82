# The order of a layer: entries and payloads in, batches of whole members out to the pipeline.
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from estargz._memory cimport buffer, byte_map
from estargz._pipeline cimport Pipeline, batch
from estargz._rows cimport est_failure, tar_entry
from estargz._tar cimport tar_parser

# What a walk knows of a regular file whose payload workers will read.
ctypedef struct source_file:
    int root
    const char *path        # relative to root
    size_t path_size
    uint64_t device
    uint64_t inode
    int64_t size
    int64_t mtime_s
    int64_t mtime_ns

cdef class LayerBuilder:
    cdef Pipeline pipeline
    cdef bint indexed               # an eStargz layer, with a table of contents
    cdef bint keep_rows
    cdef int64_t chunk_size
    cdef size_t member_minimum      # a member is not closed at a chunk before it holds so many bytes
    cdef size_t member_maximum

    cdef batch *current
    cdef size_t member_at           # where the open member begins in the batch
    cdef bint has_payload           # some chunk has been given room
    cdef size_t run                 # bytes of the open member since its last payload
    cdef int64_t row_count
    cdef int64_t table_size         # bytes of rows and their strings
    cdef byte_map last_names        # id -> position in names
    cdef buffer names
    cdef est_failure failure        # the producer's own
    cdef bint pieces_begun
    cdef bint in_use
    cdef public str input_name
    cdef int64_t landmark_row       # of the landmark that ends the prefetch range; -1: none
    cdef int take(self) except -1
    cdef void leave(self) noexcept
    cdef void part(self) noexcept

    # the tar parser's state between two pieces of input
    cdef tar_parser parser
    cdef bint parser_ready
    cdef int expecting
    cdef uint8_t *target            # where the next input bytes go
    cdef size_t target_size
    cdef size_t target_filled
    cdef int64_t payload_left
    cdef int64_t chunk_offset
    cdef int zero_blocks
    cdef bint stops_at_toc
    cdef readonly bint toc_seen
    cdef readonly int64_t toc_left      # bytes of the input's own table that are still to come
    cdef int64_t input_offset       # bytes of input taken, up to `target`
    cdef int64_t archive_end        # where the first zero block stands; -1: none came
    cdef int64_t hidden_at          # where the first block that is not zero stands behind the archive's end; -1: none

    # Each answers EST_OK or a code; the failure is then kept and raised by finish or raise_failure.
    cdef int add_entry(self, const tar_entry *entry) noexcept nogil
    cdef int add_payload_file(self, const source_file *file) noexcept nogil
    cdef int add_payload_bytes(self, const uint8_t *data, size_t size) noexcept nogil
    cdef int end_archive(self) noexcept nogil
    cdef bint attend(self) noexcept nogil
    cdef void begin_turn(self) noexcept nogil
    cdef void end_turn(self) noexcept nogil
    cdef int set_failure(self, int code, int sys_errno, int64_t offset, const void *name, size_t size) noexcept nogil

    cdef uint8_t *header_space(self, size_t size) noexcept nogil
    cdef uint8_t *chunk_space(self, int64_t chunk_offset, size_t size, int64_t file_size) noexcept nogil
    cdef int end_payload(self, int64_t size) noexcept nogil
    cdef void close_member(self) noexcept nogil
    cdef void close_stream(self) noexcept nogil
    cdef void add_member(self) noexcept nogil
    cdef int new_member(self, size_t room) noexcept nogil
    cdef int add_row(self, const tar_entry *entry) noexcept nogil
    cdef int keep_name(self, uint8_t kind, int64_t identity, const uint8_t *name, uint32_t size) noexcept nogil

    cdef int feed_from(self, int fd, int64_t at, int64_t size) noexcept nogil
    cdef bint wait_readable(self, int fd) noexcept nogil
    cdef int pause_feed(self) noexcept nogil
    cdef int feed_bytes(self, const uint8_t *data, size_t size) noexcept nogil
    cdef int target_full(self) noexcept nogil
    cdef int expect(self, int what, size_t size) noexcept nogil
    cdef int expect_at(self, int what, uint8_t *space, size_t size) noexcept nogil
    cdef int expect_chunk(self) noexcept nogil
    cdef int take_block(self) noexcept nogil
    cdef int take_toc(self) noexcept nogil
    cdef int input_failed(self, int code) noexcept nogil
    cdef int end_tar(self) noexcept nogil

    cdef int write_toc(self) noexcept nogil
    cdef int64_t toc_size(self, buffer *text) noexcept nogil
    cdef int append_piece(self, const uint8_t *data, size_t size, bint digested) noexcept nogil
    cdef int submit_piece(self, bint last) noexcept nogil
