# Extern declarations of ISA-L >= 2.30 (https://github.com/intel/isa-l): deflate and the gzip checksum.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "isa-l.h" nogil:
    enum: IGZIP_DEFLATE, IGZIP_GZIP, NO_FLUSH, SYNC_FLUSH, COMP_OK
    enum: ISAL_DEF_LVL1_LARGE, ISAL_DEF_LVL2_LARGE, ISAL_DEF_LVL3_LARGE
    enum: ISAL_MAJOR_VERSION, ISAL_MINOR_VERSION, ISAL_PATCH_VERSION
    struct isal_zstream:
        uint8_t *next_in
        uint32_t avail_in
        uint8_t *next_out
        uint32_t avail_out
        uint32_t total_out
        uint32_t level
        uint32_t level_buf_size
        uint8_t *level_buf
        uint16_t end_of_stream
        uint16_t flush
        uint16_t gzip_flag
    # Reset everything but level, level buffer and flags are set after it.
    void isal_deflate_init(isal_zstream *stream)
    int isal_deflate(isal_zstream *stream)
    uint32_t crc32_gzip_refl(uint32_t initial, const unsigned char *data, uint64_t size)
