/* Fails, kills or forgets at the N-th call that changes a file below one folder; loaded with LD_PRELOAD.
 *
 * The calls are those of libc, so it sees what Python, numpy and C libraries do alike, and needs no ptrace. A forked
 * child arms it with fault_arm(); before that it only passes calls on. Modes:
 *   COUNT  nothing, but count        KILL  SIGKILL instead of call N       TORN  half of call N if it writes, then SIGKILL
 *   ONCE   call N fails with `err`   FROM  call N and all later ones fail
 *   LOSS   SIGKILL instead of call N, and what was not synced is lost, as when the power fails: files written since
 *          their last fsync become empty, and names made since the last fsync of their directory are gone
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TORN, ONCE, FROM, LOSS };
enum { PASS, FAIL, HALF };

static char root[PATH_MAX];
static size_t root_length; /* 0: not armed */
static long target, calls;
static int mode, injected, no_exchange;
static char trace[4096][80];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(type, name) \
    static type (*real)(); \
    if (!real) real = (type (*)())dlsym(RTLD_NEXT, name)

/* What a power failure would lose. */
#define MAX 4096
static struct { dev_t dev; ino_t ino; int fd; int dirty; } files[MAX];
static struct { dev_t dev; ino_t ino; int fd; char name[256]; } names[MAX];
static int num_files, num_names;

void fault_arm(const char *folder, long n, int how, int err, int without_exchange) {
    strncpy(root, folder, sizeof root - 1);
    target = n, mode = how, injected = err, no_exchange = without_exchange, calls = 0;
    root_length = strlen(root);
}
void fault_disarm(void) { root_length = 0; }
long fault_count(void) { return calls; }
const char *fault_trace(long n) { return n < 4096 ? trace[n] : ""; }

static int below(const char *path) {
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}
static int path_of(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    if (n < 0) return 0;
    out[n] = 0;
    return 1;
}
static int ours(int fd) {
    char path[PATH_MAX];
    return root_length && path_of(fd, path) && below(path);
}
/* The absolute path that (directory, path) means; names in this project's calls hold no "..". */
static const char *absolute(int directory, const char *path, char *out) {
    if (path[0] == '/') return path;
    char base[PATH_MAX];
    if (directory == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of(directory, base)) return "";
    if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return "";
    return out;
}

static void lose(void) {
    for (int i = 0; i < num_files; i++)
        if (files[i].dirty && ftruncate(files[i].fd, 0)) abort();
    for (int i = 0; i < num_names; i++)
        if (names[i].fd >= 0) unlinkat(names[i].fd, names[i].name, 0);
}
static void die(void) {
    if (mode == LOSS) {
        root_length = 0;
        lose();
    }
    kill(getpid(), SIGKILL);
    for (;;) pause();
}
/* Count a call; what to do instead. `space` tells that the call can meet a full disk. */
static int step(const char *what, int space) {
    pthread_mutex_lock(&lock);
    long now = ++calls;
    if (now < 4096) snprintf(trace[now], sizeof trace[0], "%s", what);
    pthread_mutex_unlock(&lock);
    if (mode == COUNT || now < target || (now > target && mode != FROM)) return PASS;
    if (mode == KILL || mode == LOSS) die();
    if (mode == TORN) return HALF;
    if ((injected == ENOSPC || injected == EDQUOT) && !space) return PASS;
    errno = injected;
    return FAIL;
}

static void wrote(int fd) {
    struct stat info;
    if (mode != LOSS || fstat(fd, &info) || !S_ISREG(info.st_mode)) return;
    pthread_mutex_lock(&lock);
    int i = 0;
    while (i < num_files && (files[i].ino != info.st_ino || files[i].dev != info.st_dev)) i++;
    if (i == num_files && num_files < MAX) {
        files[i].dev = info.st_dev, files[i].ino = info.st_ino, files[i].fd = dup(fd);
        num_files++;
    }
    if (i < MAX) files[i].dirty = 1;
    pthread_mutex_unlock(&lock);
}
static void synced(int fd) {
    struct stat info;
    if (mode != LOSS || fstat(fd, &info)) return;
    for (int i = 0; i < num_files; i++)
        if (files[i].ino == info.st_ino && files[i].dev == info.st_dev) files[i].dirty = 0;
    for (int i = 0; i < num_names; i++)
        if (names[i].ino == info.st_ino && names[i].dev == info.st_dev && names[i].fd >= 0) {
            size_t saved = root_length;
            root_length = 0;
            close(names[i].fd);
            root_length = saved;
            names[i].fd = -1;
        }
}
static void created(const char *path) {
    const char *slash = strrchr(path, '/');
    struct stat info;
    char folder[PATH_MAX];
    if (mode != LOSS || !slash || num_names == MAX || strlen(slash + 1) > 255) return;
    snprintf(folder, sizeof folder, "%.*s", (int)(slash - path), path);
    size_t saved = root_length;
    root_length = 0;
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    root_length = saved;
    if (fd < 0 || fstat(fd, &info)) return;
    names[num_names].dev = info.st_dev, names[num_names].ino = info.st_ino, names[num_names].fd = fd;
    strcpy(names[num_names++].name, slash + 1);
}

