// A preload that makes a machine poor while it runs: for benchmarks/poor_machine.py.
//
// ES_POOR: a file of the struct below, which is mapped and may be changed at any time.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

struct poor {
    int64_t fsync_ms;     // that every fsync takes longer
    int64_t clock_s;      // that the time of day is ahead by
    int64_t refuse_one;   // one in so many allocations of at least refuse_bytes is refused; 0: none
    int64_t refuse_bytes; //
    int64_t n_refused;    // counted here
    int64_t state;        // of the generator that chooses them
};

static struct poor * poor;

#define NEXT(name)                                                                                                     \
    static __typeof__(&name) next;                                                                                     \
    if (!next) {                                                                                                       \
        next = (__typeof__(&name)) dlsym(RTLD_NEXT, #name);                                                            \
    }

__attribute__((constructor)) static void start(void) {
    const char * path = getenv("ES_POOR");
    const int    fd   = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd >= 0) {
        void * at = mmap(NULL, sizeof(struct poor), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        poor      = at == MAP_FAILED ? NULL : at;
        close(fd);
    }
}

static void wait_longer(void) {
    if (poor && poor->fsync_ms > 0) {
        usleep((useconds_t) poor->fsync_ms * 1000);
    }
}

int fsync(int fd) {
    NEXT(fsync)
    wait_longer();
    return next(fd);
}

int fdatasync(int fd) {
    NEXT(fdatasync)
    wait_longer();
    return next(fd);
}

int clock_gettime(clockid_t id, struct timespec * out) {
    NEXT(clock_gettime)
    const int rc = next(id, out);
    if (rc == 0 && poor && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) {
        out->tv_sec += poor->clock_s;
    }
    return rc;
}

time_t time(time_t * out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) {
        *out = now.tv_sec;
    }
    return now.tv_sec;
}

int gettimeofday(struct timeval * restrict out, void * restrict zone) {
    (void) zone;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec  = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}

static int is_refused(size_t n) {
    if (!poor || poor->refuse_one <= 0 || n < (size_t) poor->refuse_bytes) {
        return 0;
    }
    const uint64_t state = __atomic_add_fetch((uint64_t *) &poor->state, 0x9e3779b97f4a7c15u, __ATOMIC_RELAXED);
    uint64_t       mixed = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9u; // splitmix64
    mixed                = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
    if ((mixed ^ (mixed >> 31)) % (uint64_t) poor->refuse_one != 0) {
        return 0;
    }
    __atomic_add_fetch(&poor->n_refused, 1, __ATOMIC_RELAXED);
    errno = ENOMEM;
    return 1;
}

// glibc's own, so that nothing is looked up while there is no memory
extern void * __libc_malloc(size_t);
extern void * __libc_calloc(size_t, size_t);
extern void * __libc_realloc(void *, size_t);
extern void * __libc_memalign(size_t, size_t);

void * malloc(size_t n) {
    return is_refused(n) ? NULL : __libc_malloc(n);
}

void * calloc(size_t n, size_t size) {
    return is_refused(n * size) ? NULL : __libc_calloc(n, size);
}

void * realloc(void * at, size_t n) {
    return is_refused(n) ? NULL : __libc_realloc(at, n);
}

int posix_memalign(void ** out, size_t alignment, size_t n) {
    *out = is_refused(n) ? NULL : __libc_memalign(alignment, n);
    return *out ? 0 : ENOMEM;
}

void * aligned_alloc(size_t alignment, size_t n) {
    return is_refused(n) ? NULL : __libc_memalign(alignment, n);
}
