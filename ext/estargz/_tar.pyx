"""Tar headers: an emitter byte-identical to Go's archive/tar and an incremental, lossless-minded parser.

The kernels are described in _tar.pxd; emit() and parse() exist so that tests can reach them.
"""
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort, realloc
from libc.string cimport memchr, memcmp, memcpy, memmove, memset

from estargz._rows cimport (
    EST_DEVICE_NUMBER, EST_NAME_TOO_LONG, EST_NO_MEMORY, EST_OK, EST_TAR_CHECKSUM, EST_TAR_DANGLING_META,
    EST_TAR_LONE_ZERO, EST_TAR_META_SIZE, EST_TAR_NUMBER, EST_TAR_PAX, EST_TAR_SPARSE, EST_TAR_TRUNCATED, EST_TAR_TYPE,
    tar_entry,
)

from typing import NamedTuple

from estargz.errors import from_status

cdef enum:
    BLOCK = 512
    META_LIMIT = 1 << 20

# Where the fields of a header lie. The prefix field is 155 bytes in USTAR, 131 in Schily's format; GNU keeps two times
# in its place.
cdef enum:
    NAME_AT = 0
    NAME_SIZE = 100
    MODE_AT = 100
    UID_AT = 108
    GID_AT = 116
    NUMBER_SIZE = 8
    SIZE_AT = 124
    MTIME_AT = 136
    LONG_NUMBER_SIZE = 12
    CHECKSUM_AT = 148
    TYPE_AT = 156
    LINK_AT = 157
    MAGIC_AT = 257
    USER_NAME_AT = 265
    GROUP_NAME_AT = 297
    OWNER_NAME_SIZE = 32
    DEV_MAJOR_AT = 329
    DEV_MINOR_AT = 337
    PREFIX_AT = 345
    PREFIX_SIZE = 155
    STAR_PREFIX_SIZE = 131
    STAR_ATIME_AT = 476
    STAR_CTIME_AT = 488
    STAR_TRAILER_AT = 508
    GNU_ATIME_AT = 345
    GNU_CTIME_AT = 357

# PAX keys as bits: for the emitter the fields that do not fit a USTAR header, for the parser what a PAX header gave.
cdef enum:
    KEY_PATH = 1 << 0
    KEY_LINK_PATH = 1 << 1
    KEY_USER_NAME = 1 << 2
    KEY_GROUP_NAME = 1 << 3
    KEY_UID = 1 << 4
    KEY_GID = 1 << 5
    KEY_SIZE = 1 << 6
    KEY_MTIME = 1 << 7
    KEY_ATIME = 1 << 8
    KEY_CTIME = 1 << 9

# Seconds of 0001-01-01T00:00:00Z, which Go's time type takes for "no time".
cdef int64_t NO_TIME = -62135596800

cdef inline bint is_word(const uint8_t *text, size_t length, const char *word, size_t word_length) noexcept nogil:
    return length == word_length and memcmp(text, word, length) == 0


# ---------------------------------------------------------------------------------------------------------- emitter

cdef inline bint is_ascii(const uint8_t *text, uint32_t length) noexcept nogil:
    """Whether every byte is 1..127. Without an early exit, so that the compiler can use vectors."""
    cdef uint8_t high = 0
    cdef uint8_t nul = 0
    cdef uint32_t i
    for i in range(length):
        high |= text[i]
        nul |= text[i] == 0
    return high < 0x80 and not nul


cdef inline bint fits_octal(int64_t value, int width) noexcept nogil:
    return 0 <= value < (<int64_t>1 << (3 * (width - 1)))


cdef inline bint is_no_time(const tar_entry *entry) noexcept nogil:
    return entry.mtime_s == NO_TIME and entry.mtime_ns == 0


cdef inline void write_octal(uint8_t *field, int width, int64_t value) noexcept nogil:
    """Zero-padded digits and a NUL; a value that does not fit becomes 0, a PAX record then holds it."""
    cdef int at = width - 2
    cdef uint64_t rest = <uint64_t>value if fits_octal(value, width) else 0
    field[width - 1] = 0
    while at >= 0:
        field[at] = c'0' + <uint8_t>(rest & 7)
        rest >>= 3
        at -= 1


cdef void end_before_slashes(uint8_t *field, uint32_t width) noexcept nogil:
    """A cut name must not look like a directory's: put a NUL over the first of the slashes at the field's end."""
    cdef uint32_t at = width - 1
    if field[at] != c'/':
        return
    while at > 0 and field[at - 1] == c'/':
        at -= 1
    field[at] = 0


cdef void write_filtered(uint8_t *field, uint32_t width, const uint8_t *text, uint32_t length) noexcept nogil:
    """The ASCII bytes of a text, as many as fit; the field was zeroed before."""
    cdef uint32_t kept = 0
    cdef uint32_t i
    for i in range(length):
        if text[i] == 0 or text[i] >= 0x80:
            continue
        if kept == width:
            end_before_slashes(field, width)
            return
        field[kept] = text[i]
        kept += 1


cdef inline void write_text(
    uint8_t *field, uint32_t width, const uint8_t *text, uint32_t length, bint fits
) noexcept nogil:
    if not fits:
        write_filtered(field, width, text, length)
    elif length:
        memcpy(field, text, length)


cdef inline void seal(uint8_t *block) noexcept nogil:
    """Magic, version and checksum: the last things a header gets."""
    cdef uint32_t total = 0
    cdef int i
    memcpy(block + MAGIC_AT, <const char *>b"ustar\x0000", 8)
    memset(block + CHECKSUM_AT, c' ', 8)
    for i in range(BLOCK):
        total += block[i]
    write_octal(block + CHECKSUM_AT, 7, total)


cdef void write_main_header(
    uint8_t *block, const tar_entry *entry, uint32_t needs, uint32_t name_at
) noexcept nogil:
    """The header of the entry itself, name[name_at:] in the name field; `needs` says which fields do not fit."""
    memset(block, 0, BLOCK)
    write_text(block + NAME_AT, NAME_SIZE, entry.name + name_at, entry.name_len - name_at, not needs & KEY_PATH)
    write_octal(block + MODE_AT, NUMBER_SIZE, entry.mode)
    write_octal(block + UID_AT, NUMBER_SIZE, entry.uid)
    write_octal(block + GID_AT, NUMBER_SIZE, entry.gid)
    write_octal(block + SIZE_AT, LONG_NUMBER_SIZE, entry.size)
    write_octal(block + MTIME_AT, LONG_NUMBER_SIZE, entry.mtime_s)
    block[TYPE_AT] = entry.type
    write_text(block + LINK_AT, NAME_SIZE, entry.link, entry.link_len, not needs & KEY_LINK_PATH)
    write_text(block + USER_NAME_AT, OWNER_NAME_SIZE, entry.user_name, entry.user_name_len, not needs & KEY_USER_NAME)
    write_text(
        block + GROUP_NAME_AT, OWNER_NAME_SIZE, entry.group_name, entry.group_name_len, not needs & KEY_GROUP_NAME
    )
    write_octal(block + DEV_MAJOR_AT, NUMBER_SIZE, entry.dev_major)
    write_octal(block + DEV_MINOR_AT, NUMBER_SIZE, entry.dev_minor)