/* Opening: counted if it can change something. */
static int opening(const char *what, int directory, const char *path, int flags, mode_t mode_bits) {
    REAL(int, "openat");
    char buffer[PATH_MAX];
    const char *whole = root_length ? absolute(directory, path, buffer) : "";
    int counted = below(whole) && (flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR)) && (flags & O_TMPFILE) != O_TMPFILE;
    if (!counted) return real(directory, path, flags, mode_bits);
    int todo = step(what, flags & O_CREAT);
    if (todo == FAIL) return -1;
    struct stat before;
    int existed = !stat(whole, &before);
    int fd = real(directory, path, flags, mode_bits);
    if (fd >= 0 && !existed) created(whole);
    if (fd >= 0 && (flags & O_TRUNC)) wrote(fd);
    if (todo == HALF) die();
    return fd;
}
#define MODE_BITS(flags) \
    mode_t bits = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); bits = va_arg(more, mode_t); va_end(more); }
int open(const char *path, int flags, ...) { MODE_BITS(flags); return opening("open", AT_FDCWD, path, flags, bits); }
int open64(const char *path, int flags, ...) { MODE_BITS(flags); return opening("open", AT_FDCWD, path, flags, bits); }
int openat(int d, const char *path, int flags, ...) { MODE_BITS(flags); return opening("openat", d, path, flags, bits); }
int openat64(int d, const char *path, int flags, ...) { MODE_BITS(flags); return opening("openat", d, path, flags, bits); }

/* Writing. */
#define WRITES(name, signature, ask, all, half) \
    ssize_t name signature { \
        REAL(ssize_t, #name); \
        if (!ours(fd)) return real all; \
        int todo = step(#name, 1); \
        if (todo == FAIL) return -1; \
        ssize_t n; \
        if (todo == HALF) { n = real half; (void)n; die(); } \
        n = real all; \
        wrote(fd); \
        return n; \
    }
WRITES(write, (int fd, const void *data, size_t size), , (fd, data, size), (fd, data, size / 2))
WRITES(pwrite, (int fd, const void *data, size_t size, off_t at), , (fd, data, size, at), (fd, data, size / 2, at))
WRITES(pwrite64, (int fd, const void *data, size_t size, off64_t at), , (fd, data, size, at), (fd, data, size / 2, at))
WRITES(writev, (int fd, const struct iovec *v, int n_), , (fd, v, n_), (fd, v, n_ / 2))
WRITES(pwritev, (int fd, const struct iovec *v, int n_, off_t at), , (fd, v, n_, at), (fd, v, n_ / 2, at))

/* Calls on a descriptor. */
#define ON_FD(name, signature, all, space, after) \
    int name signature { \
        REAL(int, #name); \
        if (!ours(fd)) return real all; \
        int todo = step(#name, space); \
        if (todo == FAIL) return -1; \
        int status = real all; \
        if (!status) { after; } \
        if (todo == HALF) die(); \
        return status; \
    }
ON_FD(ftruncate, (int fd, off_t size), (fd, size), 1, wrote(fd))
ON_FD(ftruncate64, (int fd, off64_t size), (fd, size), 1, wrote(fd))
ON_FD(fsync, (int fd), (fd), 1, synced(fd))
ON_FD(fdatasync, (int fd), (fd), 1, synced(fd))
ON_FD(fchmod, (int fd, mode_t bits), (fd, bits), 0, )
ON_FD(flock, (int fd, int how), (fd, how), 0, )

/* A close may report a write that failed; the descriptor is gone all the same. */
int close(int fd) {
    REAL(int, "close");
    int writable = root_length && (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY && ours(fd);
    if (!writable) return real(fd);
    int todo = step("close", 1);
    int error = errno, status = real(fd);
    if (todo == HALF) die();
    if (todo == FAIL) { errno = error; return -1; }
    return status;
}

/* Calls on names. */
#define ON_PATH(name, signature, directory, all, space, after) \
    int name signature { \
        REAL(int, #name); \
        char buffer[PATH_MAX]; \
        const char *whole = root_length ? absolute(directory, path, buffer) : ""; \
        if (!below(whole)) return real all; \
        int todo = step(#name, space); \
        if (todo == FAIL) return -1; \
        int status = real all; \
        if (!status) { after; } \
        if (todo == HALF) die(); \
        return status; \
    }
ON_PATH(mkdir, (const char *path, mode_t bits), AT_FDCWD, (path, bits), 1, )
ON_PATH(mkdirat, (int d, const char *path, mode_t bits), d, (d, path, bits), 1, )
ON_PATH(unlink, (const char *path), AT_FDCWD, (path), 0, )
ON_PATH(unlinkat, (int d, const char *path, int flags), d, (d, path, flags), 0, )
ON_PATH(rmdir, (const char *path), AT_FDCWD, (path), 0, )
ON_PATH(chmod, (const char *path, mode_t bits), AT_FDCWD, (path, bits), 0, )
ON_PATH(truncate, (const char *path, off_t size), AT_FDCWD, (path, size), 1, )
ON_PATH(rename, (const char *path, const char *to), AT_FDCWD, (path, to), 1, )
ON_PATH(renameat, (int d, const char *path, int d2, const char *to), d, (d, path, d2, to), 1, )
ON_PATH(link, (const char *path, const char *to), AT_FDCWD, (path, to), 1, )

int renameat2(int d, const char *path, int d2, const char *to, unsigned flags) {
    REAL(int, "renameat2");
    char buffer[PATH_MAX];
    const char *whole = root_length ? absolute(d, path, buffer) : "";
    if (!below(whole)) return real(d, path, d2, to, flags);
    if (no_exchange) {
        errno = EINVAL;
        return -1;
    }
    int todo = step("renameat2", 1);
    if (todo == FAIL) return -1;
    int status = real(d, path, d2, to, flags);
    if (todo == HALF) die();
    return status;
}
