// How llama.cpp's CPU threads wait for each other after every graph node. Included by ggml-cpu.c alone
// (native/patches/0002-barrier.patch). A side project that streaming does not depend on: docs/architecture.md, "How CPU
// threads wait". It changes when threads run, never what they compute.
//
// Spinning is fastest while the thread that is waited for runs on another core. If other programs want the cores too,
// that thread may have lost its own for milliseconds; and it may be queueing for the very core on which the spinner
// burns its time, in which case every meeting costs a time slice. So a thread spins for a tenth of a millisecond, then
// sleeps; and it does not spin at all while another thread of the meeting was last seen on its own core.
//
// Two such sleepers look to Linux like threads that need little, and it may leave them on their core for seconds while
// another one idles. So one of them moves after some such meetings, and waits longer before the next time if that did
// not help. benchmarks/waiting.py measures it.
//
// EDGE_STREAM_WAIT=adaptive (default) | sleep (never spins) | stock (llama.cpp's own barrier)
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#elif !defined(_WIN32)
#include <sched.h>
#endif

enum es_wait { ES_WAIT_UNKNOWN, ES_WAIT_STOCK, ES_WAIT_SLEEP, ES_WAIT_ADAPTIVE };

static int es_wait_policy(void) {
    static atomic_int policy;
    int               value = atomic_load_explicit(&policy, memory_order_relaxed);
    if (value == ES_WAIT_UNKNOWN) {
        const char * name = getenv("EDGE_STREAM_WAIT");
        value             = name && strcmp(name, "stock") == 0   ? ES_WAIT_STOCK
                            : name && strcmp(name, "sleep") == 0 ? ES_WAIT_SLEEP
                                                                 : ES_WAIT_ADAPTIVE;
        atomic_store_explicit(&policy, value, memory_order_relaxed);
    }
    return value;
}

// Relax until *word is no longer value, for n rounds at most.
static void es_relax(atomic_int * word, int value, int n) {
    for (int i = 0; i < n && atomic_load_explicit(word, memory_order_relaxed) == value; ++i) {
        ggml_thread_cpu_relax();
    }
}

#if defined(__linux__)

#define ES_SPIN_NS 100000
#define ES_N_SLOTS 64
#define ES_N_SHARED 64          // meetings on a shared core, one after another, until a thread moves
#define ES_PATIENCE_NS 10000000 // from one move to the next at least
#define ES_MAX_PATIENCE_NS 1000000000

static atomic_int       es_n_sleeping;       // waiting threads that must be woken
static atomic_int       es_n_threads;        // threads that ever met
static _Atomic(int64_t) es_seen[ES_N_SLOTS]; // of each thread: the meeting it came to last, and its core then

static int64_t es_sighting(int meeting, int core) {
    return (int64_t) ((uint64_t) (uint32_t) meeting << 32 | (uint32_t) core);
}

static int64_t es_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t) t.tv_sec * 1000000000 + t.tv_nsec;
}

// The first other thread that was on the core when it came to this meeting or to the one before; ES_N_SLOTS if none
// was. cores, if not NULL: those of all that came.
static int es_first_on(int meeting, int slot, int core, cpu_set_t * cores) {
    const int n_slots = atomic_load_explicit(&es_n_threads, memory_order_relaxed);
    int       first   = ES_N_SLOTS;
    for (int i = 0; i < n_slots && i < ES_N_SLOTS; ++i) {
        const int64_t seen = atomic_load_explicit(&es_seen[i], memory_order_relaxed);
        const int     its  = (int) (uint32_t) seen;
        if (i != slot && (seen == es_sighting(meeting, its) || seen == es_sighting(meeting - 1, its))) {
            first = its == core && i < first ? i : first;
            if (cores) {
                CPU_SET(its, cores);
            }
        }
    }
    return first;
}

