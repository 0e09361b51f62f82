/* Memory for ISA-L's stream struct, at an address that cannot be seen in the output.
 *
 * At levels 1 and 2 the x86-64 deflate body of ISA-L (2.30 and later) enters the third byte of a fresh stream into its hash
 * table under a hash of the wrong register: of bits 16..47 of the stream's own address, instead of the data. The output
 * stays valid, but in about one member of a thousand which matches are found, and so the bytes, depend on where the
 * struct lies: on the thread and on the process. So every struct is put where that hash, a CRC-32C cut to at most
 * HASH_BITS bits, is zero. tests/test_determinism.py shows both the effect and the cure.
 */
#ifndef ESTARGZ_ISAL_PLACE_H
#define ESTARGZ_ISAL_PLACE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

#define HASH_BITS 15                /* the largest hash table of the two levels */
#ifdef __SANITIZE_THREAD__          /* which keeps most addresses for itself */
#define FIRST_PAGE 0x56000000u
#define LAST_PAGE 0x56800000u
#else
#define FIRST_PAGE 0x20000000u      /* times 64 KiB: far from where heaps, stacks and libraries are put */
#define LAST_PAGE 0x70000000u
#endif

static uint32_t est_crc32c(uint32_t word) {
    for (int bit = 0; bit < 32; bit++) word = (word >> 1) ^ (word & 1 ? 0x82f63b78u : 0);
    return word;
}

#define ATTEMPTS 256                /* places that may be taken already before memory counts as exhausted */

#if defined(__x86_64__)
/* Zero-filled memory of `size` bytes, or NULL. Any thread; freed by est_unplace. */
static void *est_place(size_t size) {
    static _Atomic uint32_t next_page = FIRST_PAGE;
    for (int attempt = 0; attempt < ATTEMPTS;) {
        uint32_t page = atomic_fetch_add(&next_page, 1);
        if (page >= LAST_PAGE) {
            atomic_store(&next_page, FIRST_PAGE);
            continue;
        }
        if (est_crc32c(page) & ((1u << HASH_BITS) - 1)) continue;
        attempt++;
        void *wanted = (void *)((uintptr_t)page << 16);
        void *got = mmap(wanted, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
        if (got == wanted) return got;
        if (got != MAP_FAILED) munmap(got, size); /* a kernel before 4.17 takes the address for a hint */
    }
    return NULL;
}

static void est_unplace(void *memory, size_t size) {
    if (memory) munmap(memory, size);
}
#else
static void *est_place(size_t size) { return calloc(1, size); }
static void est_unplace(void *memory, size_t size) {
    (void)size;
    free(memory);
}
#endif

#endif
