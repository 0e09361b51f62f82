#include "sha256.h"

#define BLOCK 64

void sha256_start(sha256_stream *stream) { SHA256_Init(stream); }

void sha256_finish(sha256_stream *stream, uint8_t digest[32]) { SHA256_Final(digest, stream); }

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <stdatomic.h>

static const uint32_t ROUND_CONSTANTS[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* One stream's registers: the working variables in the order the instructions want them, and the message window. */
typedef struct {
    __m128i abef, cdgh;
    __m128i saved_abef, saved_cdgh;
    __m128i window[4];
} lane;

#define SHA_TARGET __attribute__((target("sha,sse4.1,ssse3")))
#define SHA_INLINE static inline __attribute__((always_inline, target("sha,sse4.1,ssse3")))

SHA_INLINE void lane_load(lane *l, const uint32_t state[8]) {
    __m128i badc = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)state), 0xB1);
    __m128i efgh_reversed = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *)(state + 4)), 0x1B);
    l->abef = _mm_alignr_epi8(badc, efgh_reversed, 8);
    l->cdgh = _mm_blend_epi16(efgh_reversed, badc, 0xF0);
}

SHA_INLINE void lane_store(const lane *l, uint32_t state[8]) {
    __m128i feba = _mm_shuffle_epi32(l->abef, 0x1B);
    __m128i dchg = _mm_shuffle_epi32(l->cdgh, 0xB1);
    _mm_storeu_si128((__m128i *)state, _mm_blend_epi16(feba, dchg, 0xF0));
    _mm_storeu_si128((__m128i *)(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

SHA_INLINE void lane_begin_block(lane *l, const uint8_t *block) {
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    l->saved_abef = l->abef;
    l->saved_cdgh = l->cdgh;
    for (int i = 0; i < 4; i++)
        l->window[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(block + 16 * i)), big_endian);
}

SHA_INLINE void lane_end_block(lane *l) {
    l->abef = _mm_add_epi32(l->abef, l->saved_abef);
    l->cdgh = _mm_add_epi32(l->cdgh, l->saved_cdgh);
}

/* Rounds 4i..4i+3, with the message words they take; step < 12 also prepares the words of four steps later. */
SHA_INLINE __m128i lane_words(const lane *l, int step) {
    return _mm_add_epi32(l->window[step & 3], _mm_load_si128((const __m128i *)(ROUND_CONSTANTS + 4 * step)));
}

SHA_INLINE void lane_schedule(lane *l, int step) {
    __m128i *w = l->window;
    __m128i next = _mm_sha256msg1_epu32(w[step & 3], w[(step + 1) & 3]);
    next = _mm_add_epi32(next, _mm_alignr_epi8(w[(step + 3) & 3], w[(step + 2) & 3], 4));
    w[step & 3] = _mm_sha256msg2_epu32(next, w[(step + 3) & 3]);
}

/* The two lanes' instructions alternate, so that each hides the other's latency. */
SHA_TARGET static void run_pair(uint32_t *state_a, const uint8_t *a, uint32_t *state_b, const uint8_t *b, size_t blocks) {
    lane x, y;
    lane_load(&x, state_a);
    lane_load(&y, state_b);
    for (; blocks; blocks--, a += BLOCK, b += BLOCK) {
        lane_begin_block(&x, a);
        lane_begin_block(&y, b);
#pragma GCC unroll 16
        for (int step = 0; step < 16; step++) {
            __m128i xw = lane_words(&x, step), yw = lane_words(&y, step);
            x.cdgh = _mm_sha256rnds2_epu32(x.cdgh, x.abef, xw);
            y.cdgh = _mm_sha256rnds2_epu32(y.cdgh, y.abef, yw);
            xw = _mm_shuffle_epi32(xw, 0x0E);
            yw = _mm_shuffle_epi32(yw, 0x0E);
            x.abef = _mm_sha256rnds2_epu32(x.abef, x.cdgh, xw);
            y.abef = _mm_sha256rnds2_epu32(y.abef, y.cdgh, yw);
            if (step < 12) {
                lane_schedule(&x, step);
                lane_schedule(&y, step);
            }
        }
        lane_end_block(&x);
        lane_end_block(&y);
    }
    lane_store(&x, state_a);
    lane_store(&y, state_b);
}

static int have_sha_extensions(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSSE3) || !(c & bit_SSE4_1)) return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & (1u << 29));
}

/* Other libraries' AVX code may leave the upper halves of the vector registers in use; the SHA instructions, which have no
 * AVX form, then run at half their speed. */
static void clear_upper_halves(void) {
    if (__builtin_cpu_supports("avx")) __asm__ volatile("vzeroupper");
}

int sha256_lanes(void) {
    static _Atomic int lanes; /* written with one of two values, the same by every thread */
    int found = atomic_load_explicit(&lanes, memory_order_relaxed);
    if (!found) {
        found = have_sha_extensions() ? 2 : 1;
        atomic_store_explicit(&lanes, found, memory_order_relaxed);
    }
    return found;
}

#else
static void clear_upper_halves(void) {}
int sha256_lanes(void) { return 1; }
static void run_pair(uint32_t *state_a, const uint8_t *a, uint32_t *state_b, const uint8_t *b, size_t blocks) {
    (void)state_a, (void)a, (void)state_b, (void)b, (void)blocks;
}
#endif

/* The context counts bits in two 32-bit halves. */
static void count_bytes(sha256_stream *stream, size_t bytes) {
    uint64_t bits = (((uint64_t)stream->Nh << 32) | stream->Nl) + ((uint64_t)bytes << 3);
    stream->Nh = (SHA_LONG)(bits >> 32);
    stream->Nl = (SHA_LONG)bits;
}

static void append(sha256_job *job, size_t size) {
    if (size) SHA256_Update(job->stream, job->data, size);
    job->data += size;
    job->size -= size;
}

/* Fills up a block that an earlier call left unfinished, so that whole blocks can follow. */
static void align(sha256_job *job) {
    size_t missing = job->stream->num ? BLOCK - job->stream->num : 0;
    append(job, missing < job->size ? missing : job->size);
}

static void advance_pair(sha256_job *a, sha256_job *b, size_t blocks) {
    run_pair((uint32_t *)a->stream->h, a->data, (uint32_t *)b->stream->h, b->data, blocks);
    sha256_job *both[2] = {a, b};
    for (int i = 0; i < 2; i++) {
        count_bytes(both[i]->stream, blocks * BLOCK);
        both[i]->data += blocks * BLOCK;
        both[i]->size -= blocks * BLOCK;
    }
}

void sha256_run(sha256_job *jobs, size_t count) {
    size_t next = 0;
    sha256_job *held = NULL; /* a job with whole blocks left and no partner yet */
    clear_upper_halves();
    if (sha256_lanes() == 2) {
        while (next < count) {
            sha256_job *job = &jobs[next++];
            align(job);
            while (held && job->size >= BLOCK) {
                size_t blocks = (held->size < job->size ? held->size : job->size) / BLOCK;
                advance_pair(held, job, blocks);
                if (held->size < BLOCK) {
                    append(held, held->size);
                    held = NULL;
                }
            }
            if (job->size >= BLOCK)
                held = job;
            else
                append(job, job->size);
        }
        if (held) append(held, held->size);
        return;
    }
    while (next < count) {
        sha256_job *job = &jobs[next++];
        append(job, job->size);
    }
}
