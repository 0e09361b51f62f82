/* Seccomp user notification: starting a command whose opens wait for a supervisor, and the supervisor's system calls. */
#ifndef ESTARGZ_RECORD_H
#define ESTARGZ_RECORD_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/magic.h>
#include <linux/openat2.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* The filter knows numbers of one architecture; calls by another's numbers (i386 on x86-64) pass unseen. */
#if defined(__x86_64__)
#define EST_AUDIT_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define EST_AUDIT_ARCH AUDIT_ARCH_AARCH64
#endif
#ifdef EST_AUDIT_ARCH
enum { EST_CAN_RECORD = 1 };
#else
enum { EST_CAN_RECORD = 0 };
#define EST_AUDIT_ARCH 0
#endif
#ifdef SYS_open
#define EST_SYS_OPEN SYS_open
#else
#define EST_SYS_OPEN -1 /* newer architectures have no open: the number of no call */
#endif

/* Newer than some headers that the package is compiled with. */
#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5)
#endif
#define EST_NOTIF_SET_FLAGS SECCOMP_IOW(4, uint64_t) /* Linux 6.6 */
#define EST_NOTIF_SYNC_WAKE_UP 1UL
#ifndef SYS_close_range
#define SYS_close_range 436 /* the same numbers on every architecture */
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

/* ------------------------------------------------------------------------------------------------------ the filter */

#define EST_LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define EST_ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define EST_IF(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)(value), yes, no)

/* Notifies of calls that may read a regular file's content: executions, and opens that are not for a mere handle, a
 * directory, writing only, emptying, or a file that must not exist yet. openat2's flags lie in memory: all of them. */
static const struct sock_filter est_filter[] = {
    /*  0 */ EST_LOAD(arch),
    /*  1 */ EST_IF(EST_AUDIT_ARCH, 0, 17),
    /*  2 */ EST_LOAD(nr),
    /*  3 */ EST_IF(SYS_execve, 14, 0),
    /*  4 */ EST_IF(SYS_execveat, 13, 0),
    /*  5 */ EST_IF(SYS_openat2, 12, 0),
    /*  6 */ EST_IF(SYS_openat, 3, 0),
    /*  7 */ EST_IF(EST_SYS_OPEN, 0, 11),
    /*  8 */ EST_LOAD(args[1]),
    /*  9 */ BPF_STMT(BPF_JMP | BPF_JA, 1),
    /* 10 */ EST_LOAD(args[2]),
    /* 11 */ BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, O_PATH | O_DIRECTORY | O_TRUNC, 7, 0),
    /* 12 */ BPF_STMT(BPF_MISC | BPF_TAX, 0),
    /* 13 */ BPF_STMT(BPF_ALU | BPF_AND | BPF_K, O_ACCMODE),
    /* 14 */ EST_IF(O_WRONLY, 4, 0),
    /* 15 */ BPF_STMT(BPF_MISC | BPF_TXA, 0),
    /* 16 */ BPF_STMT(BPF_ALU | BPF_AND | BPF_K, O_CREAT | O_EXCL),
    /* 17 */ EST_IF(O_CREAT | O_EXCL, 1, 0),
    /* 18 */ BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
    /* 19 */ EST_ALLOW,
};

/* The same test for flags that were read from memory. */
static inline int est_reads_content(uint64_t flags) {
    return !(flags & (O_PATH | O_DIRECTORY | O_TRUNC)) && (flags & O_ACCMODE) != O_WRONLY &&
           (flags & (O_CREAT | O_EXCL)) != (O_CREAT | O_EXCL);
}

/* Filters this process and all it will start; the listener's descriptor, closed on exec, or -1 with errno. Who has the
 * right to filter itself keeps all rights; who has not must first give up gaining any by setuid programs. */
static inline int est_listen(void) {
    const struct sock_fprog program = {sizeof est_filter / sizeof *est_filter, (struct sock_filter *)est_filter};
    /* once an open is looked at, only death ends its wait, and no signal makes it fail: Linux 5.19 */
    unsigned long flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    for (;;) {
        long listener = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
        if (listener < 0 && errno == EACCES && !prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
            listener = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
        if (listener >= 0 || errno != EINVAL || !(flags & SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV)) return (int)listener;
        flags &= ~SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    }
}

/* --------------------------------------------------------------------------------------------- starting the command */

enum est_stage {
    EST_STARTED = 0,
    EST_LISTENING,  /* the message that carries the listener */
    EST_NO_FOLDER,  /* the working directory could not be entered */
    EST_NO_FILTER,
    EST_NO_PROGRAM, /* no candidate could be executed */
    EST_NO_CONTINUE /* the kernel cannot let a notified call go on */
};

typedef struct {
    int stage;
    int sys_errno;
} est_message;

typedef struct {
    char **programs;        /* paths to try in turn, up to NULL */
    char **arguments;
    char **environment;
    const char *folder;     /* working directory, or NULL */
    const sigset_t *mask;   /* signals blocked in the command */
} est_command;

static inline void est_tell(int channel, int stage, int sys_errno, int listener) {
    est_message message = {stage, sys_errno};
    struct iovec text = {&message, sizeof message};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } carried = {0};
    struct msghdr packet = {.msg_iov = &text, .msg_iovlen = 1};
    if (listener >= 0) {
        packet.msg_control = &carried;
        packet.msg_controllen = sizeof carried;
        *CMSG_FIRSTHDR(&packet) = (struct cmsghdr){CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&packet)), &listener, sizeof listener);
    }
    (void)!sendmsg(channel, &packet, MSG_NOSIGNAL);
}

