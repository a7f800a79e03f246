/* Where the weights of a linear layer lie.
 *
 * A panel holds 16 outputs, one in each lane; panels stand one behind the other, whole rows of memory that a thread reads
 * from front to back. The rows of W that are gates and those that are gated alternate by panel (gate, up, gate, up), so
 * that one thread has both. Inputs are filled up with zero weights to `depth`, a multiple of 32. In a panel:
 *
 *   F32, F16, I8   [depth][16]
 *   BF16           [depth / 2][16][2]: the B tile of AMX; without it the odd input is a mask, the even one a shift
 *   I8_GROUP       [depth / 32] of { bf16 scales[16], int8 [32][16] }
 *   I4_GROUP       [depth / 32] of { bf16 scales[16], uint32 [4][16]: 8 codes each, the first in the lowest bits }
 *
 * I8 has one fp32 scale for each output, applied to the sum. The scale of a group times the integer is exact in fp32; a
 * code of four bits stands for an entry of `CODES`.
 */
#ifndef TERRACE_LINEAR_H
#define TERRACE_LINEAR_H

#include "kernels.h"

enum {
    PANEL = 16,
    GROUP = 32,
    AMX_ROWS = 16,           /* rows of x in a tile of AMX; other instruction sets have smaller ones */
    ROWS_AT_ONCE = 2048, /* rows of x that are packed at once */
    BLOCK_DEPTH = 256,   /* inputs between two visits to the sums: two panels of them fit the first-level cache */
    CHUNK_ROWS = 256,
    CHUNK_PANELS = 8, /* panels whose sums a thread keeps at once */
    SUMS_BYTES = CHUNK_PANELS * CHUNK_ROWS * PANEL * 4,
    THREAD_BYTES = SUMS_BYTES + 2 * BLOCK_DEPTH * PANEL * 4, /* and two panels' weights, converted */
};

static inline int64_t matrix_depth(const struct matrix *m) { return (m->inputs + GROUP - 1) / GROUP * GROUP; }
static inline int64_t matrix_panels(const struct matrix *m) {
    return (m->outputs + PANEL - 1) / PANEL * (m->gated ? 2 : 1);
}
static inline int64_t panel_bytes(int format, int64_t depth) {
    switch (format) {
    case F32: return depth * PANEL * 4;
    case BF16:
    case F16: return depth * PANEL * 2;
    case I8: return depth * PANEL;
    case I8_GROUP: return depth / GROUP * (PANEL * 2 + GROUP * PANEL);
    default: return depth / GROUP * (PANEL * 2 + GROUP * PANEL / 2);
    }
}

/* What four bits stand for. Found by Lloyd's iteration over groups of 32 values (normal, Laplace and Student's t), each with
 * the scale that suits it best: a third less squared error than sixteen equal steps. */
static const int8_t CODES[16] = {-126, -91, -70, -53, -38, -25, -13, -2, 8, 19, 31, 45, 60, 78, 101, 127};

#endif
