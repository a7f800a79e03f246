/* The exported functions: each calls the chosen instruction set's copy. */
#include "kernels.h"

#include <stddef.h>
#include <string.h>

static const struct kernels *chosen = &kernels_baseline;

static int has(const struct kernels *set) {
#if defined(__x86_64__)
    __builtin_cpu_init();
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
        &kernels_avx512, &kernels_avx2,
#endif
        &kernels_baseline,
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (has(all[i]) && (!strcmp(wanted, "auto") || !strcmp(wanted, all[i]->isa))) {
            chosen = all[i];
            return chosen->isa;
        }
    return NULL;
}

EXPORT void terrace_rmsnorm(const float *x, const float *gain, float eps, float *y, int64_t rows, int64_t size, int threads) {
    chosen->rmsnorm(x, gain, eps, y, rows, size, threads);
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