/* 1 with a message and perhaps a listener, 0 when the command has been executed or is gone, -1 with errno. */
static inline int est_hear(int channel, est_message *message, int *listener) {
    struct iovec text = {message, sizeof *message};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } carried = {0};
    struct msghdr packet = {
        .msg_iov = &text, .msg_iovlen = 1, .msg_control = &carried, .msg_controllen = sizeof carried};
    ssize_t size = recvmsg(channel, &packet, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (size != (ssize_t)sizeof *message) return size < 0 ? -1 : 0;
    if (CMSG_FIRSTHDR(&packet)) memcpy(listener, CMSG_DATA(CMSG_FIRSTHDR(&packet)), sizeof *listener);
    return 1;
}

/* Handlers must not run in the child; Python ignores two signals that programs expect to die of. */
static inline void est_reset_signals(const sigset_t *mask) {
    const struct sigaction usual = {.sa_handler = SIG_DFL};
    struct sigaction found;
    for (int number = 1; number < NSIG; number++) {
        if (sigaction(number, NULL, &found)) continue;
        if (found.sa_handler != SIG_IGN || number == SIGPIPE || number == SIGXFSZ) sigaction(number, &usual, NULL);
    }
    sigprocmask(SIG_SETMASK, mask, NULL);
}

/* The child's part: plain system calls only, for other threads of the parent may have held any lock. */
static inline void est_become(const est_command *command, int channel) {
    int listener, reason = ENOENT;
    est_reset_signals(command->mask);
    if (command->folder && chdir(command->folder)) {
        est_tell(channel, EST_NO_FOLDER, errno, -1);
        _exit(127);
    }
    listener = est_listen();
    if (listener < 0) {
        est_tell(channel, EST_NO_FILTER, errno, -1);
        _exit(127);
    }
    est_tell(channel, EST_LISTENING, 0, listener);
    for (char **program = command->programs; *program; program++) {
        execve(*program, command->arguments, command->environment);
        if (errno != ENOENT && errno != ENOTDIR) reason = errno;
        if (errno != ENOENT && errno != ENOTDIR && errno != EACCES) break;
    }
    est_tell(channel, EST_NO_PROGRAM, reason, -1);
    _exit(127);
}

/* Starts the command; its process, with the parent's end of the channel in *channel, or -1 with errno. All signals are
 * blocked by the caller. */
static inline pid_t est_start(const est_command *command, int *channel) {
    int ends[2], reason;
    pid_t child;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends)) return -1;
    child = fork();
    if (child == 0) est_become(command, ends[1]);
    reason = errno;
    close(ends[1]);
    if (child < 0) close(ends[0]);
    *channel = child < 0 ? -1 : ends[0];
    errno = reason;
    return child;
}

/* ------------------------------------------------------------------------------------------------ the listener's side */

typedef struct {
    uint64_t id;
    int thread;
    int call;           /* number of the system call */
    uint64_t arguments[6];
} est_call;

typedef union {
    struct seccomp_notif notice;
    struct seccomp_notif_resp answer;
    char space[512];    /* newer kernels may know longer ones */
} est_packet;

/* Whether this kernel's packets fit. */
static inline int est_packets_fit(void) {
    struct seccomp_notif_sizes sizes;
    return !syscall(SYS_seccomp, SECCOMP_GET_NOTIF_SIZES, 0, &sizes) && sizes.seccomp_notif <= sizeof(est_packet) &&
           sizes.seccomp_notif_resp <= sizeof(est_packet);
}

/* Lets the supervisor wake up on the CPU of the waiting call, as they never run at the same time. */
static inline void est_wake_together(int listener) {
    (void)ioctl(listener, EST_NOTIF_SET_FLAGS, EST_NOTIF_SYNC_WAKE_UP);
}

