/* What the library offers. Plain C, raw pointers, no Python and no torch: `__init__.py` is the other side.
 *
 * All calls that take `threads` split their work over that many threads (pool.h). Nothing is allocated and nothing but idle
 * threads is kept between calls. Nobody may write an argument meanwhile.
 */
#ifndef TERRACE_KERNELS_H
#define TERRACE_KERNELS_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

enum format { F32, BF16, F16, I8, I8_GROUP, I4_GROUP, I8_DOT, I4_DOT };

/* Weights W [outputs, inputs] of a linear layer, packed by terrace_pack: see linear.h for the layout. With `gated`, W has
 * 2 * outputs rows, gates first, and the layer's result is silu(gate) * up. Pointers are 64-byte aligned. */
struct matrix {
    uint8_t *panels; /* terrace_matrix_bytes, zero at first */
    float *scales;   /* I8, I8_DOT: one for each lane of each panel, zero at first; else NULL */
    float *bias;     /* likewise, for any format; NULL for none */
    int64_t inputs, outputs;
    int32_t format, gated;
};

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

/* A decoder: pre-norm layers of attention and a gated MLP, as many as the attention has. */
struct decoder {
    const struct matrix *embedding;
    const struct decoder_layer *layers;
    const float *gain; /* of the last norm, [hidden] */
    int64_t hidden;
    float eps, amplitude;     /* of the rotation's cosines and sines */
    const float *frequencies; /* [head_dim / 2], radians a position */
    const struct matrix *head;
};
struct decoder_layer {
    const float *attention_gain, *mlp_gain; /* [hidden] */
    const float *q_gain, *k_gain;           /* [head_dim], or NULL: these are not normed */
    const struct matrix *qkv, *output, *gate_up, *down;
    int64_t window;
};

/* How a row's next token is chosen. `draw`: of [0, 1). A temperature of 0: the most likely token, whatever else it says. */
struct drawing {
    double top_p, min_p, draw; /* 1 and 0: no limit */
    int64_t top_k;             /* 0: no limit */
    float temperature;
};

/* What is done to a row's logits before its token is chosen, in this order. From ids[first] on: tokens beside which, if there
 * are any, nothing may be chosen; tokens of whose logits each gets its value added, -inf where it must not be chosen; and
 * tokens that have been seen, each once, its value being how often it was generated, for penalties. */
struct edit {
    int64_t first, allows, moves, sees;
    float repetition, presence, frequency;
};
struct edits {
    const struct edit *rows;
    const int64_t *ids;
    const float *values; /* one for each id */
};

/* Of tokens of `count` rows, places `rows` among all: the log-probabilities by the logits as they are, the ranks, from 1,
 * and the `most` likeliest tokens with theirs, [count, most]; the lower id first among equals. */
struct telling {
    const int64_t *rows;
    int64_t count, most;
    float *logprobs, *best_logprobs;
    int64_t *ranks, *best;
};

/* What one step feeds a decoder beside the attention's rows: tokens [n], their positions [n], and which of them the caller
 * wants the states of: places [count] in the batch. If not NULL, `logits` [count, outputs of the head] and `chosen` [count]
 * get what comes next and, of that, the token chosen as `how` [count] says, behind `edits` if there are any; `told`, if not
 * NULL, gets what it asks for of the tokens chosen. */
struct fed {
    int64_t *tokens;
    const int64_t *positions, *wanted;
    int64_t count;
    float *logits;
    int64_t *chosen; /* needs `logits` and `how` */
    const struct drawing *how;
    const struct edits *edits;
    const struct telling *told; /* needs `chosen` */
};

/* A step of a decoder that may follow another: tokens[places[i]] is what that one left in before[sources[i]]. */
struct whole_step {
    const struct decoder *d;
    const struct attention *a;
    const struct fed *in;
    float *states;
    void *scratch;
    const int64_t *before, *places, *sources;
    int64_t follows;
    double *busy_s; /* gets what it took */
    int64_t wakes;  /* a file that gets a byte when it has ended; -1 for none */
};

