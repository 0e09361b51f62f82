"""Which files a command opens, told by seccomp user notification.

The command and all that it starts carry a filter that stops calls which may read a file's content until the supervisor,
the caller's thread, has looked where their paths lead. It then lets every call go on as it is. Paths are looked up by the
kernel itself, from the calling thread's own working directory, directory handle and root.
"""

from cpython.exc cimport PyErr_CheckSignals, PyErr_SetFromErrno
from libc.errno cimport EACCES, EINTR, ELOOP, ENOSYS, EPERM, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp, memcpy, memset, strlen, strncmp

from posix.stat cimport S_ISREG, struct_stat
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.types cimport pid_t
from posix.unistd cimport close, pread, readlink

from estargz._memory cimport buffer, buffer_append, buffer_free, byte_map, map_find, map_free, map_insert

cdef extern from "gil.h":      # what `with gil` means
    pass

cdef extern from "record.h" nogil:
    enum: EST_CAN_RECORD, EST_SYS_OPEN, SYS_openat, SYS_openat2, SYS_execve, SYS_execveat, SYS_pidfd_open
    enum: EST_STARTED, EST_LISTENING, EST_NO_FOLDER, EST_NO_FILTER, EST_NO_PROGRAM, EST_NO_CONTINUE
    enum: AT_FDCWD, AT_EMPTY_PATH, AT_SYMLINK_NOFOLLOW, O_NOFOLLOW, O_RDONLY, O_CLOEXEC, O_DIRECTORY, O_NONBLOCK
    enum: RESOLVE_NO_MAGICLINKS, RESOLVE_IN_ROOT, RESOLVE_BENEATH
    enum: POLLIN, SIG_SETMASK, SIG_BLOCK, WNOHANG, SFD_CLOEXEC, SFD_NONBLOCK
    enum: PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER
    int SIGKILL

    ctypedef struct est_message:
        int stage
        int sys_errno

    ctypedef struct est_command:
        char **programs
        char **arguments
        char **environment
        const char *folder
        const sigset_t *mask

    ctypedef struct est_call:
        uint64_t id
        int thread
        int call
        uint64_t arguments[6]

    ctypedef struct est_place:
        uint64_t device
        uint64_t inode
        uint64_t mount

    pid_t est_start(const est_command *command, int *channel)
    int est_hear(int channel, est_message *message, int *listener)
    bint est_packets_fit()
    void est_wake_together(int listener)
    int est_next_call(int listener, est_call *call)
    bint est_still_waits(int listener, uint64_t id)
    int est_let_go(int listener, uint64_t id)
    void est_leave_alone(int listener)
    ssize_t est_peek(int thread, uint64_t address, void *data, size_t size)
    int est_lookup(int directory, const char *path, int flags, uint64_t resolve)
    int est_place_of(const char *path, est_place *place)
    bint est_reads_content(uint64_t flags)
    bint est_is_of_kernel(int handle)

    ctypedef struct sigset_t:
        pass
    struct pollfd:
        int fd
        short events
        short revents
    struct signalfd_siginfo:
        uint32_t ssi_signo
        int ssi_code
    int poll(pollfd *files, unsigned long count, int milliseconds)
    int sigfillset(sigset_t *signals)
    int sigemptyset(sigset_t *signals)
    int sigaddset(sigset_t *signals, int number)
    int sigismember(const sigset_t *signals, int number)
    int pthread_sigmask(int how, const sigset_t *signals, sigset_t *before)
    int signalfd(int handle, const sigset_t *signals, int flags)
    int kill(pid_t process, int number)
    pid_t waitpid(pid_t process, int *status, int options)
    bint WIFEXITED(int status)
    int WEXITSTATUS(int status)
    int WTERMSIG(int status)
    int prctl(int option, ...)
    long syscall(long number, ...)
    int open(const char *path, int flags)
    int fstat(int handle, struct_stat *found)
    int lstat(const char *path, struct_stat *found)
    ssize_t read(int handle, void *data, size_t size)

cdef extern from * nogil:
    """
    /* What a supervisor passes on to the command. */
    enum { EST_SIGNALS = 6 };
    static const int est_passed_on[EST_SIGNALS] = {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};

    /* Whether this process ignores a signal; an ignored one is not waited for, and so is not passed on. */
    static inline int est_ignores(int number) {
        struct sigaction found;
        return !sigaction(number, NULL, &found) && found.sa_handler == SIG_IGN;
    }
    """
    enum: EST_SIGNALS
    const int est_passed_on[]
    bint est_ignores(int number)