cdef uint32_t ustar_split(const uint8_t *name, uint32_t length) noexcept nogil:
    """Index of the slash between USTAR's prefix and name fields for an ASCII name of over 100 bytes; 0 if none does."""
    cdef uint32_t slash = length
    if length > PREFIX_SIZE + 1:
        slash = PREFIX_SIZE + 1
    elif name[length - 1] == c'/':
        slash -= 1
    while slash > 0 and name[slash - 1] != c'/':
        slash -= 1
    if slash <= 1 or length - slash > NAME_SIZE or slash == length:
        return 0
    return slash - 1


cdef inline bint fits_text(const uint8_t *text, uint32_t length, uint32_t width) noexcept nogil:
    return length <= width and is_ascii(text, length)


cdef inline uint32_t misfits(const tar_entry *entry) noexcept nogil:
    """The fields that a USTAR header cannot hold as they are, a long name that could be split among them."""
    cdef uint32_t needs = 0
    if not fits_text(entry.name, entry.name_len, NAME_SIZE):
        needs |= KEY_PATH
    if not fits_text(entry.link, entry.link_len, NAME_SIZE):
        needs |= KEY_LINK_PATH
    if not fits_text(entry.user_name, entry.user_name_len, OWNER_NAME_SIZE):
        needs |= KEY_USER_NAME
    if not fits_text(entry.group_name, entry.group_name_len, OWNER_NAME_SIZE):
        needs |= KEY_GROUP_NAME
    if not fits_octal(entry.uid, NUMBER_SIZE):
        needs |= KEY_UID
    if not fits_octal(entry.gid, NUMBER_SIZE):
        needs |= KEY_GID
    if not fits_octal(entry.size, LONG_NUMBER_SIZE):
        needs |= KEY_SIZE
    if (not fits_octal(entry.mtime_s, LONG_NUMBER_SIZE) or entry.mtime_ns != 0) and not is_no_time(entry):
        needs |= KEY_MTIME
    return needs


cdef int decimal(uint8_t *out, uint64_t value) noexcept nogil:
    """Digits without leading zeros, at most 20; answers how many."""
    cdef uint8_t digits[20]
    cdef int count = 0
    cdef int i
    while True:
        digits[count] = c'0' + <uint8_t>(value % 10)
        count += 1
        value //= 10
        if value == 0:
            break
    for i in range(count):
        out[i] = digits[count - 1 - i]
    return count


cdef int signed_decimal(uint8_t *out, int64_t value) noexcept nogil:
    """As decimal(), at most 20 bytes with the sign."""
    if value >= 0:
        return decimal(out, <uint64_t>value)
    out[0] = c'-'
    return 1 + decimal(out + 1, -<uint64_t>value)


cdef int decimal_time(uint8_t *out, int64_t seconds, int32_t nanoseconds) noexcept nogil:
    """Seconds with as many decimals as needed, at most 32 bytes. Go rounds nothing, so neither does this."""
    cdef int count = 0
    cdef int i
    if nanoseconds == 0:
        return signed_decimal(out, seconds)
    if seconds < 0:
        # The fraction counts away from zero in text, upwards in the struct.
        out[0] = c'-'
        count = 1
        seconds = -(seconds + 1)
        nanoseconds = 1000000000 - nanoseconds
    count += decimal(out + count, <uint64_t>seconds)
    out[count] = c'.'
    for i in range(9, 0, -1):
        out[count + i] = c'0' + <uint8_t>(nanoseconds % 10)
        nanoseconds //= 10
    count += 10
    while out[count - 1] == c'0':
        count -= 1
    return count


cdef size_t record_length(size_t content) noexcept nogil:
    """Bytes of a record whose key and value have `content` bytes: the length it states counts its own digits."""
    cdef uint8_t digits[20]
    cdef size_t bare = content + 3
    cdef size_t length = bare + decimal(digits, bare)
    return bare + decimal(digits, length)


cdef size_t put_record(
    uint8_t *out, const char *prefix, size_t prefix_length,
    const uint8_t *key, size_t key_length, const uint8_t *value, size_t value_length,
) noexcept nogil:
    """One PAX record with the key `prefix + key`. Answers its length; writes nothing if out is NULL."""
    cdef size_t length = record_length(prefix_length + key_length + value_length)
    if out == NULL:
        return length
    out += decimal(out, length)
    out[0] = c' '
    memcpy(out + 1, prefix, prefix_length)
    out += 1 + prefix_length
    if key_length:
        memcpy(out, key, key_length)
    out[key_length] = c'='
    out += key_length + 1
    if value_length:
        memcpy(out, value, value_length)
    out[value_length] = c'\n'
    return length


cdef size_t put_named(
    uint8_t *out, const char *key, size_t key_length, const uint8_t *value, size_t length
) noexcept nogil:
    return put_record(out, key, key_length, NULL, 0, value, length)


cdef size_t put_number(uint8_t *out, const char *key, size_t key_length, int64_t value) noexcept nogil:
    cdef uint8_t digits[24]
    return put_named(out, key, key_length, digits, signed_decimal(digits, value))


cdef size_t put_mtime(uint8_t *out, const tar_entry *entry) noexcept nogil:
    cdef uint8_t digits[40]
    return put_named(out, "mtime", 5, digits, decimal_time(digits, entry.mtime_s, entry.mtime_ns))


cdef size_t packed_xattr(const tar_entry *entry, size_t at, tar_xattr *xattr) noexcept nogil:
    """Read the packed attribute at an offset. Answers the next one's offset, 0 at the end or if it is cut short."""
    cdef uint32_t lengths[2]
    memset(xattr, 0, sizeof(xattr[0]))
    if at + 8 > entry.xattrs_len:
        return 0
    memcpy(lengths, entry.xattrs + at, 8)
    xattr.key_length = lengths[0]
    xattr.value_length = lengths[1]
    xattr.key = entry.xattrs + at + 8
    xattr.value = xattr.key + xattr.key_length
    at += 8 + <size_t>xattr.key_length + xattr.value_length
    return at if at <= entry.xattrs_len else 0


