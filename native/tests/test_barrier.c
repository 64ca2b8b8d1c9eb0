// es-barrier.h: threads meet; two that share a core part, and may run afterwards where they might before.
#include <assert.h>
#include <pthread.h>
#include <stdio.h>

static void ggml_thread_cpu_relax(void) {}

#include "es-barrier.h"

#define N_THREADS 3
#define N_MEETINGS 20000
#define MOST_TURNS 1000 // Linux itself takes some hundred times as many to part them

static atomic_int n_arrived, n_passed;

static int  turns[N_THREADS];
static void meet(int n_threads) {
    const bool ours = es_barrier(&n_arrived, &n_passed, n_threads);
    assert(ours);
}

static void * take_turns(void * arg) {
    const int me = (int) (intptr_t) arg;
    for (int i = 0; i < N_MEETINGS; ++i) {
        turns[me] = i;
        meet(N_THREADS);
        for (int other = 0; other < N_THREADS; ++other) {
            assert(turns[other] == i); // all have come, and none has gone on
        }
        meet(N_THREADS);
    }
    return NULL;
}

#if defined(__linux__)
static cpu_set_t  allowed, one;
static atomic_int ready, done;

static void pin(const cpu_set_t * cores) {
    const int rc = sched_setaffinity(0, sizeof(*cores), cores);
    assert(rc == 0);
}

static void * stay(void * arg) {
    (void) arg;
    pin(&one);
    meet(1); // the first of two stays, and this one cannot go
    ready = 1;
    do {
        meet(2);
        meet(2);
    } while (!done);
    return NULL;
}

static void * go(void * arg) {
    int * moved = arg;
    while (!ready) {
        sched_yield();
    }
    pin(&one);
    const int core = sched_getcpu();
    pin(&allowed); // that alone moves nobody
    for (int i = 0; i < MOST_TURNS && !*moved; ++i) {
        meet(2);
        *moved = sched_getcpu() != core;
        done   = *moved || i == MOST_TURNS - 1;
        meet(2);
    }
    cpu_set_t now;
    const int rc = sched_getaffinity(0, sizeof(now), &now);
    assert(rc == 0 && CPU_EQUAL(&now, &allowed));
    return NULL;
}

static void test_two_on_a_core(void) {
    const int rc = sched_getaffinity(0, sizeof(allowed), &allowed);
    assert(rc == 0);
    if (CPU_COUNT(&allowed) < 2) {
        printf("one core: threads cannot part\n");
        return;
    }
    CPU_ZERO(&one);
    for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++i) {
        if (CPU_ISSET(i, &allowed)) {
            CPU_SET(i, &one);
        }
    }
    int       moved = 0;
    pthread_t first, second;
    pthread_create(&first, NULL, stay, NULL);
    pthread_create(&second, NULL, go, &moved);
    pthread_join(first, NULL);
    pthread_join(second, NULL);
    assert(moved);
}
#else
static void test_two_on_a_core(void) {}
#endif

int main(void) {
    pthread_t threads[N_THREADS];
    for (int i = 0; i < N_THREADS; ++i) {
        pthread_create(&threads[i], NULL, take_turns, (void *) (intptr_t) i);
    }
    for (int i = 0; i < N_THREADS; ++i) {
        pthread_join(threads[i], NULL);
    }
    test_two_on_a_core();
    return 0;
}
