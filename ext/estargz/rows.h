/* The structs that stages hand each other. */
#ifndef ESTARGZ_ROWS_H
#define ESTARGZ_ROWS_H

#include <stdint.h>
#include <stddef.h>

/* One tar entry as a header says it, with PAX and GNU extensions applied. Strings are not NUL-terminated; whoever fills
 * the struct owns them and keeps them alive until the next entry. */
typedef struct {
    const uint8_t *name;      /* verbatim: "./" and a directory's trailing "/" are kept */
    const uint8_t *link;      /* target of a hard or symbolic link */
    const uint8_t *user_name;
    const uint8_t *group_name;
    const uint8_t *xattrs;    /* packed, sorted by key bytes: uint32 key length, uint32 value length, key, value, ... */
    uint32_t name_len;
    uint32_t link_len;
    uint32_t user_name_len;
    uint32_t group_name_len;
    uint32_t xattrs_len;      /* bytes of the packed form */
    uint8_t type;             /* '0' regular, '1' hard link, '2' symlink, '3' char, '4' block, '5' directory, '6' fifo */
    int64_t mode;
    int64_t uid;
    int64_t gid;
    int64_t size;             /* payload bytes that follow; 0 unless type is '0' */
    int64_t mtime_s;          /* seconds, floor */
    int32_t mtime_ns;         /* 0..999999999 */
    int64_t dev_major;
    int64_t dev_minor;
} tar_entry;

/* One entry of the table of contents; 152 bytes, followed in the layer's string arena by its strings.
 * strings_at points at name, link, user name, group name, packed xattrs, back to back. */
typedef struct {
    int64_t strings_at;
    uint32_t name_len;
    uint32_t link_len;
    uint32_t user_name_len;   /* 0 when the name is the last one given for its id: the table does not repeat it */
    uint32_t group_name_len;
    uint32_t xattrs_len;
    uint32_t chunk_count;     /* 0 no payload, 1 the whole file is one chunk (digest serves both), else rows in the table */
    int64_t first_chunk;      /* index of the first row in the chunk table; meaningful when chunk_count > 1 */
    int64_t mode;
    int64_t uid;
    int64_t gid;
    int64_t size;
    int64_t mtime_s;          /* rounded to the nearest second, halves up; meaningful when has_mtime */
    int64_t offset;           /* of the member holding the first payload byte; 0 without payload */
    int64_t inner_offset;     /* uncompressed bytes of that member before the payload; 0 = omit */
    int64_t dev_major;
    int64_t dev_minor;
    uint8_t digest[32];       /* SHA-256 of the whole payload */
    uint8_t type;
    uint8_t has_digest;
    uint8_t has_mtime;        /* 0: the table omits the time, as it does for 1970-01-01T00:00:00 */
    uint8_t reserved[5];
} toc_row;

/* One chunk of a file that has more than one. */
typedef struct {
    int64_t offset;
    int64_t inner_offset;
    int64_t chunk_offset;
    int64_t chunk_size;
    uint8_t digest[32];
} chunk_row;

/* What went wrong, where. */
typedef struct {
    int32_t code;             /* enum est_status */
    int32_t sys_errno;
    int64_t offset;           /* byte offset in the input (tar) or file; -1 unknown */
    uint32_t name_len;
    char name[4096];          /* entry name or path, cut to fit */
} est_failure;

#endif
