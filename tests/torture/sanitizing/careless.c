/* What the sanitizers must report, each by itself: sanitizers.py runs them before all else. */
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>

static int shared;

int reads_behind(void) {
    volatile char *some = calloc(8, 1);
    int found = some[8];
    free((void *)some);
    return found;
}

int overflows(void) {
    volatile int most = INT_MAX;
    return most + 1;
}

static void *count(void *nothing) {
    for (int i = 0; i < 10000; i++)
        shared++;
    return nothing;
}

int races(void) {
    pthread_t other;
    pthread_create(&other, NULL, count, NULL);
    count(NULL);
    pthread_join(other, NULL);
    return shared;
}