// Move this thread to a core on which no other one was seen at this meeting, if it may run there and there is any. Its
// affinity is afterwards what it was.
static void es_leave_core(int meeting, int slot) {
    cpu_set_t allowed, taken, others;
    CPU_ZERO(&taken);
    (void) es_first_on(meeting, slot, -1, &taken);
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
        CPU_AND(&others, &allowed, &taken);
        CPU_XOR(&others, &others, &allowed);
        if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof(others), &others) == 0) {
            (void) sched_setaffinity(0, sizeof(allowed), &allowed);
        }
    }
}

// Note on which core this thread comes to the meeting; true if another one that meets here was last seen on it. (A
// thread of another pool may be taken for one of this pool's: it then sleeps where it might have spun.)
static bool es_shares_core(int meeting) {
    static _Thread_local int     slot = -1, n_shared = 0;
    static _Thread_local int64_t moved = 0, patience = ES_PATIENCE_NS;
    if (slot < 0) {
        slot = atomic_fetch_add(&es_n_threads, 1) % ES_N_SLOTS;
    }
    const int core = sched_getcpu();
    atomic_store_explicit(&es_seen[slot], es_sighting(meeting, core), memory_order_relaxed);
    const int other = es_first_on(meeting, slot, core, NULL);
    if (other == ES_N_SLOTS) {
        n_shared = 0;
        return false;
    }
    if (other > slot || ++n_shared < ES_N_SHARED) { // the first of them stays
        return true;
    }
    n_shared          = 0;
    const int64_t now = es_now_ns();
    if (now - moved < patience) {
        return true;
    }
    const int64_t longer = patience < ES_MAX_PATIENCE_NS ? 2 * patience : patience;
    patience             = now - moved < 4 * patience ? longer : ES_PATIENCE_NS; // it was no use: wait longer
    moved                = now;
    es_leave_core(meeting, slot);
    return true;
}

static void es_spin(atomic_int * word, int value) {
    es_relax(word, value, 256); // most waits are over before a look at the clock is worth it
    if (atomic_load_explicit(word, memory_order_relaxed) != value) {
        return;
    }
    for (const int64_t end = es_now_ns() + ES_SPIN_NS; es_now_ns() < end;) {
        es_relax(word, value, 64);
        if (atomic_load_explicit(word, memory_order_relaxed) != value) {
            return;
        }
    }
}

// Sleep while *word is value. May return early.
static void es_sleep(atomic_int * word, int value) {
    atomic_fetch_add(&es_n_sleeping, 1);
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
    atomic_fetch_sub(&es_n_sleeping, 1);
}

static void es_wake(atomic_int * word) {
    if (atomic_load(&es_n_sleeping) > 0) {
        syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
    }
}

#else // no portable way to sleep on a word or to ask for the core: spin, then give way

static bool es_shares_core(int meeting) {
    (void) meeting;
    return false;
}

static void es_spin(atomic_int * word, int value) {
    es_relax(word, value, 5000);
}

static void es_sleep(atomic_int * word, int value) {
    (void) word;
    (void) value;
#if !defined(_WIN32)
    sched_yield();
#endif
}

static void es_wake(atomic_int * word) {
    (void) word;
}

#endif

// Meet the other n_threads - 1 threads. n_arrived is 0 between meetings; n_passed counts them.
// False (and nothing was done): llama.cpp's own barrier is wanted.
static bool es_barrier(atomic_int * n_arrived, atomic_int * n_passed, int n_threads) {
    const int policy = es_wait_policy();
    if (policy == ES_WAIT_STOCK) {
        return false;
    }
    const int  meeting = atomic_load_explicit(n_passed, memory_order_relaxed);
    const bool spin    = !es_shares_core(meeting) && policy != ES_WAIT_SLEEP;
    if (atomic_fetch_add(n_arrived, 1) == n_threads - 1) {
        atomic_store_explicit(n_arrived, 0, memory_order_relaxed);
        atomic_fetch_add(n_passed, 1);
        es_wake(n_passed);
        return true;
    }
    if (spin) {
        es_spin(n_passed, meeting);
    }
    while (atomic_load(n_passed) == meeting) {
        es_sleep(n_passed, meeting);
    }
    return true;
}
