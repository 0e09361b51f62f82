"""The table of contents as JSON, byte for byte as Go's encoding/json indents and escapes it (docs/format.md)."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset, strlen

from estargz._memory cimport buffer, buffer_append, buffer_free, buffer_reserve
from estargz._rows cimport EST_NO_MEMORY, EST_OK, chunk_row, tar_entry, toc_row

cdef int64_t YEAR_ONE = -62135596800    # what Go takes for "no time"
cdef int64_t SECONDS_PER_DAY = 86400
cdef int64_t FIRST_ERA = 730692556      # eras of 400 years before the year 0 where Go's calendar begins

cdef const char *HEX = "0123456789abcdef"
cdef const char *BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


cdef void toc_free(toc_table *table) noexcept nogil:
    buffer_free(&table.rows)
    buffer_free(&table.chunks)
    buffer_free(&table.strings)


# ------------------------------------------------------------------------------------------------- entry -> row

cdef void round_mtime(const tar_entry *entry, toc_row *row) noexcept nogil:
    row.has_mtime = entry.mtime_s != 0 and (entry.mtime_s != YEAR_ONE or entry.mtime_ns != 0)
    row.mtime_s = entry.mtime_s + (1 if entry.mtime_ns >= 500000000 else 0)


cdef int toc_row_from_entry(const tar_entry *entry, bint keep_user, bint keep_group, toc_row *row,
                            buffer *strings) noexcept nogil:
    memset(row, 0, sizeof(toc_row))
    row.strings_at = strings.size
    row.name_len = entry.name_len
    row.link_len = entry.link_len if entry.type == c'1' or entry.type == c'2' else 0
    row.user_name_len = entry.user_name_len if keep_user else 0
    row.group_name_len = entry.group_name_len if keep_group else 0
    row.xattrs_len = entry.xattrs_len
    row.mode = entry.mode
    row.uid = entry.uid
    row.gid = entry.gid
    row.size = entry.size if entry.type == c'0' else 0
    row.type = entry.type
    round_mtime(entry, row)
    if entry.type == c'3' or entry.type == c'4':
        row.dev_major = entry.dev_major
        row.dev_minor = entry.dev_minor
    if (buffer_append(strings, entry.name, row.name_len) and buffer_append(strings, entry.link, row.link_len)
            and buffer_append(strings, entry.user_name, row.user_name_len)
            and buffer_append(strings, entry.group_name, row.group_name_len)
            and buffer_append(strings, entry.xattrs, row.xattrs_len)):
        return EST_OK
    return EST_NO_MEMORY


# ------------------------------------------------------------------------------------------------- scalars
# The put_* functions write without checking: toc_entry reserves the whole entry's worst case first.

cdef inline void put(buffer *out, const void *data, size_t size) noexcept nogil:
    memcpy(out.data + out.size, data, size)
    out.size += size


cdef inline void put_text(buffer *out, const char *text) noexcept nogil:
    put(out, text, strlen(text))


cdef inline void put_byte(buffer *out, uint8_t byte) noexcept nogil:
    out.data[out.size] = byte
    out.size += 1


cdef void put_integer(buffer *out, int64_t value) noexcept nogil:
    cdef uint8_t digits[20]
    cdef int at = 20
    cdef uint64_t rest = <uint64_t>value
    if value < 0:
        put_byte(out, c'-')
        rest = 0 - rest
    while True:
        at -= 1
        digits[at] = c'0' + <uint8_t>(rest % 10)
        rest //= 10
        if not rest:
            break
    put(out, digits + at, 20 - at)


cdef void put_padded(buffer *out, int64_t value, int width) noexcept nogil:
    cdef int64_t power = 1
    cdef int i
    for i in range(width - 1):
        power *= 10
    while power > 1 and value < power:
        put_byte(out, c'0')
        power //= 10
    put_integer(out, value)


cdef void put_time(buffer *out, int64_t seconds) noexcept nogil:
    # Days to a civil date in the proleptic Gregorian calendar: eras of 400 years that begin on the 1st of March. As Go
    # does, counts from an era so long ago that all is positive; the few earlier times wrap around.
    cdef uint64_t since = <uint64_t>seconds + (<uint64_t>FIRST_ERA * 146097 + 719468) * <uint64_t>SECONDS_PER_DAY
    cdef int64_t days = since // <uint64_t>SECONDS_PER_DAY
    cdef int64_t second = since % <uint64_t>SECONDS_PER_DAY
    cdef int64_t era = days // 146097 - FIRST_ERA
    cdef int64_t day_of_era = days % 146097
    cdef int64_t year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36524 - day_of_era // 146096) // 365
    cdef int64_t day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    cdef int64_t month_from_march = (5 * day_of_year + 2) // 153
    cdef int64_t day = day_of_year - (153 * month_from_march + 2) // 5 + 1
    cdef int64_t month = month_from_march + 3 if month_from_march < 10 else month_from_march - 9
    cdef int64_t year = year_of_era + era * 400 + (1 if month <= 2 else 0)
    if year < 0:
        put_byte(out, c'-')
        year = -year
    put_padded(out, year, 4)
    put_byte(out, c'-')
    put_padded(out, month, 2)
    put_byte(out, c'-')
    put_padded(out, day, 2)
    put_byte(out, c'T')
    put_padded(out, second // 3600, 2)
    put_byte(out, c':')
    put_padded(out, second // 60 % 60, 2)
    put_byte(out, c':')
    put_padded(out, second % 60, 2)
    put_byte(out, c'Z')


cdef void put_digest(buffer *out, const uint8_t *digest) noexcept nogil:
    cdef int i
    put_text(out, "sha256:")
    for i in range(32):
        put_byte(out, HEX[digest[i] >> 4])
        put_byte(out, HEX[digest[i] & 15])


cdef void put_base64(buffer *out, const uint8_t *data, size_t size) noexcept nogil:
    cdef size_t i = 0
    cdef uint32_t group
    while i < size:
        group = data[i] << 16
        if i + 1 < size:
            group |= data[i + 1] << 8
        if i + 2 < size:
            group |= data[i + 2]
        put_byte(out, BASE64[group >> 18])
        put_byte(out, BASE64[(group >> 12) & 63])
        put_byte(out, BASE64[(group >> 6) & 63] if i + 1 < size else c'=')
        put_byte(out, BASE64[group & 63] if i + 2 < size else c'=')
        i += 3


# ------------------------------------------------------------------------------------------------- strings

cdef inline bint continues(const uint8_t *s, size_t size, size_t at) noexcept nogil:
    return at < size and (s[at] & 0xC0) == 0x80


cdef size_t rune_length(const uint8_t *s, size_t size) noexcept nogil:
    """Bytes of the valid UTF-8 sequence that begins at s, or 0 (the rules of RFC 3629, as Go's decoder has them)."""
    cdef uint8_t first = s[0]
    if first < 0x80:
        return 1
    if first < 0xC2 or not continues(s, size, 1):
        return 0
    if first < 0xE0:
        return 2
    if not continues(s, size, 2):
        return 0
    if first < 0xF0:
        if (first == 0xE0 and s[1] < 0xA0) or (first == 0xED and s[1] > 0x9F):
            return 0
        return 3
    if first > 0xF4 or not continues(s, size, 3):
        return 0
    if (first == 0xF0 and s[1] < 0x90) or (first == 0xF4 and s[1] > 0x8F):
        return 0
    return 4


cdef void put_ascii_escape(buffer *out, uint8_t byte) noexcept nogil:
    put_byte(out, c'\\')
    if byte == c'"' or byte == c'\\':
        put_byte(out, byte)
    elif byte == 8:
        put_byte(out, c'b')
    elif byte == 12:
        put_byte(out, c'f')
    elif byte == 10:
        put_byte(out, c'n')
    elif byte == 13:
        put_byte(out, c'r')
    elif byte == 9:
        put_byte(out, c't')
    else:
        put_text(out, "u00")
        put_byte(out, HEX[byte >> 4])
        put_byte(out, HEX[byte & 15])


cdef inline bint needs_escape(uint8_t byte) noexcept nogil:
    return byte < 0x20 or byte == c'"' or byte == c'\\' or byte == c'<' or byte == c'>' or byte == c'&'


cdef void put_string(buffer *out, const uint8_t *s, size_t size) noexcept nogil:
    cdef size_t i = 0
    cdef size_t length
    put_byte(out, c'"')
    while i < size:
        if s[i] < 0x80:
            if needs_escape(s[i]):
                put_ascii_escape(out, s[i])
            else:
                put_byte(out, s[i])
            i += 1
            continue
        length = rune_length(s + i, size - i)
        if length == 0:
            put_text(out, "\\ufffd")
            i += 1
        elif length == 3 and s[i] == 0xE2 and s[i + 1] == 0x80 and (s[i + 2] & 0xFE) == 0xA8:
            put_text(out, "\\u2028" if s[i + 2] == 0xA8 else "\\u2029")
            i += 3
        else:
            put(out, s + i, length)
            i += length
    put_byte(out, c'"')


# ------------------------------------------------------------------------------------------------- fields

cdef inline void put_key(buffer *out, const char *key) noexcept nogil:
    put_text(out, ",\n\t\t\t\"")
    put_text(out, key)
    put_text(out, "\": ")


cdef inline void put_number_field(buffer *out, const char *key, int64_t value) noexcept nogil:
    if value:
        put_key(out, key)
        put_integer(out, value)


cdef inline void put_string_field(buffer *out, const char *key, const uint8_t *s, size_t size) noexcept nogil:
    if size:
        put_key(out, key)
        put_string(out, s, size)


cdef inline void put_digest_field(buffer *out, const char *key, const uint8_t *digest) noexcept nogil:
    put_key(out, key)
    put_byte(out, c'"')
    put_digest(out, digest)
    put_byte(out, c'"')


cdef void put_xattrs(buffer *out, const uint8_t *packed, size_t size) noexcept nogil:
    cdef size_t at = 0
    cdef uint32_t key_size, value_size
    if not size:
        return
    put_key(out, "xattrs")
    put_byte(out, c'{')
    while at < size:
        memcpy(&key_size, packed + at, 4)
        memcpy(&value_size, packed + at + 4, 4)
        put_text(out, ",\n\t\t\t\t" if at else "\n\t\t\t\t")
        put_string(out, packed + at + 8, key_size)
        put_text(out, ": \"")
        put_base64(out, packed + at + 8 + key_size, value_size)
        put_byte(out, c'"')
        at += 8 + key_size + value_size
    put_text(out, "\n\t\t\t}")


cdef const char *type_name(uint8_t type) noexcept nogil:
    if type == c'0':
        return "reg"
    if type == c'1':
        return "hardlink"
    if type == c'2':
        return "symlink"
    if type == c'3':
        return "char"
    if type == c'4':
        return "block"
    if type == c'5':
        return "dir"
    return "fifo"


# ------------------------------------------------------------------------------------------------- entries

cdef void put_opening(buffer *out, const uint8_t *name, size_t size, const char *kind, bint first) noexcept nogil:
    put_text(out, "\n\t\t{\n\t\t\t\"name\": " if first else ",\n\t\t{\n\t\t\t\"name\": ")
    put_string(out, name, size)
    put_key(out, "type")
    put_byte(out, c'"')
    put_text(out, kind)
    put_byte(out, c'"')


cdef void put_chunk_fields(buffer *out, int64_t chunk_offset, int64_t size, int64_t full_size,
                           const uint8_t *digest) noexcept nogil:
    put_number_field(out, "chunkOffset", chunk_offset)
    put_number_field(out, "chunkSize", size if size == full_size else 0)
    put_digest_field(out, "chunkDigest", digest)


cdef void put_row(buffer *out, const toc_row *row, const uint8_t *strings, const chunk_row *chunks,
                  int64_t chunk_size, bint first) noexcept nogil:
    cdef const uint8_t *name = strings + row.strings_at
    cdef const uint8_t *link = name + row.name_len
    cdef const uint8_t *user_name = link + row.link_len
    cdef const uint8_t *group_name = user_name + row.user_name_len
    put_opening(out, name, row.name_len, type_name(row.type), first)
    put_number_field(out, "size", row.size)
    if row.has_mtime:
        put_key(out, "modtime")
        put_byte(out, c'"')
        put_time(out, row.mtime_s)
        put_byte(out, c'"')
    put_string_field(out, "linkName", link, row.link_len)
    put_number_field(out, "mode", row.mode)
    put_number_field(out, "uid", row.uid)
    put_number_field(out, "gid", row.gid)
    put_string_field(out, "userName", user_name, row.user_name_len)
    put_string_field(out, "groupName", group_name, row.group_name_len)
    put_number_field(out, "offset", row.offset)
    put_number_field(out, "innerOffset", row.inner_offset)
    put_number_field(out, "devMajor", row.dev_major)
    put_number_field(out, "devMinor", row.dev_minor)
    put_xattrs(out, group_name + row.group_name_len, row.xattrs_len)
    if row.has_digest:
        put_digest_field(out, "digest", row.digest)
    if row.chunk_count == 1:
        put_chunk_fields(out, 0, row.size, chunk_size, row.digest)
    elif row.chunk_count > 1:
        put_chunk_fields(out, 0, chunks.chunk_size, chunk_size, chunks.digest)
    put_text(out, "\n\t\t}")


cdef void put_chunk(buffer *out, const toc_row *row, const uint8_t *strings, const chunk_row *chunk,
                    int64_t chunk_size) noexcept nogil:
    put_opening(out, strings + row.strings_at, row.name_len, "chunk", False)
    put_number_field(out, "offset", chunk.offset)
    put_number_field(out, "innerOffset", chunk.inner_offset)
    put_chunk_fields(out, chunk.chunk_offset, chunk.chunk_size, chunk_size, chunk.digest)
    put_text(out, "\n\t\t}")


cdef enum:
    FIXED_TEXT = 1024   # more than all keys, numbers, digests and punctuation of one entry


cdef int toc_open(toc_table *table, buffer *out) noexcept nogil:
    if not buffer_reserve(out, FIXED_TEXT):
        return EST_NO_MEMORY
    put_text(out, "{\n\t\"version\": 1,\n\t\"entries\": ")
    # An empty list of entries is Go's nil slice.
    put_text(out, "[" if table.rows.size else "null")
    return EST_OK


cdef int toc_entry(toc_table *table, int64_t index, int64_t chunk_size, buffer *out) noexcept nogil:
    cdef const toc_row *row = <const toc_row *>table.rows.data + index
    cdef const chunk_row *chunks = <const chunk_row *>table.chunks.data + row.first_chunk
    # An invalid byte becomes six characters; a base64 group of three bytes four.
    cdef size_t worst = FIXED_TEXT + 6 * (<size_t>row.name_len + row.link_len + row.user_name_len
                                          + row.group_name_len) + 16 * <size_t>row.xattrs_len
    cdef uint32_t i
    if not buffer_reserve(out, worst):
        return EST_NO_MEMORY
    put_row(out, row, table.strings.data, chunks, chunk_size, index == 0)
    if row.chunk_count > 1:
        for i in range(1, row.chunk_count):
            if not buffer_reserve(out, worst):
                return EST_NO_MEMORY
            put_chunk(out, row, table.strings.data, chunks + i, chunk_size)
    return EST_OK


cdef int toc_close(toc_table *table, buffer *out) noexcept nogil:
    if not buffer_reserve(out, FIXED_TEXT):
        return EST_NO_MEMORY
    put_text(out, "\n\t]\n}" if table.rows.size else "\n}")
    return EST_OK
