/* The exported functions: each calls the chosen instruction set's copy. */
#include "decoder.h"
#include "kernels.h"
#include "linear.h"

#include <stddef.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };

/* AMX's tiles of bf16 and int8, AVX-512's bf16 conversions and dot products of int8, in the processor and allowed by the kernel: the tiles' state is large,
 * so a process has to ask for it. What is granted holds for all threads, those to come too. */
static int has_amx(void) {
    unsigned a, b, c, d, tiles, bf16;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    tiles = (d >> 24 & 1) & (d >> 22 & 1) & (d >> 25 & 1) & (c >> 11 & 1); /* AMX-TILE, -BF16, -INT8; AVX512-VNNI */
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return 0;
    bf16 = a >> 5 & 1; /* AVX512-BF16 */
    return tiles && bf16 && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
}
#else
static int has_amx(void) { return 0; }
#endif

static const struct kernels *chosen = &kernels_baseline;

static int has(const struct kernels *set) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (set == &kernels_amx) return has(&kernels_avx512) && has_amx();
    if (set == &kernels_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (set == &kernels_avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return set == &kernels_baseline;
}

const char *terrace_select(const char *wanted) {
    static const struct kernels *const all[] = {
#if defined(__x86_64__)
        &kernels_amx, &kernels_avx512, &kernels_avx2,
#endif
        &kernels_baseline,
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i] && has(all[i]) && (!strcmp(wanted, "auto") || !strcmp(wanted, all[i]->isa))) {
            chosen = all[i];
            return chosen->isa;
        }
    return NULL;
}

EXPORT void terrace_read(const void *memory, int64_t bytes, uint64_t *sum, int threads) {
    chosen->read_all(memory, bytes, sum, threads);
}
EXPORT void terrace_read_pieces(const void *memory, int64_t bytes, const int64_t *order, int64_t count, uint64_t *sum,
                                int threads) {
    chosen->read_pieces(memory, bytes, order, count, sum, threads);
}

EXPORT void terrace_sum(const void *data, int64_t bytes, uint8_t *digest) { chosen->sum(data, bytes, digest); }

EXPORT void terrace_rmsnorm(const float *x, const float *gain, float eps, float *y, int64_t rows, int64_t size, int threads) {
    chosen->rmsnorm(x, gain, eps, y, rows, size, threads);
}

/* In place: qkv [tokens, heads + 2 * kv_heads, head_dim]. Each query and key head is normed where there are gains
 * [head_dim] (NULL: it is not), then rotated: cos and sin are [tokens, head_dim / 2]. Values stay. */
EXPORT void terrace_qk_rope(float *qkv, const float *q_gain, const float *k_gain, float eps, const float *cos,
                            const float *sin, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
                            int threads) {
    chosen->qk_rope(qkv, q_gain, k_gain, eps, cos, sin, tokens, heads, kv_heads, head_dim, threads);
}

/* cos and sin [rows, half] of positions [rows] times frequencies [half], times the amplitude. */
EXPORT void terrace_angles(const int64_t *positions, const float *frequencies, float amplitude, float *cos, float *sin,
                           int64_t rows, int64_t half, int threads) {
    chosen->angles(positions, frequencies, amplitude, cos, sin, rows, half, threads);
}

/* best [rows]: index of the greatest of each row of x [rows, size], the lowest among equals. NaN counts as -inf; 0 where
 * nothing is left. */
EXPORT void terrace_argmax(const float *x, int64_t *best, int64_t rows, int64_t size, int threads) {
    chosen->argmax(x, best, rows, size, threads);
}

EXPORT int64_t terrace_choose_scratch(int64_t size, int threads) { return choice_bytes(size) * threads; }

EXPORT void terrace_choose(const float *x, const struct drawing *how, const struct edits *edits, int64_t *tokens,
                           int64_t rows, int64_t size, void *scratch, int threads) {
    chosen->choose(x, how, edits, tokens, rows, size, scratch, threads);
}

EXPORT void terrace_describe(const float *x, const int64_t *tokens, int64_t size, const struct telling *of, int threads) {
    chosen->describe(x, tokens, size, of, threads);
}

EXPORT void terrace_attention_plan(struct attention *step) { chosen->attention_plan(step); }

/* Writes k and v [tokens, kv_heads, head_dim] of the step's tokens into the arena, then attends: q and out are [tokens,
 * heads, head_dim], out contiguous. A query sees `window` keys, its own the last. */
EXPORT void terrace_attend(const struct attention *step, int64_t layer, int64_t window, const float *q, int64_t q_token,
                           int64_t q_head, const float *k, int64_t k_token, int64_t k_head, const float *v,
                           int64_t v_token, int64_t v_head, float *out) {
    const struct vectors queries = {q, q_token, q_head}, keys = {k, k_token, k_head}, values = {v, v_token, v_head};
    chosen->attend(step, layer, window, &queries, &keys, &values, out);
}

EXPORT int64_t terrace_matrix_bytes(const struct matrix *m) {
    return matrix_panels(m) * panel_bytes(m->format, matrix_depth(m));
}

EXPORT int64_t terrace_linear_scratch(const struct matrix *m, int64_t rows, int threads) {
    return linear_scratch(m, rows, threads);
}

EXPORT void terrace_pack(const struct matrix *m, const void *source, int source_format, int64_t stride, int64_t first,
                         int64_t rows, int threads) {
    chosen->pack(m, source, source_format, stride, first, rows, threads);
}

EXPORT void terrace_rows(const struct matrix *m, const int64_t *rows, int64_t count, float *y, int64_t stride, int threads) {
    chosen->unpack(m, rows, count, y, stride, threads);
}

EXPORT void terrace_linear(const struct matrix *m, const float *x, int64_t x_stride, float *y, int64_t y_stride,
                           int64_t rows, int add, void *scratch, int threads) {
    chosen->linear(m, x, x_stride, y, y_stride, rows, add, scratch, threads);
}

EXPORT int64_t terrace_decode_scratch(const struct decoder *d, const struct attention *step, int64_t count) {
    const int64_t layers = decoder_desks(d, step, count).floats * 4, head = linear_scratch(d->head, count, step->threads);
    const int64_t choice = terrace_choose_scratch(d->head->outputs, step->threads), after = head > choice ? head : choice;
    return layers > after ? layers : after;
}

EXPORT void terrace_decode(const struct decoder *d, const struct attention *step, const struct fed *in, float *states,
                           void *scratch) {
    chosen->decode(d, step, in, states, scratch);
}
