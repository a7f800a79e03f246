/* See transfer.h.
 *
 * A thread takes checksums outside the lock and copies inside: while one burst is in flight, the other threads of the
 * same link read the memory of the next ones. The lock is the bound on what is in flight: several bursts in a copy
 * engine at once hold up the small copies of the model's own steps. The pause between two bursts is the price. */
#include "transfer.h"

#include <string.h>

enum { DIGEST = 16, MOST = 256 }; /* bytes of a checksum; copies of one call of the driver, and blocks of a burst */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void terrace_link(struct link *link) {
    _Static_assert(sizeof(pthread_mutex_t) <= sizeof link->locks[0].room, "the other side reserves so much");
    for (int i = 0; i < LANES; i++) pthread_mutex_init(&link->locks[i].lock, NULL);
}

/* Copies of `bytes` bytes each are on their way, unless this fails. */
static int enqueue(struct link *link, uint64_t *targets, uint64_t *sources, int64_t count, int64_t bytes,
                   int32_t *step) {
    int code = 0;
    *step = link->batch ? BATCH : COPY;
    if (!link->batch) {
        for (int64_t i = 0; i < count && !code; i++)
            code = link->copy(targets[i], sources[i], (size_t)bytes, link->stream);
        return code;
    }
    size_t sizes[MOST], first = 0, failed;
    for (int64_t i = 0; i < least(count, MOST); i++) sizes[i] = (size_t)bytes;
    for (int64_t at = 0; at < count && !code; at += MOST)
        code = link->batch(targets + at, sources + at, sizes, (size_t)least(count - at, MOST), link->attributes, &first,
                           1, &failed, link->stream);
    return code;
}

/* A lane that is locked: a free one, or the next in turn when it is. */
static uint32_t take_lane(struct link *link) {
    for (uint32_t i = 0; i < link->lanes; i++)
        if (!pthread_mutex_trylock(&link->locks[i].lock)) return i;
    const uint32_t lane = __atomic_fetch_add(&link->turn, 1, __ATOMIC_RELAXED) % link->lanes;
    pthread_mutex_lock(&link->locks[lane].lock);
    return lane;
}

/* Returns when all copies are over, or, with an error, when none moves any more. */
static int carry(struct link *link, uint64_t *targets, uint64_t *sources, int64_t count, int64_t bytes,
                 int32_t *step) {
    const uint32_t lane = take_lane(link);
    int code = enqueue(link, targets, sources, count, bytes, step);
    if (!code) {
        *step = RECORD;
        code = link->record(link->events[lane], link->stream);
    }
    if (!code) {
        *step = WAIT;
        code = link->wait(link->events[lane]);
    }
    if (code) link->sync(link->stream); /* some of it may be on its way */
    pthread_mutex_unlock(&link->locks[lane].lock);
    return code;
}

static int64_t blocks_of_burst(const struct job *job) {
    const int64_t blocks = least(job->burst / job->bytes, MOST);
    return blocks ? blocks : 1;
}

/* One burst of whole blocks; or a single block that is larger than one, piece by piece. */
static int carry_blocks(struct link *link, struct job *job, uint64_t *targets, uint64_t *sources, int64_t count) {
    int code = 0;
    if (job->bytes <= job->burst) return carry(link, targets, sources, count, job->bytes, &job->step);
    for (int64_t at = 0; at < job->bytes && !code; at += job->burst) {
        uint64_t target = *targets + (uint64_t)at, source = *sources + (uint64_t)at;
        code = carry(link, &target, &source, 1, least(job->burst, job->bytes - at), &job->step);
    }
    return code;
}

static int enter(struct link *link, struct job *job) {
    job->step = ENTER;
    return link->enter(link->context);
}

int terrace_up(struct link *link, struct job *job) {
    const int64_t blocks = blocks_of_burst(job);
    uint64_t targets[MOST], sources[MOST];
    int code = enter(link, job);
    for (int64_t first = 0; first < job->count && !code; first += blocks) {
        const int64_t end = least(first + blocks, job->count);
        int64_t good = 0;
        for (int64_t i = first; i < end; i++) {
            uint8_t digest[DIGEST];
            terrace_sum((const void *)(uintptr_t)job->sources[i], job->bytes, digest);
            if (memcmp(digest, job->digests + i * DIGEST, DIGEST)) {
                job->states[i] = REFUSED;
                continue;
            }
            targets[good] = job->targets[i];
            sources[good++] = job->sources[i];
        }
        if (good) code = carry_blocks(link, job, targets, sources, good);
        for (int64_t i = first; i < end && !code; i++)
            if (job->states[i] != REFUSED) job->states[i] = MOVED;
    }
    return code;
}

int terrace_down(struct link *link, struct job *job) {
    const int64_t blocks = blocks_of_burst(job);
    int code = enter(link, job);
    for (int64_t first = 0; first < job->count && !code; first += blocks) {
        const int64_t count = least(blocks, job->count - first);
        code = carry_blocks(link, job, job->targets + first, job->sources + first, count);
        for (int64_t i = first; i < first + count && !code; i++) {
            terrace_sum((const void *)(uintptr_t)job->targets[i], job->bytes, job->digests + i * DIGEST);
            job->states[i] = MOVED;
        }
    }
    return code;
}

int terrace_copy(struct link *link, struct job *job) {
    int code = enter(link, job);
    if (!code) code = carry(link, job->targets, job->sources, job->count, job->bytes, &job->step);
    return code;
}