cdef enum:
    PATH_LIMIT = 4096           # bytes with the NUL, as in the kernel
    SCRIPT_LIMIT = 256          # how much of a script's first line the kernel reads
    INTERPRETERS = 6            # programs that one execution may lead through: the kernel's limit of nested scripts
    PROGRAM_HEADERS = 1 << 16   # bytes, the kernel's limit

cdef int64_t LISTEN_EVERY_NS = 100000000    # how often Python's signal handlers get their turn


ctypedef struct recorder:
    int listener
    int channel                 # what the child tells before it is the command
    int process                 # pidfd of the command, until it has ended
    int signals                 # signalfd of those that are passed on
    pid_t command
    int status                  # the command's exit status, -1 while it runs
    bint until_exit
    bint adopt
    est_message trouble         # why the command could not be started
    int sys_errno               # why the supervisor failed
    est_place place             # of the supervisor's root
    const char *root            # the directory whose files are listed, with a slash at its end
    size_t root_size
    byte_map seen
    buffer listed               # NUL-terminated paths below root, in order of first opening
    uint64_t unread             # calls whose paths could not be read or followed
    bint no_memory


# ------------------------------------------------------------------------------------------------- where a path leads

cdef int folder_of(int thread, int directory) noexcept nogil:
    """A handle of the directory that a thread's relative paths begin at."""
    cdef char path[64]
    if directory == AT_FDCWD:
        snprintf(path, sizeof(path), "/proc/%d/cwd", thread)
    else:
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", thread, directory)
    return est_lookup(AT_FDCWD, path, 0, 0)


cdef ssize_t name_of(int handle, char *name) noexcept nogil:
    """The path of what a handle stands for, in PATH_LIMIT bytes; its length, or -1."""
    cdef char link[64]
    cdef ssize_t size
    snprintf(link, sizeof(link), "/proc/self/fd/%d", handle)
    size = readlink(link, name, PATH_LIMIT)
    if size <= 0 or size >= PATH_LIMIT:
        return -1
    name[size] = 0
    return size


cdef int lookup_in_root(int thread, int directory, const char *path, int flags, uint64_t scope) noexcept nogil:
    """The same for a thread whose root is not ours: links that begin with a slash begin at its root."""
    cdef char link[64]
    cdef char top[PATH_LIMIT + 1]
    cdef char name[3 * PATH_LIMIT]
    cdef ssize_t top_size, size
    cdef int folder
    cdef int found = -1
    snprintf(link, sizeof(link), "/proc/%d/root", thread)
    cdef int root = est_lookup(AT_FDCWD, link, O_DIRECTORY, 0)
    if root < 0:
        return -1
    if path[0] == c'/':
        found = est_lookup(root, path, flags, scope | RESOLVE_IN_ROOT)
    else:
        folder = folder_of(thread, directory)
        top_size = name_of(root, top)
        size = name_of(folder, name) if folder >= 0 else -1
        if top_size == 1:
            top_size = 0
        if top_size >= 0 and size >= top_size and memcmp(name, top, top_size) == 0 and name[top_size] in (0, c'/'):
            snprintf(name + size, sizeof(name) - size, "/%s", path)
            found = est_lookup(root, name + top_size, flags, scope | RESOLVE_IN_ROOT)
        elif folder >= 0:       # a directory from outside its root
            found = est_lookup(folder, path, flags, scope)
        if folder >= 0:
            close(folder)
    close(root)
    return found


cdef int lookup_own(int thread, const char *path, int flags) noexcept nogil:
    """What a path stands for that leads through the thread's own entry of /proc, which the supervisor's is not."""
    cdef char name[PATH_LIMIT + 64]
    if strncmp(path, "/proc/self/", 11) == 0:
        snprintf(name, sizeof(name), "/proc/%d/%s", thread, path + 11)
    elif strncmp(path, "/proc/thread-self/", 18) == 0:
        snprintf(name, sizeof(name), "/proc/%d/%s", thread, path + 18)
    elif strncmp(path, "/dev/fd/", 8) == 0:
        snprintf(name, sizeof(name), "/proc/%d/fd/%s", thread, path + 8)
    elif strncmp(path, "/dev/stdin", 11) == 0:
        snprintf(name, sizeof(name), "/proc/%d/fd/0", thread)
    elif strncmp(path, "/proc/", 6) == 0:
        snprintf(name, sizeof(name), "%s", path)
    else:
        (&errno)[0] = ELOOP
        return -1
    return est_lookup(AT_FDCWD, name, flags, 0)