cdef inline uint8_t *after(uint8_t *out, size_t length) noexcept nogil:
    return NULL if out == NULL else out + length


cdef size_t put_xattrs(uint8_t *out, const tar_entry *entry) noexcept nogil:
    cdef tar_xattr xattr
    cdef size_t total = 0
    cdef size_t at = packed_xattr(entry, 0, &xattr)
    while at:
        total += put_record(
            after(out, total), "SCHILY.xattr.", 13, xattr.key, xattr.key_length, xattr.value, xattr.value_length
        )
        at = packed_xattr(entry, at, &xattr)
    return total


cdef size_t put_records(uint8_t *out, const tar_entry *entry, uint32_t needs) noexcept nogil:
    """All PAX records, sorted by key. Answers their total length; writes nothing if out is NULL."""
    cdef size_t total = put_xattrs(out, entry)
    if needs & KEY_GID:
        total += put_number(after(out, total), "gid", 3, entry.gid)
    if needs & KEY_GROUP_NAME:
        total += put_named(after(out, total), "gname", 5, entry.group_name, entry.group_name_len)
    if needs & KEY_LINK_PATH:
        total += put_named(after(out, total), "linkpath", 8, entry.link, entry.link_len)
    if needs & KEY_MTIME:
        total += put_mtime(after(out, total), entry)
    if needs & KEY_PATH:
        total += put_named(after(out, total), "path", 4, entry.name, entry.name_len)
    if needs & KEY_SIZE:
        total += put_number(after(out, total), "size", 4, entry.size)
    if needs & KEY_UID:
        total += put_number(after(out, total), "uid", 3, entry.uid)
    if needs & KEY_USER_NAME:
        total += put_named(after(out, total), "uname", 5, entry.user_name, entry.user_name_len)
    return total


cdef size_t step_back(const uint8_t *path, size_t length, size_t floor) noexcept nogil:
    """The length of a path without its last segment, never below floor."""
    while length > floor and path[length - 1] != c'/':
        length -= 1
    return length - 1 if length > floor else floor


cdef size_t clean_path(uint8_t *path, size_t length) noexcept nogil:
    """The lexically shortest form of a non-empty path, in place: no '.', no empty segment, '..' resolved."""
    cdef size_t root = 1 if path[0] == c'/' else 0
    cdef size_t floor = root
    cdef size_t kept = root
    cdef size_t start = root
    cdef size_t end, size
    while start < length:
        end = start
        while end < length and path[end] != c'/':
            end += 1
        size = end - start
        if size == 2 and path[start] == c'.' and path[start + 1] == c'.' and (kept > floor or root):
            kept = step_back(path, kept, floor)
        elif size and not (size == 1 and path[start] == c'.'):
            if kept > root:
                path[kept] = c'/'
                kept += 1
            memmove(path + kept, path + start, size)
            kept += size
            if size == 2 and path[kept - 2] == c'.' and path[kept - 1] == c'.':
                floor = kept
        start = end + 1
    if kept == 0:
        path[0] = c'.'
        kept = 1
    return kept


cdef size_t meta_path(uint8_t *scratch, const tar_entry *entry) noexcept nogil:
    """The cleaned name of an entry's PAX header, in scratch of at least name_len + 13 bytes. Answers its length."""
    cdef size_t base = entry.name_len
    cdef size_t length
    while base > 0 and entry.name[base - 1] != c'/':
        base -= 1
    memcpy(scratch, entry.name, base)
    memcpy(scratch + base, <const char *>b"PaxHeaders.0", 12)
    length = base + 12
    if base < entry.name_len:
        scratch[length] = c'/'
        memcpy(scratch + length + 1, entry.name + base, entry.name_len - base)
        length += 1 + entry.name_len - base
    return clean_path(scratch, length)


cdef void write_meta_header(uint8_t *block, const uint8_t *name, uint32_t length, size_t size) noexcept nogil:
    """The header of a PAX header. Go leaves owner names and device numbers as NUL here."""
    cdef int end = NAME_SIZE
    memset(block, 0, BLOCK)
    write_filtered(block, NAME_SIZE, name, length)
    while end > 0 and (block[end - 1] == c'/' or block[end - 1] == 0):
        end -= 1
        block[end] = 0
    write_octal(block + MODE_AT, NUMBER_SIZE, 0)
    write_octal(block + UID_AT, NUMBER_SIZE, 0)
    write_octal(block + GID_AT, NUMBER_SIZE, 0)
    write_octal(block + SIZE_AT, LONG_NUMBER_SIZE, <int64_t>size)
    write_octal(block + MTIME_AT, LONG_NUMBER_SIZE, 0)
    block[TYPE_AT] = c'x'
    seal(block)


cdef inline bint has_byte(const uint8_t *text, size_t length, int byte) noexcept nogil:
    return length != 0 and memchr(text, byte, length) != NULL


cdef bint records_valid(const tar_entry *entry, uint32_t needs) noexcept nogil:
    """A name with NUL was found unfit for USTAR, so only what goes into records needs a look."""
    cdef tar_xattr xattr
    cdef size_t at = packed_xattr(entry, 0, &xattr)
    while at:
        if has_byte(xattr.key, xattr.key_length, 0) or has_byte(xattr.key, xattr.key_length, c'='):
            return False
        at = packed_xattr(entry, at, &xattr)
    return not (
        needs & KEY_PATH and has_byte(entry.name, entry.name_len, 0)
        or needs & KEY_LINK_PATH and has_byte(entry.link, entry.link_len, 0)
        or needs & KEY_USER_NAME and has_byte(entry.user_name, entry.user_name_len, 0)
        or needs & KEY_GROUP_NAME and has_byte(entry.group_name, entry.group_name_len, 0)
    )


cdef inline size_t padded(size_t size) noexcept nogil:
    return (size + BLOCK - 1) & ~<size_t>(BLOCK - 1)


