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

/* One instruction set's copies. */
struct kernels {
    const char *isa;
    void (*rmsnorm)(const float *x, const float *gain, float eps, float *y, int64_t rows, int64_t size, int threads);
};

extern const struct kernels kernels_baseline, kernels_avx2, kernels_avx512;

/* Chooses an instruction set: "auto" for the best of this machine, or a name. Returns the name chosen, NULL where the
 * machine does not have it. Not while another call runs. */
EXPORT const char *terrace_select(const char *wanted);

#endif