cdef int find(recorder *r, int thread, int directory, const char *path, int flags, uint64_t scope) noexcept nogil:
    """A handle of what the thread will find at a path, or -1 with errno; `scope` has the RESOLVE_ flags of its call."""
    cdef char link[64]
    cdef est_place place
    cdef int folder = AT_FDCWD
    cdef int found
    cdef bint scoped = scope & (RESOLVE_BENEATH | RESOLVE_IN_ROOT) != 0
    scope |= RESOLVE_NO_MAGICLINKS
    if not scoped:
        snprintf(link, sizeof(link), "/proc/%d/root", thread)
        if est_place_of(link, &place) < 0:
            return -1
    if not scoped and memcmp(&place, &r.place, sizeof(place)) != 0:
        found = lookup_in_root(thread, directory, path, flags, scope)
    else:
        if scoped or path[0] != c'/':
            folder = folder_of(thread, directory)
            if folder < 0:
                return -1
        found = est_lookup(folder, path, flags, scope)
        if folder >= 0:
            close(folder)
    if found < 0 and errno == ELOOP and not scoped:
        found = lookup_own(thread, path, flags)
    return found


# --------------------------------------------------------------------------------------------------------- the listing

cdef bint is_gone(int handle, char *name, ssize_t size) noexcept nogil:
    """Whether the kernel's mark of a name that was removed is at the end of this one, and no file is called so."""
    cdef struct_stat opened, named
    if size < 10 or memcmp(name + size - 10, b" (deleted)", 10) != 0:
        return False
    return (fstat(handle, &opened) < 0 or lstat(name, &named) < 0 or opened.st_ino != named.st_ino
            or opened.st_dev != named.st_dev)


cdef void note(recorder *r, int handle) noexcept nogil:
    """Lists a regular file below the root, once."""
    cdef char name[PATH_LIMIT + 1]
    cdef char *path
    cdef struct_stat found
    cdef ssize_t size
    if fstat(handle, &found) < 0 or not S_ISREG(found.st_mode):
        return
    size = name_of(handle, name)
    if size < 0:
        r.unread += 1
        return
    if <size_t>size <= r.root_size or memcmp(name, r.root, r.root_size) != 0:
        return
    path = name + r.root_size
    if map_find(&r.seen, path, size - r.root_size) != NULL or est_is_of_kernel(handle) or is_gone(handle, name, size):
        return
    if (map_insert(&r.seen, path, size - r.root_size, 0) == NULL
            or not buffer_append(&r.listed, path, size - r.root_size + 1)):
        r.no_memory = True


cdef bint script_interpreter(const char *head, ssize_t size, char *path) noexcept nogil:
    """The program that a script's first line names."""
    cdef ssize_t at = 2
    cdef ssize_t end
    if size < 3 or head[0] != c'#' or head[1] != c'!':
        return False
    while at < size and head[at] in (c' ', c'\t'):
        at += 1
    end = at
    while end < size and head[end] not in (c' ', c'\t', c'\n', 0):
        end += 1
    if end == at:
        return False
    memcpy(path, head + at, end - at)
    path[end - at] = 0
    return True


cdef uint64_t field(const uint8_t *data, size_t at, int size) noexcept nogil:
    """A little-endian number."""
    cdef uint64_t value = 0
    cdef int i
    for i in range(size):
        value |= <uint64_t>data[at + i] << (8 * i)
    return value


cdef bint elf_interpreter(int handle, const uint8_t *head, ssize_t size, char *path) noexcept nogil:
    """The dynamic loader that an ELF file asks for (PT_INTERP)."""
    cdef uint8_t header[56]
    cdef bint wide
    cdef int i, count, width
    cdef uint64_t table, offset, length
    if size < 64 or memcmp(head, b"\x7fELF", 4) != 0 or head[5] != 1 or head[4] not in (1, 2):
        return False
    wide = head[4] == 2
    table = field(head, 32, 8) if wide else field(head, 28, 4)
    count = field(head, 56, 2) if wide else field(head, 44, 2)
    width = 56 if wide else 32
    if field(head, 54 if wide else 42, 2) != <uint64_t>width or count * width > PROGRAM_HEADERS:
        return False
    for i in range(count):
        if pread(handle, header, width, table + <uint64_t>(i * width)) != width:
            return False
        if field(header, 0, 4) != 3:
            continue
        offset = field(header, 8, 8) if wide else field(header, 4, 4)
        length = field(header, 32, 8) if wide else field(header, 16, 4)
        if length < 2 or length > PATH_LIMIT or pread(handle, path, length, offset) != <ssize_t>length:
            return False
        return path[length - 1] == 0
    return False