cdef ssize_t emit_pax(const tar_entry *entry, uint32_t needs, uint8_t *out, size_t capacity) noexcept nogil:
    cdef size_t size = put_records(NULL, entry, needs)
    cdef size_t total = BLOCK + padded(size) + BLOCK
    cdef size_t name_length
    if not records_valid(entry, needs):
        return EST_TAR_PAX
    if size > META_LIMIT or total > capacity:
        return EST_NAME_TOO_LONG
    # The name is cleaned where the records and the main header will be. It fits: a name over 100 bytes has a record.
    name_length = meta_path(out + BLOCK, entry)
    write_meta_header(out, out + BLOCK, <uint32_t>name_length, size)
    put_records(out + BLOCK, entry, needs)
    memset(out + BLOCK + size, 0, padded(size) - size)
    write_main_header(out + total - BLOCK, entry, needs, 0)
    seal(out + total - BLOCK)
    return <ssize_t>total


cdef ssize_t emit_ustar(const tar_entry *entry, uint32_t split, uint8_t *out, size_t capacity) noexcept nogil:
    """One block; the name is divided at the slash at index `split` unless that is 0."""
    if capacity < BLOCK:
        return EST_NAME_TOO_LONG
    write_main_header(out, entry, 0, split + 1 if split else 0)
    memcpy(out + PREFIX_AT, entry.name, split)
    seal(out)
    return BLOCK


cdef inline int refusal(const tar_entry *entry) noexcept nogil:
    """What neither form of header can say."""
    if entry.type < c'0' or entry.type > c'6':
        return EST_TAR_TYPE
    if entry.name_len and entry.name[entry.name_len - 1] == c'/' and entry.type in (c'0', c'3', c'4', c'6'):
        return EST_TAR_TYPE
    if not fits_octal(entry.mode, NUMBER_SIZE) or (entry.type == c'0' and entry.size < 0):
        return EST_TAR_NUMBER
    if not fits_octal(entry.dev_major, NUMBER_SIZE) or not fits_octal(entry.dev_minor, NUMBER_SIZE):
        return EST_DEVICE_NUMBER
    return EST_OK


cdef ssize_t tar_emit(const tar_entry *entry, uint8_t *out, size_t capacity) noexcept nogil:
    cdef int refused = refusal(entry)
    cdef uint32_t needs = misfits(entry)
    cdef uint32_t split
    if refused:
        return refused
    if entry.xattrs_len == 0 and needs == 0:
        return emit_ustar(entry, 0, out, capacity)
    if entry.xattrs_len == 0 and needs == KEY_PATH and is_ascii(entry.name, entry.name_len):
        split = ustar_split(entry.name, entry.name_len)
        if split:
            return emit_ustar(entry, split, out, capacity)
    return emit_pax(entry, needs, out, capacity)


cdef size_t tar_emit_bound(const tar_entry *entry) noexcept nogil:
    # Per record at most 21 bytes beside its value, 41 for a number; eight fields make less than 320. A packed attribute
    # of 8 + n bytes becomes a record of at most 23 + n, so three times the packed size is enough.
    cdef size_t records = (
        320 + <size_t>entry.name_len + entry.link_len + entry.user_name_len + entry.group_name_len
        + 3 * <size_t>entry.xattrs_len
    )
    return BLOCK + padded(records) + BLOCK


# ----------------------------------------------------------------------------------------------------------- parser

cdef inline bint is_blank(uint8_t byte) noexcept nogil:
    return byte == 0 or byte == c' '


cdef inline bint read_octal(const uint8_t *field, int width, int64_t *value) noexcept nogil:
    """Octal digits between any spaces and NULs; digits end at a NUL; none at all is 0. False if it is no number."""
    cdef int at = 0
    cdef int end = width
    cdef int64_t number = 0
    while end > 0 and is_blank(field[end - 1]):
        end -= 1
    while at < end and is_blank(field[at]):
        at += 1
    while at < end and field[at] != 0:
        if field[at] < c'0' or field[at] > c'7':
            return False
        number = (number << 3) | (field[at] - c'0')
        at += 1
    value[0] = number
    return True


cdef bint read_base256(const uint8_t *field, int width, int64_t *value) noexcept nogil:
    """Big-endian two's complement below a marker bit. False if it does not fit 64 bits."""
    cdef uint8_t invert = 0xFF if field[0] & 0x40 else 0
    cdef uint64_t number = (field[0] ^ invert) & 0x7F
    cdef int i
    for i in range(1, width):
        if number >> 56:
            return False
        number = (number << 8) | <uint8_t>(field[i] ^ invert)
    if number >> 63:
        return False
    value[0] = ~<int64_t>number if invert else <int64_t>number
    return True


cdef inline bint read_number(const uint8_t *field, int width, int64_t *value) noexcept nogil:
    if field[0] & 0x80:
        return read_base256(field, width, value)
    return read_octal(field, width, value)


cdef inline uint32_t text_length(const uint8_t *text, size_t width) noexcept nogil:
    """Bytes before the first NUL."""
    cdef const void *nul = memchr(text, 0, width) if width else NULL
    return <uint32_t>(width if nul == NULL else <const uint8_t *>nul - text)


cdef inline uint32_t copy_field(uint8_t *out, const uint8_t *field, uint32_t width) noexcept nogil:
    cdef uint32_t length = text_length(field, width)
    memcpy(out, field, length)
    return length


cdef inline bint checksum_matches(const uint8_t *block) noexcept nogil:
    """Old Suns summed signed bytes, so both sums will do."""
    cdef int64_t stated
    cdef int32_t total = 8 * c' '
    cdef int32_t signed_total
    cdef int i
    if not read_octal(block + CHECKSUM_AT, 8, &stated):
        return False
    for i in range(BLOCK):
        total += block[i]
    for i in range(CHECKSUM_AT, CHECKSUM_AT + 8):
        total -= block[i]
    if stated == total:
        return True
    signed_total = total
    for i in range(BLOCK):
        if block[i] >= 0x80 and not CHECKSUM_AT <= i < CHECKSUM_AT + 8:
            signed_total -= 256
    return stated == signed_total


cdef inline bint is_zero_block(const uint8_t *block) noexcept nogil:
    return block[0] == 0 and memcmp(block, block + 1, BLOCK - 1) == 0


cdef int reserve(tar_text *text, size_t length) noexcept nogil:
    cdef uint8_t *bytes
    if length <= text.room:
        return EST_OK
    bytes = <uint8_t *>realloc(text.bytes, padded(length))
    if bytes == NULL:
        return EST_NO_MEMORY
    text.bytes = bytes
    text.room = <uint32_t>padded(length)
    return EST_OK


cdef int set_text(tar_text *text, const uint8_t *bytes, size_t length) noexcept nogil:
    if reserve(text, length) != EST_OK:
        return EST_NO_MEMORY
    if length:
        memcpy(text.bytes, bytes, length)
    text.length = <uint32_t>length
    return EST_OK


