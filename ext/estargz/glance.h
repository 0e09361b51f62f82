/* Words that one thread looks at without the lock under which others change them. What was done before a word was shown is
 * seen by whoever sees the word; nothing else is promised.
 */
#ifndef ESTARGZ_GLANCE_H
#define ESTARGZ_GLANCE_H

#define est_glance(place) __atomic_load_n(place, __ATOMIC_ACQUIRE)
#define est_show(place, value) __atomic_store_n(place, value, __ATOMIC_RELEASE)

#endif
