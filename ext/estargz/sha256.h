/* SHA-256 of several independent streams at once.
 *
 * A stream is libcrypto's own context, so that every CPU it knows is served; where the CPU has the SHA extensions, whole
 * blocks of two streams are run interleaved, because one stream alone only waits for the latency of its own rounds.
 * bench/bench_hash.py shows what that brings.
 */
#ifndef ESTARGZ_SHA256_H
#define ESTARGZ_SHA256_H

#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/sha.h>
#include <stddef.h>
#include <stdint.h>

typedef SHA256_CTX sha256_stream;

typedef struct {
    sha256_stream *stream;    /* distinct in every job of one call */
    const uint8_t *data;      /* may be NULL when size is 0 */
    size_t size;
} sha256_job;

void sha256_start(sha256_stream *stream);

/* Appends each job's data to its stream. Jobs are consumed: their data and size change. No allocation, any thread. */
void sha256_run(sha256_job *jobs, size_t count);

/* Digest of all data so far; the stream is spent. */
void sha256_finish(sha256_stream *stream, uint8_t digest[32]);

/* 2 where two streams run interleaved, 1 otherwise. */
int sha256_lanes(void);

#endif