cdef bint read_decimal(const uint8_t *text, size_t length, int64_t *value) noexcept nogil:
    """An optional sign and digits, all of the text. False if it is no number or does not fit 64 bits."""
    cdef bint negative = length > 0 and text[0] == c'-'
    cdef size_t at = 1 if length > 0 and (text[0] == c'-' or text[0] == c'+') else 0
    cdef uint64_t limit = <uint64_t>INT64_MAX + negative
    cdef uint64_t number = 0
    cdef uint8_t digit
    if at == length:
        return False
    while at < length:
        digit = text[at] - <uint8_t>c'0'
        if digit > 9 or number > (limit - digit) // 10:
            return False
        number = number * 10 + digit
        at += 1
    value[0] = <int64_t>(-number if negative else number)
    return True


cdef bint read_fraction(const uint8_t *text, size_t length, int32_t *nanoseconds) noexcept nogil:
    """Decimals after the point; those beyond nine are cut off but must be digits."""
    cdef int32_t number = 0
    cdef size_t i
    for i in range(length):
        if text[i] < c'0' or text[i] > c'9':
            return False
        if i < 9:
            number = number * 10 + (text[i] - c'0')
    for i in range(length, 9):
        number *= 10
    nanoseconds[0] = number
    return True


cdef bint read_time(const uint8_t *text, size_t length, int64_t *seconds, int32_t *nanoseconds) noexcept nogil:
    """Seconds since 1970 with decimals, as floor and non-negative rest: -0.5 is -1 s and 500000000 ns."""
    cdef const uint8_t *point = <const uint8_t *>memchr(text, c'.', length)
    cdef size_t whole = length if point == NULL else <size_t>(point - text)
    cdef int32_t fraction = 0
    if not read_decimal(text, whole, seconds):
        return False
    if point != NULL and not read_fraction(point + 1, length - whole - 1, &fraction):
        return False
    if fraction and text[0] == c'-':
        # Wraps at the lowest second, as Go's clock does.
        seconds[0] = <int64_t>(<uint64_t>seconds[0] - 1)
        fraction = 1000000000 - fraction
    nanoseconds[0] = fraction
    return True


cdef uint32_t known_key(const uint8_t *key, size_t length) noexcept nogil:
    """The bit of a PAX key that changes the entry or must be valid, 0 for the others."""
    if is_word(key, length, "path", 4):
        return KEY_PATH
    if is_word(key, length, "linkpath", 8):
        return KEY_LINK_PATH
    if is_word(key, length, "mtime", 5):
        return KEY_MTIME
    if is_word(key, length, "size", 4):
        return KEY_SIZE
    if is_word(key, length, "uid", 3):
        return KEY_UID
    if is_word(key, length, "gid", 3):
        return KEY_GID
    if is_word(key, length, "uname", 5):
        return KEY_USER_NAME
    if is_word(key, length, "gname", 5):
        return KEY_GROUP_NAME
    if is_word(key, length, "atime", 5):
        return KEY_ATIME
    if is_word(key, length, "ctime", 5):
        return KEY_CTIME
    return 0


cdef inline tar_text *text_of(tar_pax *pax, uint32_t key) noexcept nogil:
    if key == KEY_PATH:
        return &pax.path
    if key == KEY_LINK_PATH:
        return &pax.link_path
    if key == KEY_USER_NAME:
        return &pax.user_name
    return &pax.group_name


cdef bint read_value(tar_pax *pax, uint32_t key, const uint8_t *value, size_t length) noexcept nogil:
    """A number or time into its place; times of access and change are only checked."""
    cdef int64_t seconds
    cdef int32_t nanoseconds
    if key == KEY_UID:
        return read_decimal(value, length, &pax.uid)
    if key == KEY_GID:
        return read_decimal(value, length, &pax.gid)
    if key == KEY_SIZE:
        return read_decimal(value, length, &pax.size)
    if key == KEY_MTIME:
        return read_time(value, length, &pax.mtime_s, &pax.mtime_ns)
    return read_time(value, length, &seconds, &nanoseconds)


cdef int apply_known(tar_pax *pax, uint32_t key, const uint8_t *value, size_t length) noexcept nogil:
    """The last record of a key counts; an empty value takes the key back. A bad number only matters if it counts."""
    cdef bint is_text = key & (KEY_PATH | KEY_LINK_PATH | KEY_USER_NAME | KEY_GROUP_NAME)
    pax.given &= ~key
    pax.broken &= ~key
    if length == 0:
        return EST_OK
    if is_text:
        if has_byte(value, length, 0):
            return EST_TAR_PAX
        pax.given |= key
        return set_text(text_of(pax, key), value, length)
    if read_value(pax, key, value, length):
        pax.given |= key
    else:
        pax.broken |= key
    return EST_OK


cdef int note_xattr(
    tar_pax *pax, const uint8_t *key, size_t key_length, const uint8_t *value, size_t length
) noexcept nogil:
    cdef tar_xattr *grown
    cdef uint32_t room
    if pax.found_count == pax.found_room:
        room = 2 * pax.found_room + 16
        grown = <tar_xattr *>realloc(pax.found, room * sizeof(tar_xattr))
        if grown == NULL:
            return EST_NO_MEMORY
        pax.found = grown
        pax.found_room = room
    pax.found[pax.found_count].key = key
    pax.found[pax.found_count].value = value
    pax.found[pax.found_count].key_length = <uint32_t>key_length
    pax.found[pax.found_count].value_length = <uint32_t>length
    pax.found_count += 1
    return EST_OK


cdef uint8_t sparse_version(const uint8_t *value, size_t length) noexcept nogil:
    """0 if absent, else '0', '1' or '?'."""
    if length == 0:
        return 0
    return value[0] if length == 1 and value[0] in (c'0', c'1') else c'?'


cdef int note_sparse(
    tar_pax *pax, const uint8_t *key, size_t key_length, const uint8_t *value, size_t length
) noexcept nogil:
    """Keep just enough of GNU's keys to tell whether Go would see a sparse file."""
    if is_word(key, key_length, "major", 5):
        pax.sparse_major = sparse_version(value, length)
    elif is_word(key, key_length, "minor", 5):
        pax.sparse_minor = sparse_version(value, length)
    elif is_word(key, key_length, "map", 3) and pax.sparse_numbers == 0:
        pax.sparse_map = length > 0
    elif is_word(key, key_length, "offset", 6) or is_word(key, key_length, "numbytes", 8):
        # Format 0.0 writes the map as alternating records, which replace a map in one record.
        if (pax.sparse_numbers & 1) != (key[0] == c'n') or has_byte(value, length, c','):
            return EST_TAR_PAX
        pax.sparse_map = length > 0 or pax.sparse_numbers > 0
        pax.sparse_numbers += 1
    return EST_OK


