/* Where a decoder's intermediate results lie in its scratch, and how the rows of a batch are dealt out. */
#ifndef TERRACE_DECODER_H
#define TERRACE_DECODER_H

#include "linear.h"

enum {
    CHUNK_MOST = 128, /* rows: what a thread makes of them fits its second-level cache */
    CHUNK_LEAST = 96, /* fewer do not pay for reading the weights anew */
    CHUNKS_EACH = 2,  /* for each thread at least, where there are rows enough: threads are not equally fast */
};

/* In how many chunks rows are dealt out; 1: all threads share each matrix. */
static inline int64_t chunks_of(int64_t rows, int threads) {
    const int64_t most = rows / CHUNK_LEAST, least = (rows + CHUNK_MOST - 1) / CHUNK_MOST;
    const int64_t wanted = most < CHUNKS_EACH * threads ? most : CHUNKS_EACH * threads;
    if (most < threads) return 1;
    return least > wanted ? least : wanted;
}

/* Offsets in floats, each a multiple of a cache line. `rows`: of the batch, or wanted if those are more; `chunk`: those
 * that one thread takes through a layer by itself, or all, which then share each matrix. */
struct desks_of_decoder {
    int64_t rows, chunk, workers, qkv, attended, angles, workers_at, worker_floats, inner, linear, floats;
};

static inline int64_t heads_width(const struct attention *a) { return a->heads * (int64_t)a->head_dim; }
static inline int64_t qkv_width(const struct attention *a) {
    return heads_width(a) + 2 * a->kv_heads * (int64_t)a->head_dim;
}
static inline int64_t whole_lines(int64_t floats) { return (floats + 15) & ~(int64_t)15; }

/* What a thread that chooses tokens needs for rows of `size`: int64 [size], then room for a copy in whole vectors. */
static inline int64_t choice_bytes(int64_t size) { return 4 * (whole_lines(2 * size) + whole_lines(size)); }

static inline struct desks_of_decoder decoder_desks(const struct decoder *d, const struct attention *a, int64_t count) {
    const int64_t batch = a->query_starts[a->rows], rows = batch > count ? batch : count;
    struct desks_of_decoder at = {.rows = rows, .chunk = rows, .workers = 1};
    const int64_t chunks = chunks_of(rows, a->threads);
    if (chunks > 1) at.chunk = (rows + chunks - 1) / chunks, at.workers = a->threads;
    int64_t inner = 0, linear = 0;
    for (const struct decoder_layer *l = d->layers; l < d->layers + a->layers; l++) {
        const struct matrix *const all[] = {l->qkv, l->output, l->gate_up, l->down};
        for (int i = 0; i < 4; i++) {
            const int64_t bytes = linear_scratch(all[i], at.chunk, a->threads);
            linear = bytes > linear ? bytes : linear;
        }
        inner = l->gate_up->outputs > inner ? l->gate_up->outputs : inner;
    }
    at.qkv = whole_lines(2 * rows * d->hidden); /* behind the hidden states and the wanted ones of them */
    at.attended = at.qkv + whole_lines(rows * qkv_width(a));
    at.angles = at.attended + 2 * whole_lines(rows * heads_width(a));
    at.workers_at = at.angles + whole_lines(rows * a->head_dim);
    at.inner = whole_lines(at.chunk * d->hidden);
    at.linear = at.inner + whole_lines((at.chunk + AMX_ROWS) * inner);
    at.worker_floats = at.linear + whole_lines(linear / 4);
    at.floats = at.workers_at + at.workers * at.worker_floats;
    return at;
}

#endif
