/* Counts the system calls, allocations and thread starts of a process, and has one of each kind fail. x86-64 Linux.
 *
 * To be preloaded. System calls are trapped by a seccomp filter, so none escapes, whoever makes it and by whatever function;
 * allocations and thread starts are functions of the same name. faults.py arms it, by ctypes, around what it tries. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

enum { KINDS = 1024, OWN_ALLOCATION = 1000, ANY_ALLOCATION, THREAD_START }; /* below: numbers of system calls */
enum { FAIL, ONE_BYTE, HALF };

_Atomic long injector_counts[KINDS];
_Atomic long injector_fired;  /* how often the fault happened */
_Atomic long injector_closed; /* calls with a descriptor that was not open */

static atomic_int armed;
static long fault_kind, fault_first, fault_last, fault_action, fault_errno, fault_shown;

/* Whether this call is the one; counts it. */
static int due(long kind) {
    if (!atomic_load(&armed))
        return 0;
    long index = atomic_fetch_add(&injector_counts[kind], 1);
    if (kind != fault_kind || index < fault_first || index > fault_last)
        return 0;
    if (!atomic_fetch_add(&injector_fired, 1) && fault_shown) {
        void *frames[40];
        atomic_store(&armed, 0); /* this makes calls itself */
        backtrace_symbols_fd(frames, backtrace(frames, 40), 2);
        atomic_store(&armed, 1);
    }
    return 1;
}

/* ---- system calls */

long injector_call(long number, long a, long b, long c, long d, long e, long f);
extern char injector_called[]; /* behind its instruction, which is what the filter knows it by */
__asm__(".text\n.globl injector_call\n.globl injector_called\n"
        "injector_call:\n"
        "mov %rdi, %rax\n mov %rsi, %rdi\n mov %rdx, %rsi\n mov %rcx, %rdx\n mov %r8, %r10\n mov %r9, %r8\n mov 8(%rsp), %r9\n"
        "syscall\n"
        "injector_called: ret\n");

static size_t less(size_t size) { return size < 2 ? size : fault_action == ONE_BYTE ? 1 : size / 2; }

/* readv and its like with the first part of what they were given */
static long with_less_of_many(long number, const long *a) {
    struct iovec parts[64];
    int count = a[2] < 64 ? a[2] : 64;
    size_t left = 0;
    memcpy(parts, (void *)a[1], count * sizeof *parts);
    for (int i = 0; i < count; i++)
        left += parts[i].iov_len;
    left = less(left);
    for (int i = 0; i < count; i++) {
        parts[i].iov_len = parts[i].iov_len < left ? parts[i].iov_len : left;
        left -= parts[i].iov_len;
    }
    return injector_call(number, a[0], (long)parts, count, a[3], a[4], a[5]);
}

/* The call, for a part of the bytes that it was asked for. */
static long with_less(long number, const long *a) {
    switch (number) {
    case SYS_readv: case SYS_writev: case SYS_preadv: case SYS_pwritev: case SYS_preadv2: case SYS_pwritev2:
        return with_less_of_many(number, a);
    case SYS_getrandom:
        return injector_call(number, a[0], less(a[1]), a[2], a[3], a[4], a[5]);
    case SYS_sendfile:
        return injector_call(number, a[0], a[1], a[2], less(a[3]), a[4], a[5]);
    case SYS_copy_file_range:
        return injector_call(number, a[0], a[1], a[2], a[3], less(a[4]), a[5]);
    case SYS_sendmsg: case SYS_recvmsg: /* nobody who cares makes them */
        return injector_call(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    default: /* read, write, pread64, pwrite64, sendto, recvfrom, getdents64 */
        return injector_call(number, a[0], a[1], less(a[2]), a[3], a[4], a[5]);
    }
}

/* Whether it could fail so: a pipe has neither a disk nor a quota, and only who writes to one needs memory; a socket has
 * nothing that close() would have to write. */
static int is_possible(long number, mode_t mode) {
    if (number == SYS_close)
        return !S_ISSOCK(mode);
    return !S_ISFIFO(mode) || fault_errno == EINTR || (fault_errno == ENOMEM && number == SYS_write);
}

static int is_true_of(long number, long descriptor) {
    struct stat found;
    if (fault_action != FAIL || (number != SYS_read && number != SYS_write && number != SYS_close))
        return 1;
    if (injector_call(SYS_fstat, descriptor, (long)&found, 0, 0, 0, 0) || is_possible(number, found.st_mode))
        return 1;
    atomic_fetch_sub(&injector_fired, 1);
    return 0;
}

/* Whatever close() says, the descriptor is gone; who is not connected cannot be sent to; an interrupted connect() goes on. */
static int happens_all_the_same(long number) {
    return number == SYS_close || number == SYS_shutdown || (number == SYS_connect && fault_errno == EINTR);
}

/* One that was reset once stays so: the next call, too, must find it broken. */
static int breaks_connection(long number) {
    return (number == SYS_sendto || number == SYS_sendmsg || number == SYS_recvfrom || number == SYS_recvmsg) &&
           (fault_errno == ECONNRESET || fault_errno == EPIPE || fault_errno == ETIMEDOUT);
}

static void trapped(int signal, siginfo_t *info, void *context) {
    (void)signal;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    long number = info->si_syscall, result;
    long a[6] = {registers[REG_RDI], registers[REG_RSI], registers[REG_RDX], registers[REG_R10], registers[REG_R8], registers[REG_R9]};
    int wanted = atomic_load(&armed), before = errno;
    if (due(number) && is_true_of(number, a[0])) {
        if (fault_action != FAIL)
            result = with_less(number, a);
        else {
            if (breaks_connection(number))
                injector_call(SYS_shutdown, a[0], SHUT_RDWR, 0, 0, 0, 0);
            if (happens_all_the_same(number))
                injector_call(number, a[0], a[1], a[2], 0, 0, 0);
            result = number == SYS_brk ? injector_call(number, 0, 0, 0, 0, 0, 0) : -fault_errno; /* brk() gives no error */
        }
    } else {
        result = injector_call(number, a[0], a[1], a[2], a[3], a[4], a[5]);
        if (result == -EBADF && wanted)
            atomic_fetch_add(&injector_closed, 1);
    }
    errno = before;
    registers[REG_RAX] = result;
}

/* Traps all calls but those whose numbers are given, in this process for ever. 0, or errno. */
int injector_install(const int *spared, int count) {
    struct sigaction action = {.sa_sigaction = trapped, .sa_flags = SA_SIGINFO | SA_RESTART | SA_NODEFER};
    struct sock_filter code[2 * 128 + 16], *next = code;
    unsigned long place = (unsigned long)injector_called;
    void *frame[1];
    backtrace(frame, 1); /* loads what it needs now */
    if (count > 128)
        return E2BIG;
#define LOAD(field, more) *next++ = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field) + more)
#define UNLESS(value, skipped) *next++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, skipped)
#define RETURN(what) *next++ = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, what)
    LOAD(instruction_pointer, 0);
    UNLESS((unsigned)place, 3);
    LOAD(instruction_pointer, 4);
    UNLESS((unsigned)(place >> 32), 1);
    RETURN(SECCOMP_RET_ALLOW);
    LOAD(nr, 0);
    for (int i = 0; i < count; i++) {
        UNLESS((unsigned)spared[i], 1);
        RETURN(SECCOMP_RET_ALLOW);
    }
    RETURN(SECCOMP_RET_TRAP);
    struct sock_fprog filter = {.len = next - code, .filter = code};
    if (sigaction(SIGSYS, &action, NULL) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter))
        return errno;
    return 0;
}