/* The next waiting call: 1, or 0 when it has gone meanwhile, or -1 with errno. */
static inline int est_next_call(int listener, est_call *call) {
    est_packet packet;
    memset(&packet, 0, sizeof packet);
    if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &packet))
        return errno == ENOENT || errno == EINTR || errno == ENOTCONN ? 0 : -1; /* ENOTCONN: the last process has gone */
    call->id = packet.notice.id;
    call->thread = (int)packet.notice.pid;
    call->call = packet.notice.data.nr;
    memcpy(call->arguments, packet.notice.data.args, sizeof call->arguments);
    return 1;
}

/* Whether the call still waits: what was read by its thread's number was that thread's then. */
static inline int est_still_waits(int listener, uint64_t id) {
    return !ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &id);
}

/* Lets the call go on as if nothing had been; 0, also when it has gone meanwhile, or -1 with errno. */
static inline int est_let_go(int listener, uint64_t id) {
    est_packet packet;
    memset(&packet, 0, sizeof packet);
    packet.answer.id = id;
    packet.answer.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
    return !ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &packet) || errno == ENOENT ? 0 : -1;
}

/* Processes that go on without a supervisor would see every open fail: a process of its own lets their calls go until
 * the last of them has gone. */
static inline void est_leave_alone(int listener) {
    sigset_t all, before;
    pid_t between;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);
    between = fork();
    if (between == 0) {
        struct pollfd waiting = {0, POLLIN, 0};
        est_call call;
        setsid();
        if (fork() != 0) _exit(0);
        dup2(listener, 0);
        syscall(SYS_close_range, 1, ~0U, 0);
        (void)!chdir("/");
        while (poll(&waiting, 1, -1) < 0 ? errno == EINTR : !(waiting.revents & (POLLHUP | POLLERR | POLLNVAL)))
            if (waiting.revents & POLLIN && est_next_call(0, &call) > 0) est_let_go(0, call.id);
        _exit(0);
    }
    while (between > 0 && waitpid(between, NULL, 0) < 0 && errno == EINTR) {}
    sigprocmask(SIG_SETMASK, &before, NULL);
}

/* --------------------------------------------------------------------------------------------- looking into a thread */

/* Up to `size` bytes at an address of the thread's memory, as many as can be read; -1 with errno if none. */
static inline ssize_t est_peek(int thread, uint64_t address, void *data, size_t size) {
    size_t first = 4096 - (address & 4095); /* what follows may be another page that is not there */
    struct iovec here = {data, size};
    struct iovec there[2];
    char path[64];
    ssize_t count;
    int memory;
    if (first > size) first = size;
    there[0] = (struct iovec){(void *)(uintptr_t)address, first};
    there[1] = (struct iovec){(void *)(uintptr_t)(address + first), size - first};
    count = process_vm_readv(thread, &here, 1, there, size > first ? 2 : 1, 0);
    if (count >= 0 || (errno != ENOSYS && errno != EPERM)) return count;
    /* a kernel or a sandbox without that call */
    snprintf(path, sizeof path, "/proc/%d/mem", thread);
    memory = open(path, O_RDONLY | O_CLOEXEC);
    if (memory < 0) return -1;
    count = pread(memory, data, size, (off_t)address);
    close(memory);
    return count;
}

/* A handle (O_PATH) of what a path leads to, or -1 with errno. */
static inline int est_lookup(int directory, const char *path, int flags, uint64_t resolve) {
    struct open_how how = {.flags = (unsigned)(O_PATH | O_CLOEXEC | flags), .resolve = resolve};
    for (int attempts = 0;; attempts++) {
        long handle = syscall(SYS_openat2, directory, path, &how, sizeof how);
        if (handle >= 0 || errno != EAGAIN || attempts == 128) return (int)handle; /* EAGAIN: a rename at the same time */
    }
}

/* What tells one root directory from another; mounts of another namespace have other numbers. */
typedef struct {
    uint64_t device, inode, mount;
} est_place;

static inline int est_place_of(const char *path, est_place *place) {
    struct statx found;
    if (statx(AT_FDCWD, path, AT_NO_AUTOMOUNT, STATX_INO | STATX_MNT_ID, &found)) return -1;
    place->device = (uint64_t)found.stx_dev_major << 32 | found.stx_dev_minor;
    place->inode = found.stx_ino;
    place->mount = found.stx_mask & STATX_MNT_ID ? found.stx_mnt_id : 0;
    return 0;
}

/* Whether a file is the kernel's own, with no content that a layer could hold. */
static inline int est_is_of_kernel(int handle) {
    struct statfs found;
    if (fstatfs(handle, &found)) return 0;
    switch ((uint32_t)found.f_type) {
    case PROC_SUPER_MAGIC: case SYSFS_MAGIC: case CGROUP_SUPER_MAGIC: case CGROUP2_SUPER_MAGIC: case DEBUGFS_MAGIC:
    case TRACEFS_MAGIC: case SECURITYFS_MAGIC: case SELINUX_MAGIC:
        return 1;
    default:
        return 0;
    }
}

#endif
