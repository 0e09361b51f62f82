/* Memory for batches, which goes back to the system when it is freed: the allocator would keep it, for each thread apart. */
#ifndef ESTARGZ_PAGES_H
#define ESTARGZ_PAGES_H

#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EST_GUARDED
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(EST_GUARDED)
/* The sanitizer knows where this memory ends. */
static inline void *est_new_pages(size_t size) { return malloc(size); }
static inline void est_free_pages(void *pages, size_t size) { (void)size; free(pages); }
#else
/* NULL: none is left. */
static inline void *est_new_pages(size_t size) {
    void *pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return pages == MAP_FAILED ? NULL : pages;
}
static inline void est_free_pages(void *pages, size_t size) {
    if (pages != NULL)
        munmap(pages, size);
}
#endif

#endif