/* ---- allocations: those of the package's own code and its libraries, and everybody's */

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);

static struct { char *begin, *end; } owned[64];
static int owned_count;
static const char *const owners[] = {"/estargz/", "/libisal.", "/libdeflate.", "/libzstd.", "/libcrypto."};

static int is_owned(const char *path) {
    for (size_t i = 0; i < sizeof owners / sizeof *owners; i++)
        if (strstr(path, owners[i]))
            return 1;
    return 0;
}

static int note_owned(struct dl_phdr_info *info, size_t size, void *unused) {
    (void)size, (void)unused;
    for (int i = 0; is_owned(info->dlpi_name) && i < info->dlpi_phnum && owned_count < 64; i++)
        if (info->dlpi_phdr[i].p_type == PT_LOAD && info->dlpi_phdr[i].p_flags & PF_X) {
            owned[owned_count].begin = (char *)info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            owned[owned_count].end = owned[owned_count].begin + info->dlpi_phdr[i].p_memsz;
            owned_count++;
        }
    return 0;
}

static int refused(void *caller) {
    if (!atomic_load(&armed))
        return 0;
    int own = 0;
    for (int i = 0; i < owned_count && !own; i++)
        own = owned[i].begin <= (char *)caller && (char *)caller < owned[i].end;
    int any = due(ANY_ALLOCATION);
    if (!(own && due(OWN_ALLOCATION)) && !any)
        return 0;
    errno = ENOMEM;
    return 1;
}

#define CALLER __builtin_return_address(0)

void *malloc(size_t size) { return refused(CALLER) ? NULL : __libc_malloc(size); }
void *calloc(size_t count, size_t size) { return refused(CALLER) ? NULL : __libc_calloc(count, size); }
void *realloc(void *old, size_t size) { return refused(CALLER) ? NULL : __libc_realloc(old, size); }
void *aligned_alloc(size_t edge, size_t size) { return refused(CALLER) ? NULL : __libc_memalign(edge, size); }
void *memalign(size_t edge, size_t size) { return refused(CALLER) ? NULL : __libc_memalign(edge, size); }

int posix_memalign(void **place, size_t edge, size_t size) {
    if (refused(CALLER))
        return ENOMEM;
    void *made = __libc_memalign(edge, size);
    if (made)
        *place = made;
    return made ? 0 : ENOMEM;
}

/* ---- threads */

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument) {
    static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (!real)
        real = dlsym(RTLD_NEXT, "pthread_create");
    return due(THREAD_START) ? EAGAIN : real(thread, attributes, run, argument);
}

/* ---- */

/* From now on calls are counted, and those of a kind from the first to the last index fail. kind -1: none does. */
void injector_arm(long kind, long first, long last, long action, long error, long shown) {
    owned_count = 0;
    dl_iterate_phdr(note_owned, NULL);
    for (int i = 0; i < KINDS; i++)
        injector_counts[i] = 0;
    injector_fired = injector_closed = 0;
    fault_kind = kind, fault_first = first, fault_last = last, fault_action = action, fault_errno = error, fault_shown = shown;
    atomic_store(&armed, 1);
}

void injector_disarm(void) { atomic_store(&armed, 0); }
