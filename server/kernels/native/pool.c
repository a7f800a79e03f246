#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

/* What is being done. `ticket`: the number of the job, and in the lower half the next piece that nobody has taken. A thread
 * that read `task` of one job and `ticket` of the next takes nothing: its exchange fails, or the numbers differ. */
static struct {
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic int64_t done;
    _Atomic uint32_t over; /* goes up when a job's last piece is done; what a caller waits to change */
    _Atomic int waiting;
    _Alignas(64) _Atomic uint32_t job; /* the ticket's upper half; what sleeping threads wait to change */
    _Atomic int sleeping;
    _Atomic(pool_task *) task;
    _Atomic(void *) work;
    _Atomic int64_t count;
    _Atomic int threads;
} pool;

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;
static int started; /* threads beside callers'; under `busy` */

static void wait_for_change(_Atomic uint32_t *of, uint32_t seen) {
#if defined(__linux__)
    syscall(SYS_futex, of, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
#else
    (void)of, (void)seen;
    usleep(200);
#endif
}

static void wake_all(_Atomic uint32_t *of) {
#if defined(__linux__)
    syscall(SYS_futex, of, FUTEX_WAKE_PRIVATE, MAX_THREADS, NULL, NULL, 0);
#else
    (void)of;
#endif
}

/* Takes pieces of the job until there are no more. */
static void take_part(uint32_t job, int thread) {
    for (uint64_t ticket = atomic_load(&pool.ticket); (uint32_t)(ticket >> 32) == job;) {
        pool_task *task = atomic_load(&pool.task);
        void *work = atomic_load(&pool.work);
        const int64_t index = (int64_t)(uint32_t)ticket;
        const int64_t count = atomic_load(&pool.count);
        if (index >= count) return;
        if (!atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket + 1)) continue;
        task(work, index, thread);
        if (atomic_fetch_add(&pool.done, 1) + 1 == count) {
            atomic_fetch_add(&pool.over, 1);
            if (atomic_load(&pool.waiting)) wake_all(&pool.over);
        }
        ticket = atomic_load(&pool.ticket);
    }
}

static void *help(void *place) {
    const int thread = (int)(intptr_t)place;
    uint32_t seen = 0;
    for (;;) {
        uint32_t job = atomic_load(&pool.job);
        for (int spin = 0; job == seen && spin < SPINS; spin++) {
            relax();
            job = atomic_load(&pool.job);
        }
        if (job == seen) {
            atomic_fetch_add(&pool.sleeping, 1);
            wait_for_change(&pool.job, seen);
            atomic_fetch_sub(&pool.sleeping, 1);
            continue;
        }
        seen = job;
        if (thread < atomic_load(&pool.threads)) take_part(job, thread);
    }
    return NULL;
}

static void start(int threads) {
    pthread_attr_t attributes;
    pthread_t id;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (; started < threads - 1; started++)
        if (pthread_create(&id, &attributes, help, (void *)(intptr_t)(started + 1))) break;
    pthread_attr_destroy(&attributes);
}

/* A child has none of its parent's threads. */
static void forget(void) {
    static const pthread_mutex_t open = PTHREAD_MUTEX_INITIALIZER;
    busy = open;
    started = 0;
}

/* Others have the last pieces. If that takes long, somebody else has the core of one of them: whoever sleeps gives that
 * thread his own. */
static void wait_until_done(int64_t count) {
    for (int spin = 0; atomic_load(&pool.done) < count && spin < SPINS; spin++) relax();
    while (atomic_load(&pool.done) < count) {
        atomic_store(&pool.waiting, 1);
        const uint32_t seen = atomic_load(&pool.over);
        if (atomic_load(&pool.done) < count) wait_for_change(&pool.over, seen);
        atomic_store(&pool.waiting, 0);
    }
}

void pool_run(pool_task *task, void *work, int64_t count, int threads) {
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > count) threads = (int)count;
    if (threads < 2 || pthread_mutex_trylock(&busy)) {
        for (int64_t index = 0; index < count; index++) task(work, index, 0);
        return;
    }
    start(threads);
    const uint32_t job = atomic_load(&pool.job) + 1;
    atomic_store(&pool.ticket, (uint64_t)(job - 1) << 32 | UINT32_MAX); /* nothing to take while the job is written */
    atomic_store(&pool.done, 0);
    atomic_store(&pool.task, task);
    atomic_store(&pool.work, work);
    atomic_store(&pool.count, count);
    atomic_store(&pool.threads, threads);
    atomic_store(&pool.ticket, (uint64_t)job << 32);
    atomic_store(&pool.job, job);
    if (atomic_load(&pool.sleeping)) wake_all(&pool.job);
    take_part(job, 0);
    wait_until_done(count);
    pthread_mutex_unlock(&busy);
}

__attribute__((constructor)) static void at_load(void) { pthread_atfork(NULL, NULL, forget); }