cdef int next_program(recorder *r, int thread, int program, bint *last) noexcept nogil:
    """The program that the kernel opens besides a script or an ELF file, or -1; *last when there is none after it."""
    cdef char link[64]
    cdef char head[SCRIPT_LIMIT]
    cdef char path[PATH_LIMIT]
    cdef ssize_t size
    cdef int found = -1
    snprintf(link, sizeof(link), "/proc/self/fd/%d", program)
    cdef int handle = open(link, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
    last[0] = True
    if handle < 0:
        return -1
    size = pread(handle, head, sizeof(head), 0)
    if script_interpreter(head, size, path):
        last[0] = False
        found = find(r, thread, AT_FDCWD, path, 0, 0)
    elif elf_interpreter(handle, <uint8_t *>head, size, path):
        found = find(r, thread, AT_FDCWD, path, 0, 0)
    close(handle)
    return found


cdef void note_program(recorder *r, uint64_t id, int thread, int program) noexcept nogil:
    """Lists a program and the interpreters that the kernel opens for it. Takes the handle."""
    cdef int programs[INTERPRETERS + 1]
    cdef struct_stat found
    cdef int count = 0
    cdef int i
    cdef bint last = False
    cdef bint runs = True
    while program >= 0 and runs:
        programs[count] = program
        count += 1
        runs = fstat(program, &found) == 0 and S_ISREG(found.st_mode) and found.st_mode & 0o111 != 0
        if not runs or last or count > INTERPRETERS:
            break
        program = next_program(r, thread, program, &last)
        runs = program >= 0 or last     # a script whose interpreter is missing is not executed
    runs = runs and est_still_waits(r.listener, id)
    for i in range(count):
        if runs:
            note(r, programs[i])
        close(programs[i])


# ------------------------------------------------------------------------------------------------------ one call

cdef bint read_path(recorder *r, est_call *call, uint64_t address, char *path) noexcept nogil:
    """The call's path. False when there is none that the call could use."""
    cdef ssize_t size = est_peek(call.thread, address, path, PATH_LIMIT)
    if size < 0:
        r.unread += (errno == EPERM or errno == EACCES or errno == ENOSYS) and est_still_waits(r.listener, call.id)
        return False
    return memchr(path, 0, size) != NULL


cdef void look_at(recorder *r, est_call *call) noexcept nogil:
    cdef char path[PATH_LIMIT]
    cdef uint64_t how[3]
    cdef uint64_t address = call.arguments[0]
    cdef uint64_t scope = 0
    cdef int directory = AT_FDCWD
    cdef int flags = 0
    cdef int handle
    cdef bint executes = call.call == SYS_execve or call.call == SYS_execveat
    cdef bint of_handle = False
    if call.call == SYS_openat2:
        if call.arguments[3] < sizeof(how):
            return
        if est_peek(call.thread, call.arguments[2], how, sizeof(how)) != sizeof(how) or not est_reads_content(how[0]):
            return
        flags = <int>how[0] & O_NOFOLLOW
        scope = how[2]
    elif call.call == SYS_openat:
        flags = <int>call.arguments[2] & O_NOFOLLOW
    elif call.call == SYS_execveat:
        flags = O_NOFOLLOW if call.arguments[4] & AT_SYMLINK_NOFOLLOW else 0
        of_handle = call.arguments[4] & AT_EMPTY_PATH != 0
    elif call.call == EST_SYS_OPEN:
        flags = <int>call.arguments[1] & O_NOFOLLOW
    if call.call == SYS_openat or call.call == SYS_openat2 or call.call == SYS_execveat:
        directory = <int>call.arguments[0]
        address = call.arguments[1]
    if not read_path(r, call, address, path) or (path[0] == 0 and not of_handle):
        return
    if path[0] == 0:
        handle = folder_of(call.thread, directory)
    else:
        handle = find(r, call.thread, directory, path, flags, scope)
    if handle < 0:
        r.unread += (errno == ELOOP or errno == EPERM or errno == ENOSYS) and est_still_waits(r.listener, call.id)
    elif executes:
        note_program(r, call.id, call.thread, handle)
    else:
        if est_still_waits(r.listener, call.id):
            note(r, handle)
        close(handle)


cdef bint answer(recorder *r) noexcept nogil:
    """Looks at the next call and lets it go on. False when the supervisor cannot go on."""
    cdef est_call call
    cdef int found = est_next_call(r.listener, &call)
    if found <= 0:
        r.sys_errno = errno if found < 0 else 0
        return found == 0
    look_at(r, &call)
    if est_let_go(r.listener, call.id) == 0:
        return True
    r.trouble.stage = EST_NO_CONTINUE
    r.trouble.sys_errno = errno
    return False


# ------------------------------------------------------------------------------------------------------ supervising

cdef int64_t clock_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef void close_kept(int *handle) noexcept nogil:
    if handle[0] >= 0:
        close(handle[0])
    handle[0] = -1


cdef int call_handlers() except -1 with gil:
    """Gives Python's signal handlers their turn; they may raise."""
    return PyErr_CheckSignals()


cdef void collect(recorder *r, pid_t process, int options) noexcept nogil:
    """Takes the exit status of the command, or, with -1, of every child that has ended."""
    cdef int status
    cdef pid_t ended
    while True:
        ended = waitpid(process, &status, options)
        if ended < 0 and errno == EINTR:
            continue
        if ended == r.command or (ended < 0 and process == r.command):
            r.status = 255 if ended < 0 else WEXITSTATUS(status) if WIFEXITED(status) else 128 + WTERMSIG(status)
            close_kept(&r.process)
        if ended <= 0 or process != -1:
            return


cdef void listen_to_child(recorder *r) noexcept nogil:
    cdef est_message message
    if est_hear(r.channel, &message, &r.listener) <= 0:
        close_kept(&r.channel)
    elif message.stage == EST_LISTENING:
        est_wake_together(r.listener)
    else:
        r.trouble = message


cdef bint pass_signal_on(recorder *r) noexcept nogil:
    """False when the signal is for the supervisor itself, the command having ended."""
    cdef signalfd_siginfo signal
    if read(r.signals, &signal, sizeof(signal)) != sizeof(signal):
        return True
    if r.status >= 0:
        return False
    if signal.ssi_code <= 0:    # what the terminal sends, the command has got as well
        kill(r.command, signal.ssi_signo)
    return True


cdef int supervise(recorder *r) except -1 nogil:
    """Until the last process has ended, or whatever else ends the recording."""
    cdef pollfd waiting[4]
    cdef int64_t listened = clock_ns()
    cdef int count
    memset(waiting, 0, sizeof(waiting))
    while r.status < 0 or (r.listener >= 0 and not r.until_exit):
        waiting[0].fd = r.listener
        waiting[1].fd = r.channel
        waiting[2].fd = r.process
        waiting[3].fd = r.signals
        for i in range(4):
            waiting[i].events = POLLIN
            waiting[i].revents = 0
        count = poll(waiting, 4, LISTEN_EVERY_NS // 1000000)
        if count <= 0 or clock_ns() - listened > LISTEN_EVERY_NS:
            listened = clock_ns()
            if r.adopt:
                collect(r, -1, WNOHANG)
            call_handlers()
        if count <= 0:
            continue
        if waiting[0].revents & POLLIN:
            if not answer(r):
                break
        elif waiting[0].revents:        # the last of them has gone
            close_kept(&r.listener)
        if waiting[1].revents:
            listen_to_child(r)
        if waiting[3].revents and not pass_signal_on(r):
            break
        if waiting[2].revents and r.process >= 0:
            collect(r, r.command, 0)
    return 0


cdef void finish(recorder *r) noexcept nogil:
    """Leaves nothing behind: no handles, and no process that waits for us. A command that still runs is killed."""
    if r.status < 0:
        kill(r.command, SIGKILL)
        collect(r, r.command, 0)
    if r.listener >= 0:
        est_leave_alone(r.listener)
    close_kept(&r.listener)
    close_kept(&r.channel)
    close_kept(&r.process)
    close_kept(&r.signals)


cdef char **strings_of(list values) except NULL:
    """The addresses of bytes objects, which the caller keeps, up to a NULL."""
    cdef Py_ssize_t i
    cdef bytes value
    cdef char **strings = <char **>malloc((len(values) + 1) * sizeof(char *))
    if strings == NULL:
        raise MemoryError
    for i in range(len(values)):
        value = values[i]
        strings[i] = value
    strings[len(values)] = NULL
    return strings


cdef int signals_passed_on(const sigset_t *before, sigset_t *told) noexcept nogil:
    """A handle that tells of the signals that are passed on: those that this thread neither blocks nor ignores."""
    cdef int i
    sigemptyset(told)
    for i in range(EST_SIGNALS):
        if not est_ignores(est_passed_on[i]) and not sigismember(before, est_passed_on[i]):
            sigaddset(told, est_passed_on[i])
    return signalfd(-1, told, SFD_CLOEXEC | SFD_NONBLOCK)


cdef bint start(recorder *r, est_command *command) noexcept nogil:
    """Starts the command with signals as they were, and leaves blocked here what is passed on. False with errno."""
    cdef sigset_t everything, told
    cdef int reason
    sigfillset(&everything)
    pthread_sigmask(SIG_SETMASK, &everything, <sigset_t *>command.mask)
    r.signals = signals_passed_on(command.mask, &told)
    r.command = est_start(command, &r.channel) if r.signals >= 0 else -1
    reason = errno
    if r.command > 0:
        r.process = syscall(SYS_pidfd_open, r.command, 0)
        reason = errno
    pthread_sigmask(SIG_SETMASK, command.mask, NULL)
    if r.process >= 0:
        pthread_sigmask(SIG_BLOCK, &told, NULL)
    (&errno)[0] = reason
    return r.process >= 0


cdef list paths_of(recorder *r):
    cdef list paths = []
    cdef const char *path
    cdef size_t at = 0
    while at < r.listed.size:
        path = <const char *>r.listed.data + at
        paths.append(path)
        at += strlen(path) + 1
    return paths


def run(
    list programs,
    list arguments,
    list environment,
    bytes folder,
    bytes root,
    *,
    bint until_exit,
    bint adopt_orphans,
):
    """Runs a command and waits for it; see recording.record. Everything is bytes without NUL.

    Returns (paths, exit status, calls that could not be followed, stage, errno); a stage that is not STARTED says why
    there was no command to record.
    """
    cdef recorder r
    cdef est_command command
    cdef sigset_t before
    cdef int reason = 0
    cdef int was_adopting = 0       # PR_SET_CHILD_SUBREAPER before
    memset(&r, 0, sizeof(r))
    memset(&command, 0, sizeof(command))
    r.listener = r.channel = r.process = r.signals = r.status = -1
    r.until_exit, r.adopt = until_exit, adopt_orphans
    r.root, r.root_size = root, len(root)
    if not EST_CAN_RECORD or not est_packets_fit():
        return [], 0, 0, NO_FILTER, ENOSYS
    if est_place_of("/", &r.place) < 0:
        PyErr_SetFromErrno(OSError)
    if adopt_orphans:
        prctl(PR_GET_CHILD_SUBREAPER, &was_adopting)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        command.programs = strings_of(programs)
        command.arguments = strings_of(arguments)
        command.environment = strings_of(environment)
        if folder is not None:
            command.folder = folder
        command.mask = &before
        with nogil:
            if not start(&r, &command):
                reason = errno
        if reason == 0:
            try:
                with nogil:
                    supervise(&r)
            finally:
                with nogil:
                    finish(&r)
                    pthread_sigmask(SIG_SETMASK, &before, NULL)
        elif r.command > 0:
            finish(&r)
        if r.no_memory:
            raise MemoryError
        if reason or r.sys_errno:
            (&errno)[0] = reason or r.sys_errno
            PyErr_SetFromErrno(OSError)
        return paths_of(&r), r.status, r.unread, r.trouble.stage, r.trouble.sys_errno
    finally:
        if adopt_orphans:
            prctl(PR_SET_CHILD_SUBREAPER, was_adopting)
        close_kept(&r.signals)
        free(command.programs)
        free(command.arguments)
        free(command.environment)
        map_free(&r.seen)
        buffer_free(&r.listed)


NO_FOLDER = EST_NO_FOLDER
NO_FILTER = EST_NO_FILTER
NO_PROGRAM = EST_NO_PROGRAM
NO_CONTINUE = EST_NO_CONTINUE