/* One instruction set's copies. */
struct kernels {
    const char *isa;
    void (*read_all)(const void *memory, int64_t bytes, uint64_t *sum, int threads);
    void (*read_pieces)(const void *memory, int64_t bytes, const int64_t *order, int64_t count, uint64_t *sum, int threads);
    void (*sum)(const void *data, int64_t bytes, uint8_t *digest);
    void (*rmsnorm)(const float *x, const float *gain, float eps, float *y, int64_t rows, int64_t size, int threads);
    void (*qk_rope)(float *qkv, const float *q_gain, const float *k_gain, float eps, const float *cos, const float *sin,
                    int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, int threads);
    void (*angles)(const int64_t *positions, const float *frequencies, float amplitude, float *cos, float *sin, int64_t rows,
                   int64_t half, int threads);
    void (*argmax)(const float *x, int64_t *best, int64_t rows, int64_t size, int threads);
    void (*choose)(const float *x, const struct drawing *how, const struct edits *edits, int64_t *tokens, int64_t rows,
                   int64_t size, void *scratch, int threads);
    void (*describe)(const float *x, const int64_t *tokens, int64_t size, const struct telling *of, int threads);
    void (*attention_plan)(struct attention *step);
    void (*attend)(const struct attention *step, int64_t layer, int64_t window, const struct vectors *q,
                   const struct vectors *k, const struct vectors *v, float *out);
    void (*pack)(const struct matrix *m, const void *source, int source_format, int64_t stride, int64_t first, int64_t rows,
                 int threads);
    void (*unpack)(const struct matrix *m, const int64_t *rows, int64_t count, float *y, int64_t stride, int threads);
    void (*linear)(const struct matrix *m, const float *x, int64_t x_stride, float *y, int64_t y_stride, int64_t rows,
                   int add, void *scratch, int threads);
    void (*decode)(const struct decoder *d, const struct attention *step, const struct fed *in, float *states, void *scratch);
};

extern const struct kernels kernels_baseline, kernels_avx2, kernels_avx512;
extern const struct kernels kernels_amx __attribute__((weak)); /* absent where the compiler does not know AMX */

/* Chooses an instruction set: "auto" for the best of this machine, or a name. Returns the name chosen, NULL where the
 * machine does not have it. Not while another call runs. */
EXPORT const char *terrace_select(const char *wanted);

/* Reads memory, a multiple of 64 bytes, into a sum: the limit of what kernels can do. */
EXPORT void terrace_read(const void *memory, int64_t bytes, uint64_t *sum, int threads);
EXPORT void terrace_read_pieces(const void *memory, int64_t bytes, const int64_t *order, int64_t count, uint64_t *sum,
                                int threads);

/* digest [16]: XXH3-128 of more than 240 bytes, as xxhash.xxh3_128_digest has it. */
EXPORT void terrace_sum(const void *data, int64_t bytes, uint8_t *digest);

/* Bytes of m->panels. */
EXPORT int64_t terrace_matrix_bytes(const struct matrix *m);

/* Bytes of scratch that terrace_linear needs for so many rows and threads; never less for more. */
EXPORT int64_t terrace_linear_scratch(const struct matrix *m, int64_t rows, int threads);

/* Rows first .. first + rows - 1 of W from a row-major tensor of F32, BF16 or F16, `stride` elements between its rows. In
 * any order and any pieces; each row once. */
EXPORT void terrace_pack(const struct matrix *m, const void *source, int source_format, int64_t stride, int64_t first,
                         int64_t rows, int threads);

/* y[i] = row rows[i] of W as the kernels see it, [count, inputs]; for embeddings. */
EXPORT void terrace_rows(const struct matrix *m, const int64_t *rows, int64_t count, float *y, int64_t stride, int threads);

/* y [rows, outputs] = x [rows, inputs] W^T (+ bias), or silu(gate) * up of it; with `add`, y += that. Strides in elements.
 * y and x do not overlap. `scratch`: terrace_linear_scratch bytes, which nobody else uses meanwhile. */
EXPORT void terrace_linear(const struct matrix *m, const float *x, int64_t x_stride, float *y, int64_t y_stride,
                           int64_t rows, int add, void *scratch, int threads);

/* Bytes of scratch that terrace_choose needs for rows of `size`. */
EXPORT int64_t terrace_choose_scratch(int64_t size, int threads);

/* tokens [rows]: the next one of each row of x [rows, size], behind `edits` unless that is NULL. NaN counts as -inf, and 0 is
 * chosen where nothing is left. */
EXPORT void terrace_choose(const float *x, const struct drawing *how, const struct edits *edits, int64_t *tokens,
                           int64_t rows, int64_t size, void *scratch, int threads);

/* What `of` asks for of tokens[row] in each of its rows of x [.., size]. NaN counts as -inf; of what cannot be, and where
 * nothing is left, the log-probability is -inf or NaN. */
EXPORT void terrace_describe(const float *x, const int64_t *tokens, int64_t size, const struct telling *of, int threads);

/* Bytes of scratch that terrace_decode needs after attention's plan; never less for more tokens. */
EXPORT int64_t terrace_decode_scratch(const struct decoder *d, const struct attention *step, int64_t count);

/* states [count, hidden], after the last norm, of the wanted tokens: a whole step. With the same bits as its parts, called
 * one by one. */
EXPORT void terrace_decode(const struct decoder *d, const struct attention *step, const struct fed *in, float *states,
                           void *scratch);

/* Hands a step over, of which everything but the structure itself stays as it is until the step has ended: it is computed
 * when those before it have been. Returns its number. Waits while four are under way. */
EXPORT int64_t terrace_begin(const struct whole_step *s);

/* Returns when step `number` has ended. */
EXPORT void terrace_wait(int64_t number);

#endif
