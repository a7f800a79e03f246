/* Blocks between pinned host memory and a device, with their checksums: one call, without Python, for many blocks.
 *
 * The functions of the device's driver come as pointers, so that nothing of CUDA is needed to build or load this. All
 * of them return 0, or the driver's number of an error. */
#ifndef TERRACE_TRANSFER_H
#define TERRACE_TRANSFER_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

/* Bursts of a link that may be in flight at once: while one is copied, the next one is enqueued, so that the copy engine
 * does not wait for threads to wake up. */
enum { LANES = 2 };

/* A stream of copies in one direction. Any thread may use it; at most `lanes` bursts at a time are in flight. */
struct link {
    int (*enter)(void *context); /* cuCtxSetCurrent */
    int (*batch)(uint64_t *targets, uint64_t *sources, size_t *sizes, size_t count, void *attributes, size_t *firsts,
                 size_t kinds, size_t *failed, void *stream);                  /* cuMemcpyBatchAsync, or NULL */
    int (*copy)(uint64_t target, uint64_t source, size_t bytes, void *stream); /* cuMemcpyAsync */
    int (*record)(void *event, void *stream);                                  /* cuEventRecord */
    int (*wait)(void *event);                                                  /* cuEventSynchronize */
    int (*sync)(void *stream);                                                 /* cuStreamSynchronize */
    void *context, *stream, *attributes; /* the attributes are those of all copies of a batch */
    void *events[LANES];
    union {
        pthread_mutex_t lock; /* held from the first copy of a burst until the last one is over */
        uint64_t room[8];
    } locks[LANES];
    uint32_t lanes; /* 1 to LANES */
    uint32_t turn;
};

/* Which function of the link failed. */
enum step { ENTER, BATCH, COPY, RECORD, WAIT };
/* What became of a block. LEFT: its target holds anything. */
enum state { LEFT, MOVED, REFUSED };

/* What one call moves: block i is `bytes` > 240 bytes that go from sources[i] to targets[i]. Copies are in flight in
 * bursts of at most `burst` bytes: whole blocks, or a piece of one that is larger. */
struct job {
    int64_t count, bytes, burst;
    uint64_t *targets, *sources; /* [count] */
    uint8_t *digests;            /* [count, 16] */
    uint8_t *states;             /* [count], `enum state`: LEFT at first */
    int32_t step;                /* set where a call fails */
};

/* Makes the locks; the other fields are there. */
EXPORT void terrace_link(struct link *link);

/* To the device: a block whose checksum is not digests[i] is REFUSED, and its target stays as it was. Returns 0 or the
 * driver's error: then no byte moves any more, and what was not MOVED before is LEFT (or REFUSED). */
EXPORT int terrace_up(struct link *link, struct job *job);

/* From the device: writes the digests of those that are MOVED. Errors likewise. */
EXPORT int terrace_down(struct link *link, struct job *job);

/* All at once and without checksums: what the link can do, for the benchmarks to compare with. Errors likewise. */
EXPORT int terrace_copy(struct link *link, struct job *job);

#endif
