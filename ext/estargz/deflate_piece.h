/* A whole deflate stream as a piece of a longer one (RFC 1951), without inflating it.
 *
 * libdeflate ends every stream with a block that is marked as the last. Where another piece is to follow, that mark is taken
 * away, and an empty stored block fills up the last byte, as a sync flush does. Where the block begins and the stream ends
 * follows from the codes of all symbols before: they are read, what they mean is passed over.
 */
#ifndef ESTARGZ_DEFLATE_PIECE_H
#define ESTARGZ_DEFLATE_PIECE_H

#include <endian.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { EST_CODE_BITS = 15, EST_LITERALS = 288, EST_DISTANCES = 30, EST_END_OF_BLOCK = 256 };

/* A prefix code: the next `bits` bits of the stream -> symbol << 4 | length; 0 where no code begins so. */
typedef struct {
    unsigned bits;
    uint16_t found[1 << EST_CODE_BITS];
} est_code;

typedef struct {
    const uint8_t *data;
    uint64_t at, end;       /* bits */
    est_code literal, distance;
} est_bits;

/* At least 57 bits; zeros behind the end. */
static inline uint64_t est_peek(const est_bits *s) {
    uint64_t word = 0, byte = s->at >> 3, left = (s->end >> 3) - byte;
    if (s->at >= s->end) return 0;
    memcpy(&word, s->data + byte, left < 8 ? left : 8);
    return le64toh(word) >> (s->at & 7);
}

static inline unsigned est_take(est_bits *s, unsigned count) {
    unsigned value = (unsigned)(est_peek(s) & ((1u << count) - 1));
    s->at += count;
    return value;
}

/* Takes a symbol off a peeked word; 0 at an unknown code, else its row of `found`. */
static inline unsigned est_symbol(const est_code *code, uint64_t *word, unsigned *used) {
    unsigned row = code->found[*word & ((1u << code->bits) - 1)];
    *word >>= row & 15;
    *used += row & 15;
    return row;
}

/* From the lengths of codes, at most 15 bits each; 0 if there are more codes than such lengths allow. */
static int est_code_set(est_code *code, const uint8_t *lengths, unsigned count) {
    unsigned number[EST_CODE_BITS + 1] = {0}, next[EST_CODE_BITS + 2] = {0};
    for (unsigned i = 0; i < count; i++) number[lengths[i]]++;
    number[0] = code->bits = 0;
    for (unsigned length = 1; length <= EST_CODE_BITS; length++) {
        if (number[length]) code->bits = length;
        next[length + 1] = (next[length] + number[length]) << 1;
        if (next[length] + number[length] > 1u << length) return 0;
    }
    memset(code->found, 0, sizeof(code->found[0]) << code->bits);
    for (unsigned i = 0; i < count; i++) {
        unsigned length = lengths[i], reversed = 0;
        if (!length) continue;
        for (unsigned bit = 0, value = next[length]++; bit < length; bit++, value >>= 1) reversed = reversed << 1 | (value & 1);
        for (; reversed < 1u << code->bits; reversed += 1u << length) code->found[reversed] = (uint16_t)(i << 4 | length);
    }
    return 1;
}

static int est_fixed_codes(est_bits *s) {
    uint8_t lengths[EST_LITERALS];
    memset(lengths, 8, sizeof(lengths));
    memset(lengths + 144, 9, 112);
    memset(lengths + 256, 7, 24);
    if (!est_code_set(&s->literal, lengths, EST_LITERALS)) return 0;
    memset(lengths, 5, EST_DISTANCES);
    return est_code_set(&s->distance, lengths, EST_DISTANCES);
}

static int est_dynamic_codes(est_bits *s) {
    static const uint8_t order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    uint8_t lengths[EST_LITERALS + 32] = {0};
    unsigned literals = est_take(s, 5) + 257, distances = est_take(s, 5) + 1, given = est_take(s, 4) + 4, at = 0;
    for (unsigned i = 0; i < given; i++) lengths[order[i]] = (uint8_t)est_take(s, 3);
    if (literals > EST_LITERALS || !est_code_set(&s->literal, lengths, 19)) return 0;
    memset(lengths, 0, 19);
    while (at < literals + distances && s->at < s->end) {
        uint64_t word = est_peek(s);
        unsigned used = 0, row = est_symbol(&s->literal, &word, &used), symbol = row >> 4, repeat = 1;
        uint8_t length = (uint8_t)symbol;
        s->at += used;
        if (!row || (symbol == 16 && !at)) return 0;
        if (symbol >= 16) {
            length = symbol == 16 ? lengths[at - 1] : 0;
            repeat = symbol == 16 ? 3 + est_take(s, 2) : symbol == 17 ? 3 + est_take(s, 3) : 11 + est_take(s, 7);
        }
        if (repeat > literals + distances - at) return 0;
        memset(lengths + at, length, repeat);
        at += repeat;
    }
    return at == literals + distances && est_code_set(&s->literal, lengths, literals) &&
           est_code_set(&s->distance, lengths + literals, distances);
}

/* From behind a block's codes to behind its end; 0 if there is none. */
static int est_pass_symbols(est_bits *s) {
    while (s->at < s->end) {
        uint64_t word = est_peek(s);
        unsigned used = 0, row = est_symbol(&s->literal, &word, &used), symbol = row >> 4, extra;
        if (!row || symbol > 285) return 0;
        if (symbol > EST_END_OF_BLOCK) {
            extra = symbol < 265 || symbol == 285 ? 0 : (symbol - 261) >> 2;
            word >>= extra;
            used += extra;
            row = est_symbol(&s->distance, &word, &used);
            if (!row || row >> 4 >= EST_DISTANCES) return 0;
            used += row >> 4 < 4 ? 0 : (row >> 5) - 1;
        }
        s->at += used;
        if (symbol == EST_END_OF_BLOCK) return s->at <= s->end;
    }
    return 0;
}

static int est_pass_stored(est_bits *s) {
    unsigned size;
    s->at = (s->at + 7) & ~(uint64_t)7;
    size = est_take(s, 16);
    if (est_take(s, 16) != (size ^ 0xffff)) return 0;
    s->at += 8 * (uint64_t)size;
    return s->at <= s->end;
}

/* Makes the whole stream of `size` bytes at `out` one that others can follow; `s` is working memory. Returns its new size, or 0
 * if it is no such stream or there is no room. */
static size_t est_open_end(est_bits *s, uint8_t *out, size_t size, size_t capacity) {
    static const uint8_t EMPTY[4] = {0, 0, 0xff, 0xff};
    uint64_t begin, end;
    unsigned head;
    s->data = out;
    s->at = 0;
    s->end = 8 * (uint64_t)size;
    do {
        begin = s->at;
        head = est_take(s, 3);
        if (head >> 1 == 3 || s->at > s->end) return 0;
        if (head >> 1 ? !(head >> 1 == 1 ? est_fixed_codes(s) : est_dynamic_codes(s)) || !est_pass_symbols(s)
                      : !est_pass_stored(s))
            return 0;
    } while (!(head & 1));
    end = (s->at + 3 + 7) >> 3;                     /* bytes, with the three zero bits that a stored block begins with */
    if ((s->at + 7) >> 3 != size || end + sizeof(EMPTY) > capacity) return 0;
    out[begin >> 3] &= (uint8_t)~(1u << (begin & 7));
    if (end > size) out[size] = 0;
    memcpy(out + end, EMPTY, sizeof(EMPTY));
    return end + sizeof(EMPTY);
}

#endif