cdef bint is_sparse(const tar_pax *pax) noexcept nogil:
    """An unknown version is no sparse file to Go, whatever the other keys say."""
    if pax.sparse_major == c'0':
        if pax.sparse_minor == c'0' or pax.sparse_minor == c'1':
            return True
    elif pax.sparse_major == c'1' and pax.sparse_minor == c'0':
        return True
    return pax.sparse_major == 0 and pax.sparse_minor == 0 and pax.sparse_map


cdef int apply_record(
    tar_pax *pax, const uint8_t *key, size_t key_length, const uint8_t *value, size_t length
) noexcept nogil:
    cdef uint32_t known
    if key_length == 0 or has_byte(key, key_length, 0):
        return EST_TAR_PAX
    if key_length >= 13 and memcmp(key, <const char *>b"SCHILY.xattr.", 13) == 0:
        return note_xattr(pax, key + 13, key_length - 13, value, length)
    if key_length >= 11 and memcmp(key, <const char *>b"GNU.sparse.", 11) == 0:
        return note_sparse(pax, key + 11, key_length - 11, value, length)
    known = known_key(key, key_length)
    return apply_known(pax, known, value, length) if known else EST_OK


cdef int take_record(tar_pax *pax, const uint8_t **data, size_t *left) noexcept nogil:
    """Apply the record at the head of the data, "<length> <key>=<value>\\n", and step over it."""
    cdef const uint8_t *start = data[0]
    cdef const uint8_t *space = <const uint8_t *>memchr(start, c' ', left[0])
    cdef const uint8_t *end
    cdef const uint8_t *equals
    cdef int64_t length
    if space == NULL or not read_decimal(start, space - start, &length) or length < 5 or length > <int64_t>left[0]:
        return EST_TAR_PAX
    end = start + length - 1
    if end <= space or end[0] != c'\n':
        return EST_TAR_PAX
    equals = <const uint8_t *>memchr(space + 1, c'=', end - space - 1)
    if equals == NULL:
        return EST_TAR_PAX
    data[0] += length
    left[0] -= <size_t>length
    return apply_record(pax, space + 1, equals - space - 1, equals + 1, end - equals - 1)


cdef inline int compare_keys(const tar_xattr *left, const tar_xattr *right) noexcept nogil:
    cdef uint32_t shorter = min(left.key_length, right.key_length)
    cdef int order = memcmp(left.key, right.key, shorter)
    if order:
        return order
    return (left.key_length > right.key_length) - (left.key_length < right.key_length)


cdef int compare_xattrs(const void *left, const void *right) noexcept nogil:
    """By key, then by place, so that of equal keys the later record comes last."""
    cdef const tar_xattr *a = <const tar_xattr *>left
    cdef const tar_xattr *b = <const tar_xattr *>right
    cdef int order = compare_keys(a, b)
    return order if order else (a.key > b.key) - (a.key < b.key)


cdef int pack_xattrs(tar_pax *pax) noexcept nogil:
    """Sort the noted attributes and copy them; of equal keys the last stays."""
    cdef size_t total = 0
    cdef uint32_t i
    cdef uint8_t *out
    pax.xattrs.length = 0
    if pax.found_count == 0:
        return EST_OK
    qsort(pax.found, pax.found_count, sizeof(tar_xattr), compare_xattrs)
    for i in range(pax.found_count):
        total += 8 + <size_t>pax.found[i].key_length + pax.found[i].value_length
    if reserve(&pax.xattrs, total) != EST_OK:
        return EST_NO_MEMORY
    out = pax.xattrs.bytes
    for i in range(pax.found_count):
        if i + 1 < pax.found_count and compare_keys(&pax.found[i], &pax.found[i + 1]) == 0:
            continue
        memcpy(out, &pax.found[i].key_length, 4)
        memcpy(out + 4, &pax.found[i].value_length, 4)
        memcpy(out + 8, pax.found[i].key, pax.found[i].key_length)
        out += 8 + pax.found[i].key_length
        memcpy(out, pax.found[i].value, pax.found[i].value_length)
        out += pax.found[i].value_length
    pax.xattrs.length = <uint32_t>(out - pax.xattrs.bytes)
    return EST_OK


cdef void forget_pax(tar_pax *pax) noexcept nogil:
    pax.given = 0
    pax.broken = 0
    pax.sparse_major = 0
    pax.sparse_minor = 0
    pax.sparse_map = 0
    pax.sparse_numbers = 0
    pax.found_count = 0
    pax.xattrs.length = 0


cdef void forget_meta(tar_parser *p) noexcept nogil:
    """Extended headers concern one entry."""
    if p.pending:
        forget_pax(&p.pax)
        p.long_name.length = 0
        p.long_link.length = 0
        p.pending = False


cdef int parse_pax(tar_pax *pax, const uint8_t *data, size_t left) noexcept nogil:
    """A second PAX header before the entry replaces the first one."""
    cdef int status
    forget_pax(pax)
    while left:
        status = take_record(pax, &data, &left)
        if status != EST_OK:
            return status
    return pack_xattrs(pax)


cdef bint read_format_fields(tar_parser *p, const uint8_t *block, uint32_t *prefix) noexcept nogil:
    """What is left of a header that has a magic; the prefix's length in `prefix`. False on a bad number."""
    cdef tar_entry *entry = &p.entry
    cdef int64_t unused
    cdef bint good
    entry.user_name_len = copy_field(p.text.user_name, block + USER_NAME_AT, OWNER_NAME_SIZE)
    entry.group_name_len = copy_field(p.text.group_name, block + GROUP_NAME_AT, OWNER_NAME_SIZE)
    good = read_number(block + DEV_MAJOR_AT, NUMBER_SIZE, &entry.dev_major)
    good &= read_number(block + DEV_MINOR_AT, NUMBER_SIZE, &entry.dev_minor)
    if block[MAGIC_AT + 5] == c' ':
        prefix[0] = gnu_prefix(block)
    elif memcmp(block + STAR_TRAILER_AT, <const char *>b"tar\x00", 4) == 0:
        prefix[0] = text_length(block + PREFIX_AT, STAR_PREFIX_SIZE)
        good &= read_number(block + STAR_ATIME_AT, LONG_NUMBER_SIZE, &unused)
        good &= read_number(block + STAR_CTIME_AT, LONG_NUMBER_SIZE, &unused)
    else:
        prefix[0] = text_length(block + PREFIX_AT, PREFIX_SIZE)
    return good


