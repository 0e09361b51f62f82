# The table of contents of one layer while it is written: rows in stream order, and its JSON.
from libc.stdint cimport int64_t, uint8_t, uint32_t

from estargz._memory cimport buffer
from estargz._rows cimport chunk_row, tar_entry, toc_row

ctypedef struct toc_table:
    buffer rows         # toc_row
    buffer chunks       # chunk_row
    buffer strings

cdef void toc_free(toc_table *table) noexcept nogil

# An entry's row without payload facts; its strings go behind `strings`. EST_OK or EST_NO_MEMORY.
# keep_user and keep_group say whether the names are written (a name already given for its id is not repeated).
cdef int toc_row_from_entry(const tar_entry *entry, bint keep_user, bint keep_group, toc_row *row,
                            buffer *strings) noexcept nogil

# Appends text to `out`: the opening of the document, row number `index` with its chunks, the closing.
# `chunk_size` is the configured one: chunks of that size state it. EST_OK or EST_NO_MEMORY.
cdef int toc_open(toc_table *table, buffer *out) noexcept nogil
cdef int toc_entry(toc_table *table, int64_t index, int64_t chunk_size, buffer *out) noexcept nogil
cdef int toc_close(toc_table *table, buffer *out) noexcept nogil
