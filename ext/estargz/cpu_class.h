/* Which of its variants ISA-L's encoder runs: by the same features of the CPU that its own choice looks at. */
#ifndef ESTARGZ_CPU_CLASS_H
#define ESTARGZ_CPU_CLASS_H

#if defined(__x86_64__)
static const char *est_cpu_class(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("sse4.2")) return "base";
    if (!__builtin_cpu_supports("avx")) return "sse4.2";
    if (!__builtin_cpu_supports("avx2")) return "avx";
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq");
    return wide ? "avx512" : "avx2";
}
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
static const char *est_cpu_class(void) { return getauxval(AT_HWCAP) & HWCAP_CRC32 ? "crc32" : "base"; }
#else
static const char *est_cpu_class(void) { return "base"; }
#endif

#endif