cdef bint is_number_or_unset(const uint8_t *field) noexcept nogil:
    cdef int64_t unused
    return field[0] == 0 or read_number(field, LONG_NUMBER_SIZE, &unused)


cdef uint32_t gnu_prefix(const uint8_t *block) noexcept nogil:
    """GNU headers have no prefix, but old Go wrote one over the times: what is no time and is ASCII is a prefix."""
    cdef uint32_t length
    if is_number_or_unset(block + GNU_ATIME_AT) and is_number_or_unset(block + GNU_CTIME_AT):
        return 0
    length = text_length(block + PREFIX_AT, PREFIX_SIZE)
    return length if is_ascii(block + PREFIX_AT, length) else 0


cdef inline bint has_magic(const uint8_t *block) noexcept nogil:
    return (
        memcmp(block + MAGIC_AT, <const char *>b"ustar\x00", 6) == 0
        or memcmp(block + MAGIC_AT, <const char *>b"ustar  \x00", 8) == 0
    )


cdef void read_name(tar_parser *p, const uint8_t *block, uint32_t prefix) noexcept nogil:
    cdef uint32_t at = 0
    if prefix:
        memcpy(p.text.name, block + PREFIX_AT, prefix)
        p.text.name[prefix] = c'/'
        at = prefix + 1
    p.entry.name_len = at + copy_field(p.text.name + at, block + NAME_AT, NAME_SIZE)


cdef void reset_entry(tar_parser *p) noexcept nogil:
    """An empty entry whose strings are the parser's copies of the header's."""
    memset(&p.entry, 0, sizeof(p.entry))
    p.entry.name = p.text.name
    p.entry.link = p.text.link
    p.entry.user_name = p.text.user_name
    p.entry.group_name = p.text.group_name
    p.entry.xattrs = p.text.name


cdef bint read_header(tar_parser *p, const uint8_t *block) noexcept nogil:
    """The block's own fields into p.entry, all strings copied. False on a bad number."""
    cdef tar_entry *entry = &p.entry
    cdef uint32_t prefix = 0
    cdef bint good = True
    if has_magic(block):
        good = read_format_fields(p, block, &prefix)
    read_name(p, block, prefix)
    entry.type = block[TYPE_AT]
    entry.link_len = copy_field(p.text.link, block + LINK_AT, NAME_SIZE)
    good &= read_number(block + MODE_AT, NUMBER_SIZE, &entry.mode)
    good &= read_number(block + UID_AT, NUMBER_SIZE, &entry.uid)
    good &= read_number(block + GID_AT, NUMBER_SIZE, &entry.gid)
    good &= read_number(block + SIZE_AT, LONG_NUMBER_SIZE, &entry.size)
    good &= read_number(block + MTIME_AT, LONG_NUMBER_SIZE, &entry.mtime_s)
    return good


cdef void merge_names(tar_parser *p) noexcept nogil:
    """GNU's long names beat PAX records, which beat the header."""
    cdef tar_entry *entry = &p.entry
    if p.long_name.length:
        entry.name = p.long_name.bytes
        entry.name_len = p.long_name.length
    elif p.pax.given & KEY_PATH:
        entry.name = p.pax.path.bytes
        entry.name_len = p.pax.path.length
    if p.long_link.length:
        entry.link = p.long_link.bytes
        entry.link_len = p.long_link.length
    elif p.pax.given & KEY_LINK_PATH:
        entry.link = p.pax.link_path.bytes
        entry.link_len = p.pax.link_path.length


cdef void merge_pax(tar_entry *entry, const tar_pax *pax) noexcept nogil:
    if pax.given & KEY_USER_NAME:
        entry.user_name = pax.user_name.bytes
        entry.user_name_len = pax.user_name.length
    if pax.given & KEY_GROUP_NAME:
        entry.group_name = pax.group_name.bytes
        entry.group_name_len = pax.group_name.length
    if pax.given & KEY_UID:
        entry.uid = pax.uid
    if pax.given & KEY_GID:
        entry.gid = pax.gid
    if pax.given & KEY_SIZE:
        entry.size = pax.size
    if pax.given & KEY_MTIME:
        entry.mtime_s = pax.mtime_s
        entry.mtime_ns = pax.mtime_ns
    if pax.xattrs.length:
        entry.xattrs = pax.xattrs.bytes
        entry.xattrs_len = pax.xattrs.length


cdef int finish_entry(tar_parser *p) noexcept nogil:
    """Apply the extended headers, then decide on type and size."""
    cdef tar_entry *entry = &p.entry
    merge_names(p)
    if p.pax.broken:
        return EST_TAR_PAX
    merge_pax(entry, &p.pax)
    if entry.type == 0:
        # Before there was a type for them, directories were told by their slash.
        entry.type = c'5' if entry.name_len and entry.name[entry.name_len - 1] == c'/' else c'0'
    if is_sparse(&p.pax):
        return EST_TAR_SPARSE
    if entry.type != c'0':
        # Links, devices, directories and fifos have no payload whatever their size field says.
        entry.size = 0
    if entry.size < 0 or entry.size > <int64_t>1 << 62:
        return EST_TAR_NUMBER
    forget_meta(p)
    return TAR_ENTRY


cdef int announce_meta(tar_parser *p) noexcept nogil:
    if p.entry.size > META_LIMIT:
        return EST_TAR_META_SIZE
    p.pending = True
    p.meta_type = p.entry.type
    p.meta_size = p.entry.size
    return TAR_META


cdef int tar_parser_init(tar_parser *p) noexcept nogil:
    memset(p, 0, sizeof(p[0]))
    reset_entry(p)
    return EST_OK


cdef void tar_parser_free(tar_parser *p) noexcept nogil:
    free(p.pax.path.bytes)
    free(p.pax.link_path.bytes)
    free(p.pax.user_name.bytes)
    free(p.pax.group_name.bytes)
    free(p.pax.xattrs.bytes)
    free(p.pax.found)
    free(p.long_name.bytes)
    free(p.long_link.bytes)
    tar_parser_init(p)


