/* What the library offers. Plain C, raw pointers, no Python and no torch: `__init__.py` is the other side.
 *
 * All calls that take `threads` split their work over that many threads of OpenMP's pool, which is torch's too. Nothing is
 * allocated and nothing is kept between calls. Nobody may write an argument meanwhile.
 */
#ifndef TERRACE_KERNELS_H
#define TERRACE_KERNELS_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum format { F32, BF16, F16, I8, I4 };

/* fp32 vectors of head_dim for tokens x heads, with strides in floats. */
struct vectors {
    const float *data;
    int64_t token_stride, head_stride;
};

/* One step's attention, for all layers. Row r feeds the tokens query_starts[r] to query_starts[r + 1] of the batch, the
 * first at position starts[r]; its block table begins at frames[tables[r]]. `terrace_attention_plan` says how large the
 * working memory must be.
 *
 * The arena is [frames, layers, 2, kv_heads, block_tokens, head_dim] of F32, BF16 or F16. With I8 the last two are int8
 * [block_tokens, head_dim] and behind them fp32 [block_tokens], the scale of each vector (max-abs / 127). */
struct attention {
    char *arena;
    const int32_t *query_starts, *starts, *frames; /* [rows + 1], [rows], [all blocks of all rows] */
    const int64_t *tables;                         /* [rows] */
    int64_t rows;
    int32_t format, layers, heads, kv_heads, head_dim, block_tokens, threads;
    float scale;
    int64_t desk_floats, partial_floats; /* set by the plan */
    float *desks, *partials;             /* [threads, desk_floats], [partial_floats] */
    int64_t *units, *partials_at;        /* [rows + 1] each */
};

/* One instruction set's copies. */
struct kernels {
    const char *isa;
    void (*rmsnorm)(const float *x, const float *gain, float eps, float *y, int64_t rows, int64_t size, int threads);
    void (*attention_plan)(struct attention *step);
    void (*attend)(const struct attention *step, int64_t layer, int64_t window, const struct vectors *q,
                   const struct vectors *k, const struct vectors *v, float *out);
};

extern const struct kernels kernels_baseline, kernels_avx2, kernels_avx512;

/* Chooses an instruction set: "auto" for the best of this machine, or a name. Returns the name chosen, NULL where the
 * machine does not have it. Not while another call runs. */
EXPORT const char *terrace_select(const char *wanted);

#endif
