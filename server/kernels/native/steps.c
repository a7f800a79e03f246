/* Steps handed over before those ahead of them have ended: one thread computes them, in order, with nothing in between. */
#include "kernels.h"
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

enum { MOST_STEPS = 4 }; /* handed over and not computed */

static struct {
    struct whole_step steps[MOST_STEPS];
    _Atomic int64_t begun; /* their number so far */
    int64_t ended;
    int running;
} queue;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t comes = PTHREAD_COND_INITIALIZER, ends = PTHREAD_COND_INITIALIZER;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void compute(const struct whole_step *s) {
    const struct fed *in = s->in;
    const double since = now();
    for (int64_t i = 0; i < s->follows; i++) in->tokens[s->places[i]] = s->before[s->sources[i]];
    terrace_decode(s->d, s->a, in, s->states, s->scratch);
    *s->busy_s = now() - since;
}

/* A pipe that is full wakes its reader anyway. */
static void tell(int64_t wakes) {
    if (wakes >= 0 && write((int)wakes, "", 1) < 0) return;
}

static void *compute_all(void *none) {
    for (;;) {
        pthread_mutex_lock(&lock);
        while (queue.begun == queue.ended) pthread_cond_wait(&comes, &lock);
        const int64_t number = queue.ended + 1;
        const struct whole_step is = queue.steps[number % MOST_STEPS];
        pthread_mutex_unlock(&lock);
        compute(&is);
        pthread_mutex_lock(&lock);
        queue.ended = number;
        pthread_cond_broadcast(&ends);
        pthread_mutex_unlock(&lock);
        tell(is.wakes);
        for (int spin = 0; atomic_load(&queue.begun) == number && spin < SPINS; spin++) relax();
    }
    return none;
}

/* Whether there is a thread that computes. Under the lock. */
static int runs(void) {
    pthread_t id;
    if (queue.running || pthread_create(&id, NULL, compute_all, NULL)) return queue.running;
    pthread_detach(id);
    return queue.running = 1;
}

int64_t terrace_begin(const struct whole_step *s) {
    pthread_mutex_lock(&lock);
    while (queue.begun - queue.ended == MOST_STEPS) pthread_cond_wait(&ends, &lock);
    const int64_t number = queue.begun + 1;
    if (runs()) {
        queue.steps[number % MOST_STEPS] = *s;
        pthread_cond_signal(&comes);
    } else {
        compute(s);
        tell(s->wakes);
        queue.ended = number;
    }
    queue.begun = number;
    pthread_mutex_unlock(&lock);
    return number;
}

void terrace_wait(int64_t number) {
    pthread_mutex_lock(&lock);
    while (queue.ended < number) pthread_cond_wait(&ends, &lock);
    pthread_mutex_unlock(&lock);
}

/* A child has none of its parent's threads, and none of its steps. */
static void forget(void) {
    static const pthread_mutex_t open = PTHREAD_MUTEX_INITIALIZER;
    static const pthread_cond_t quiet = PTHREAD_COND_INITIALIZER;
    lock = open, comes = ends = quiet;
    queue.ended = queue.begun;
    queue.running = 0;
}

__attribute__((constructor)) static void at_load(void) { pthread_atfork(NULL, NULL, forget); }