cdef int tar_parse_block(tar_parser *p, const uint8_t *block) noexcept nogil:
    cdef bint good
    cdef uint8_t kind
    reset_entry(p)
    if is_zero_block(block):
        return EST_TAR_DANGLING_META if p.pending else TAR_ZERO
    if not checksum_matches(block):
        return EST_TAR_CHECKSUM
    good = read_header(p, block)
    kind = p.entry.type
    # A negative size is an error even where a PAX record would replace it.
    if not good or (p.entry.size < 0 and not c'1' <= kind <= c'6'):
        return EST_TAR_NUMBER
    if kind in (c'x', c'L', c'K'):
        return announce_meta(p)
    if kind == c'S':
        return EST_TAR_SPARSE
    if kind != 0 and not c'0' <= kind <= c'6':
        return EST_TAR_TYPE
    return finish_entry(p)


cdef int tar_parse_meta(tar_parser *p, const uint8_t *data) noexcept nogil:
    cdef size_t size = <size_t>p.meta_size
    if p.meta_type == c'x':
        return parse_pax(&p.pax, data, size)
    return set_text(&p.long_name if p.meta_type == c'L' else &p.long_link, data, text_length(data, size))


# --------------------------------------------------------------------------------------------------- Python surface

class Entry(NamedTuple):
    """One parsed entry. Strings are raw bytes; times are seconds and nanoseconds; offsets and sizes are bytes."""

    name: bytes
    type: bytes
    link: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime_s: int
    mtime_ns: int
    user_name: bytes
    group_name: bytes
    dev_major: int
    dev_minor: int
    xattrs: list
    header_offset: int
    payload_offset: int


def pack(xattrs):
    """The packed form of extended attributes that rows.h describes.

    ``xattrs``: mapping or pairs of bytes to bytes; answers bytes, sorted by key.
    """
    cdef uint32_t lengths[2]
    parts = []
    for key, value in sorted(dict(xattrs).items()):
        lengths[0] = len(key)
        lengths[1] = len(value)
        parts += [(<const char *>lengths)[:8], key, value]
    return b"".join(parts)


cdef list unpack(const tar_entry *entry):
    cdef tar_xattr xattr
    cdef size_t at = packed_xattr(entry, 0, &xattr)
    pairs = []
    while at:
        pairs.append((xattr.key[:xattr.key_length], xattr.value[:xattr.value_length]))
        at = packed_xattr(entry, at, &xattr)
    return pairs


cdef object raised(int status, const tar_entry *entry, int64_t offset):
    name = entry.name[:entry.name_len].decode("utf-8", "backslashreplace")
    return from_status(status, 0, name, offset)


def emit(
    bytes name, *, bytes type=b"0", bytes link=b"", int64_t mode=0, int64_t uid=0, int64_t gid=0, int64_t size=0,
    int64_t mtime_s=0, int32_t mtime_ns=0, bytes user_name=b"", bytes group_name=b"", int64_t dev_major=0,
    int64_t dev_minor=0, xattrs=(), capacity=None,
):
    """The header blocks of one entry, as bytes.

    Names are raw bytes, ``type`` one of b"0" to b"6", ``mtime_s`` whole seconds since 1970 (floor) and ``mtime_ns``
    0..999999999, ``xattrs`` a mapping or pairs of bytes. ``capacity`` in bytes replaces the bound that callers use.
    Raises SourceError (TarError) where tar_emit answers a status.
    """
    cdef tar_entry entry
    cdef bytes packed = pack(xattrs)
    cdef ssize_t written
    memset(&entry, 0, sizeof(entry))
    entry.name = name
    entry.name_len = len(name)
    entry.type = type[0]
    entry.link = link
    entry.link_len = len(link)
    entry.user_name = user_name
    entry.user_name_len = len(user_name)
    entry.group_name = group_name
    entry.group_name_len = len(group_name)
    entry.xattrs = packed
    entry.xattrs_len = len(packed)
    entry.mode, entry.uid, entry.gid, entry.size = mode, uid, gid, size
    entry.mtime_s, entry.mtime_ns = mtime_s, mtime_ns
    entry.dev_major, entry.dev_minor = dev_major, dev_minor
    cdef size_t room = tar_emit_bound(&entry) if capacity is None else capacity
    cdef uint8_t *out = <uint8_t *>malloc(room + (room == 0))
    if out == NULL:
        raise MemoryError
    try:
        with nogil:
            written = tar_emit(&entry, out, room)
        if written < 0:
            raise raised(<int>written, &entry, -1)
        return out[:written]
    finally:
        free(out)


cdef object entry_of(const tar_entry *entry, int64_t header, int64_t payload):
    return Entry(
        entry.name[:entry.name_len], bytes((entry.type,)), entry.link[:entry.link_len], entry.mode, entry.uid,
        entry.gid, entry.size, entry.mtime_s, entry.mtime_ns, entry.user_name[:entry.user_name_len],
        entry.group_name[:entry.group_name_len], entry.dev_major, entry.dev_minor, unpack(entry), header, payload,
    )


def parse(bytes data):
    """The entries of a whole tar in memory, as a list of Entry; bytes after the end mark are not looked at.

    ``header_offset`` is where the entry's first header block is, extended headers included. The end of input counts as
    the end of the archive at a block border and within padding. Raises TarError with the name and byte offset.
    """
    cdef tar_parser parser
    tar_parser_init(&parser)
    try:
        return parse_all(&parser, data)
    finally:
        tar_parser_free(&parser)


cdef list parse_all(tar_parser *p, bytes data):
    cdef const uint8_t *start = data
    cdef int64_t length = len(data)
    cdef int64_t at = 0
    cdef int64_t first = 0
    cdef int64_t size
    cdef bint zero_seen = False
    cdef int answer
    entries = []
    while at < length:
        if length - at < BLOCK:
            raise raised(EST_TAR_TRUNCATED, &p.entry, at)
        answer = tar_parse_block(p, start + at)
        if answer < 0 and not zero_seen:
            raise raised(answer, &p.entry, at)
        if zero_seen:
            if answer == TAR_ZERO:
                return entries
            raise raised(EST_TAR_LONE_ZERO, &p.entry, at)
        at += BLOCK
        zero_seen = answer == TAR_ZERO
        if zero_seen:
            continue
        size = p.meta_size if answer == TAR_META else p.entry.size
        if size > length - at:
            raise raised(EST_TAR_TRUNCATED, &p.entry, length)
        if answer == TAR_META:
            # A copy of exactly that size, so that a memory checker sees a read beyond it.
            payload = data[at:at + size]
            answer = tar_parse_meta(p, <const uint8_t *><char *>payload)
            if answer < 0:
                raise raised(answer, &p.entry, at)
        else:
            entries.append(entry_of(&p.entry, first, at))
            first = at + padded(size)
        at += padded(size)
    if p.pending:
        raise raised(EST_TAR_DANGLING_META, &p.entry, length)
    return entries
