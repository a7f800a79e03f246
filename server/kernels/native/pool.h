/* Work for several threads, without waiting for threads.
 *
 * `pool_run` returns when all pieces are done, whoever did them. A thread that the system does not let run takes no piece,
 * and nobody waits for it: where cores are shared with others (and those of a CPU server are), teams that meet at a barrier
 * stand still for a scheduler's slice again and again. Which thread does a piece has no influence on its result.
 */
#ifndef TERRACE_POOL_H
#define TERRACE_POOL_H

#include <stdint.h>

enum {
    MAX_THREADS = 256,
    SPINS = 1000, /* looks for the next work before a thread goes to sleep, or lets others run: some 50 us */
};

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Piece `index` of a piece of work; `thread` < threads is that of nobody else meanwhile, 0 the caller's. */
typedef void pool_task(void *work, int64_t index, int thread);

/* Does pieces 0 .. count - 1 on at most `threads` threads, the caller's being one. One caller at a time has the others'
 * help; whoever calls meanwhile does its own work alone. */
void pool_run(pool_task *task, void *work, int64_t count, int threads);

#endif
