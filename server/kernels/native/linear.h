/* Where the weights of a linear layer lie.
 *
 * A panel holds 16 outputs, one in each lane; panels stand one behind the other, whole rows of memory that a thread reads
 * from front to back. The rows of W that are gates and those that are gated alternate by panel (gate, up, gate, up), so
 * that one thread has both. Inputs are filled up with zero weights to `depth`, a multiple of 32, of I8_DOT and I4_DOT of
 * 64. In a panel:
 *
 *   F32, F16, I8   [depth][16]
 *   BF16           [depth / 2][16][2]: the B tile of AMX; without it the odd input is a mask, the even one a shift
 *   I8_GROUP       [depth / 32] of { bf16 scales[16], int8 [32][16] }
 *   I4_GROUP       [depth / 32] of { uint16 scales[16], uint32 [4][16]: the codes of 8 inputs each, from the lowest bits
 *                  on those of inputs 0, 2, 4, 6, 1, 3, 5, 7 }
 *   I8_DOT         [depth / 4][16][4]: the B tile of AMX, and what AVX-512's dot products of four want
 *   I4_DOT         [depth / 64] of { bf16 scales[2][16], uint8 [8][16][4]: the codes of four inputs of each output, and in
 *                  the upper halves of the next four }
 *
 * I8 and I8_DOT have one fp32 scale for each output, applied to the sum. I8_GROUP's scale times the integer is exact in
 * fp32. A code of I4_GROUP stands for an entry of `CODES`, one of I4_DOT for an entry of `LEVELS`, see there. Of I8_DOT
 * (linear_dot.inc) and I4_DOT (linear_levels.inc) x is int8, too.
 */
#ifndef TERRACE_LINEAR_H
#define TERRACE_LINEAR_H

#include "kernels.h"

enum {
    PANEL = 16,
    GROUP = 32,
    DOT_DEEP = 64,           /* inputs of int8 in a row of a tile */
    AMX_ROWS = 16,           /* rows of x in a tile of AMX; other instruction sets have smaller ones */
    ROWS_AT_ONCE = 2048, /* rows of x that are packed at once */
    BLOCK_BYTES = 16384, /* of one panel's weights between two visits to the sums: two panels fit the first-level cache */
    CHUNK_ROWS = 512,    /* of x, whose values of a block's inputs and whose sums with */
    CHUNK_PANELS = 8,    /* so many panels fit the second-level cache */
    SUMS_BYTES = CHUNK_PANELS * CHUNK_ROWS * PANEL * 4,
    THREAD_BYTES = SUMS_BYTES + 2 * BLOCK_BYTES,
};

static inline int64_t matrix_depth(const struct matrix *m) {
    const int64_t unit = m->format >= I8_DOT ? DOT_DEEP : GROUP;
    return (m->inputs + unit - 1) / unit * unit;
}
static inline int64_t matrix_panels(const struct matrix *m) {
    return (m->outputs + PANEL - 1) / PANEL * (m->gated ? 2 : 1);
}
static inline int64_t panel_bytes(int format, int64_t depth) {
    switch (format) {
    case F32: return depth * PANEL * 4;
    case BF16:
    case F16: return depth * PANEL * 2;
    case I8:
    case I8_DOT: return depth * PANEL;
    case I8_GROUP: return depth / GROUP * (PANEL * 2 + GROUP * PANEL);
    default: return depth / GROUP * (PANEL * 2 + GROUP * PANEL / 2);
    }
}

/* Bytes of scratch for so many rows and threads. */
static inline int64_t linear_scratch(const struct matrix *m, int64_t rows, int threads) {
    const int64_t packed = (rows < ROWS_AT_ONCE ? rows : ROWS_AT_ONCE) + AMX_ROWS; /* a tile may be filled up with zeros */
    return packed * matrix_depth(m) * 4 + threads * (int64_t)THREAD_BYTES + 64;
}

/* What four bits stand for, as bf16: these values times 2^-127, in this order:
 *     -126, -91, -70, -53, -38, -25, -13, -2, 8, 19, 31, 45, 60, 78, 101, 127
 * Found by Lloyd's iteration over groups of 32 values (normal, Laplace and Student's t), each with the scale that suits it
 * best: a sixth less squared error than sixteen equal steps. A group's scale is a number of 16 bits that is *added* to
 * the bf16's bits: 128 of them double the value (in between it grows linearly, which bends the table a little), the top
 * one turns the sign. So a weight is exactly a bf16, had by a look-up and an addition, for 32 weights at once. */
#define CODE_LIST 0x837c, 0x8336, 0x830c, 0x82d4, 0x8298, 0x8248, 0x81d0, 0x8080, \
                  0x0180, 0x0218, 0x0278, 0x02b4, 0x02f0, 0x031c, 0x034a, 0x037e
static const uint16_t CODES[16] = {CODE_LIST};

/* What four bits of I4_DOT stand for, plus LEVEL_ZERO: the same search among integers of seven bits, each times a group's
 * scale (bf16, of either sign). As little error as that table, a third less squared error than sixteen equal steps. */
enum { LEVEL_ZERO = 64, LEVEL_TOP = 127 - LEVEL_ZERO };
static const uint8_t LEVELS[16] = {0, 19, 30, 39, 46, 52, 58, 63, 68, 73, 79, 85, 93, 102, 114, 127};
enum { LEVEL_PAIR = 2 * GROUP, LEVEL_PAIR_BYTES = 2 * PANEL * 2 + GROUP * PANEL };

#endif
