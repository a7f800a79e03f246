/* Vectors of fp32 as wide as the instruction set that a file is compiled for, and loads of other formats into them.
 *
 * Written with GCC's vector extensions, which clang knows too: one source for SSE2, AVX2 and AVX-512, and a start for
 * NEON. A file that includes this is compiled once per instruction set (see isa_*.c); `K(name)` keeps the copies apart.
 */
#ifndef TERRACE_SIMD_H
#define TERRACE_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AMX_BF16__)
#define ISA amx
#define LANES 16
#elif defined(__AVX512F__)
#define ISA avx512
#define LANES 16
#elif defined(__AVX2__)
#define ISA avx2
#define LANES 8
#else
#define ISA baseline
#define LANES 4
#endif

#define TEXT_(isa) #isa
#define TEXT(isa) TEXT_(isa)
#define ISA_NAME TEXT(ISA)
#define K_(name, isa) name##_##isa
#define K__(name, isa) K_(name, isa)
#define K(name) K__(name, ISA)
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef int16_t vs __attribute__((vector_size(LANES * 4)));
typedef int8_t vb __attribute__((vector_size(LANES)));

/* a * b + c with one rounding where the machine has it; explicit, so that two kernels that must agree in every bit do. */
INLINE vf v_fma(vf a, vf b, vf c) {
#if LANES == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}
INLINE vf v_set(float x) { return x - (vf){0}; }
INLINE vf v_load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void v_store(float *p, vf v) { memcpy(p, &v, sizeof v); }

/* bf16 is the upper half of fp32. */
INLINE vf v_load_bf16(const uint16_t *p) {
#if LANES == 16 /* by hand: GCC takes the generic conversion apart */
    return (vf)((vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)) << 16);
#elif LANES == 8
    return (vf)((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)) << 16);
#else
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

/* To nearest, ties to even; NaN stays NaN. */
INLINE uint16_t bf16_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
INLINE float of_bf16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE void v_store_bf16(uint16_t *p, vf v) {
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    vu nan = bits >> 16 | 0x40;
    vu is_nan = (vu)((bits & 0x7fffffffu) > 0x7f800000u);
    vh h = __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), vh);
    memcpy(p, &h, sizeof h);
}

/* fp16: in hardware where it is (F16C comes with AVX2), else by arithmetic on the bits. */
INLINE float of_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13, bits;
    float x, magic;
    if (rest >= 0x0f800000u) { /* inf or NaN */
        bits = sign | 0x7f800000u | (rest & 0x007fffffu);
        memcpy(&x, &bits, 4);
        return x;
    }
    bits = 0x77800000u; /* 2^112: the difference of the exponents' biases; right for subnormals too */
    memcpy(&magic, &bits, 4);
    memcpy(&x, &rest, 4);
    x *= magic;
    memcpy(&bits, &x, 4);
    bits |= sign;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE uint16_t f16_of(float x) {
    uint32_t bits, sign, magic_bits = 0x07800000u; /* 2^-112 */
    float magic, y;
    memcpy(&bits, &x, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (bits >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* rounds to 65536 or more */
    if (bits < 0x38800000u) {                                  /* below 2^-14: let the adder round to the grid */
        uint32_t grid_bits = 0x3f000000u;                      /* 0.5 has ulp 2^-24, fp16's smallest step */
        float grid;
        memcpy(&grid, &grid_bits, 4);
        memcpy(&y, &bits, 4);
        y += grid;
        memcpy(&bits, &y, 4);
        return (uint16_t)(sign | (bits - grid_bits));
    }
    memcpy(&magic, &magic_bits, 4);
    bits += 0xfffu + (bits >> 13 & 1); /* to nearest, ties to even */
    memcpy(&y, &bits, 4);
    y *= magic;
    memcpy(&bits, &y, 4);
    return (uint16_t)(sign | bits >> 13);
}
INLINE vf v_load_f16(const uint16_t *p) {
#if LANES == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif LANES == 8
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = of_f16(p[i]);
    return v;
#endif
}
INLINE void v_store_f16(uint16_t *p, vf v) {
#if LANES == 16
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif LANES == 8
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < LANES; i++) p[i] = f16_of(v[i]);
#endif
}
INLINE vf v_load_i8(const int8_t *p) {
#if LANES == 16
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif LANES == 8
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    vb b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(b, vi), vf);
#endif
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* In one order whatever the compiler: a fixed tree, so that a sum has the same bits everywhere it is taken. */
INLINE float v_sum(vf v) {
    float x[LANES];
    memcpy(x, &v, sizeof x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
}
/* a where the comparison `mask` held, else b. */
INLINE vf v_pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
/* b where either is NaN. */
INLINE vf v_max(vf a, vf b) {
#if LANES == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return v_pick(a > b, a, b);
#endif
}
INLINE vf v_min(vf a, vf b) {
#if LANES == 16
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (vf)_mm_min_ps((__m128)a, (__m128)b);
#else
    return v_pick(a < b, a, b);
#endif
}
INLINE float v_top(vf v) {
#if LANES == 16
    return _mm512_reduce_max_ps((__m512)v);
#elif LANES == 8
    __m128 x = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
#else
    float x[LANES];
    memcpy(x, &v, sizeof x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
    return x[0];
#endif
}

/* 1 / x within 1 ulp, of x from 1 to 1e30; NaN stays NaN. Quicker than dividing. */
INLINE vf v_inverse(vf x) {
#if LANES == 16
    const vf r = (vf)_mm512_rcp14_ps((__m512)x);
    const vf once = v_fma(r, v_fma(-x, r, v_set(1.f)), r);
    return v_fma(once, v_fma(-x, once, v_set(1.f)), once);
#else
    return 1.f / x;
#endif
}

/* a0 b0 a1 b1 ...: the first half of it into a, the second into b. */
INLINE void v_zip(vf *a, vf *b) {
    float x[2 * LANES];
    for (int i = 0; i < LANES; i++) x[2 * i] = (*a)[i], x[2 * i + 1] = (*b)[i];
    memcpy(a, x, sizeof *a);
    memcpy(b, x + LANES, sizeof *b);
}

/* The 32 bits at p in every lane, whatever they are. */
INLINE vf v_spread(const float *p) {
    int32_t bits;
    memcpy(&bits, p, sizeof bits);
    return (vf)((vi){0} + bits);
}

/* sum + both products of the int16 in a lane. */
INLINE vi v_dot(vi a, vi b, vi sum) {
#if LANES == 16
    sum += (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif LANES == 8
    sum += (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    sum += (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    sum += (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
    return sum;
}

/* Two int16 in a lane, a[i] and b[i]: of 2 * LANES int8. */
INLINE void v_pair_i8(const char *a, const char *b, vf pairs[2]) {
#if LANES == 16
    for (int i = 0; i < 2; i++) {
        const __m128i x = _mm_loadu_si128((const __m128i *)a + i), y = _mm_loadu_si128((const __m128i *)b + i);
        const __m256i both = _mm256_set_m128i(_mm_unpackhi_epi8(x, y), _mm_unpacklo_epi8(x, y));
        pairs[i] = (vf)_mm512_cvtepi8_epi16(both);
    }
#elif LANES == 8
    const __m128i x = _mm_loadu_si128((const __m128i *)a), y = _mm_loadu_si128((const __m128i *)b);
    pairs[0] = (vf)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(x, y));
    pairs[1] = (vf)_mm256_cvtepi8_epi16(_mm_unpackhi_epi8(x, y));
#else
    for (int i = 0; i < 2; i++) {
        vb x, y;
        memcpy(&x, a + i * LANES, sizeof x);
        memcpy(&y, b + i * LANES, sizeof y);
        pairs[i] = (vf)((__builtin_convertvector(x, vi) & 0xffff) | __builtin_convertvector(y, vi) << 16);
    }
#endif
}

INLINE vi v_most(vi a, vi b) {
#if LANES == 16
    return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif LANES == 8
    return (vi)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    const vi mask = a > b;
    return (mask & a) | (~mask & b);
#endif
}
/* The float whose bits are the greatest as an integer. */
INLINE float v_top_of_bits(vi v) {
    int32_t x[LANES];
    float top;
    memcpy(x, &v, sizeof x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
    memcpy(&top, x, sizeof top);
    return top;
}

INLINE vi v_load_vi(const void *p) { vi v; memcpy(&v, p, sizeof v); return v; }
INLINE vf v_of_vi(vi x) {
#if LANES == 16
    return (vf)_mm512_cvtepi32_ps((__m512i)x);
#elif LANES == 8
    return (vf)_mm256_cvtepi32_ps((__m256i)x);
#else
    return __builtin_convertvector(x, vf);
#endif
}

/* Element i of vector j changes places with element j of vector i. */
INLINE void v_transpose(vf x[LANES]) {
#if LANES == 16
    __m512 a[16], b[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) { /* 4 x 4 elements within each quarter */
        __m512d low0 = (__m512d)_mm512_unpacklo_ps((__m512)x[i], (__m512)x[i + 1]);
        __m512d low1 = (__m512d)_mm512_unpacklo_ps((__m512)x[i + 2], (__m512)x[i + 3]);
        __m512d high0 = (__m512d)_mm512_unpackhi_ps((__m512)x[i], (__m512)x[i + 1]);
        __m512d high1 = (__m512d)_mm512_unpackhi_ps((__m512)x[i + 2], (__m512)x[i + 3]);
        a[i] = (__m512)_mm512_unpacklo_pd(low0, low1);
        a[i + 1] = (__m512)_mm512_unpackhi_pd(low0, low1);
        a[i + 2] = (__m512)_mm512_unpacklo_pd(high0, high1);
        a[i + 3] = (__m512)_mm512_unpackhi_pd(high0, high1);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* 4 x 4 quarters */
        b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
        x[i] = (vf)_mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
        x[i + 4] = (vf)_mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88);
        x[i + 8] = (vf)_mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
        x[i + 12] = (vf)_mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd);
    }
#elif LANES == 8
    __m256 a[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 4) { /* 4 x 4 elements within each half */
        __m256d low0 = (__m256d)_mm256_unpacklo_ps((__m256)x[i], (__m256)x[i + 1]);
        __m256d low1 = (__m256d)_mm256_unpacklo_ps((__m256)x[i + 2], (__m256)x[i + 3]);
        __m256d high0 = (__m256d)_mm256_unpackhi_ps((__m256)x[i], (__m256)x[i + 1]);
        __m256d high1 = (__m256d)_mm256_unpackhi_ps((__m256)x[i + 2], (__m256)x[i + 3]);
        a[i] = (__m256)_mm256_unpacklo_pd(low0, low1);
        a[i + 1] = (__m256)_mm256_unpackhi_pd(low0, low1);
        a[i + 2] = (__m256)_mm256_unpacklo_pd(high0, high1);
        a[i + 3] = (__m256)_mm256_unpackhi_pd(high0, high1);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = (vf)_mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
        x[i + 4] = (vf)_mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
    }
#elif defined(__SSE2__)
    _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
#else
    vf y[LANES];
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) y[i][j] = x[j][i];
    memcpy(x, y, sizeof y);
#endif
}

/* e^x within 2 ulp; 0 below -87.3 (no result is denormal), inf above 88.7 (88.3 without AVX-512). NaN stays NaN. Cody and
 * Waite's reduction, a polynomial for e^r on [-0.35, 0.35]. */
INLINE vf v_exp(vf x) {
    const vf low = v_set(-87.3f), is = v_min(v_set(89.f), v_max(low, x));
    const vf shifted = v_fma(is, v_set(1.44269504f), v_set(12582912.f)); /* 1.5 * 2^23: rounds, and leaves an integer below */
    const vf n = shifted - 12582912.f;
    const vf r = v_fma(n, v_set(2.12194440e-4f), v_fma(n, v_set(-0.693359375f), is));
    vf p = v_fma(r, v_set(1.9875691500e-4f), v_set(1.3981999507e-3f));
    p = v_fma(p, r, v_set(8.3334519073e-3f));
    p = v_fma(p, r, v_set(4.1665795894e-2f));
    p = v_fma(p, r, v_set(1.6666665459e-1f));
    p = v_fma(p, r, v_set(5.0000001201e-1f));
    p = v_fma(p * r, r, r) + 1.f;
#if LANES == 16
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
    const vu scale = ((vu)shifted - 0x4b400000u + 127u) << 23; /* 2^n; n = 128 gives inf */
    return (vf)((vi)(p * (vf)scale) & ~(x < low));
#endif
}

/* e^(x - top) for x <= top, in fewer instructions: within 5e-6 of it, for what is rounded to bf16. 0 below 2^-126 and of -inf,
 * NaN stays NaN. */
#define LOG2_E 1.44269504f
INLINE vf v_exp_below(vf x, vf top) {
#if LANES == 16
    const __m512 turns = (__m512)v_fma(x, v_set(LOG2_E), top * -LOG2_E);
    const __m512 n = _mm512_roundscale_ps(turns, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf r = (vf)_mm512_sub_ps(turns, n); /* 2^r on [-0.5, 0.5] */
    vf p = v_fma(r, v_set(9.58282e-3f), v_set(5.590637e-2f));
    p = v_fma(p, r, v_set(2.4024099e-1f));
    p = v_fma(p, r, v_set(6.931242e-1f));
    p = v_fma(p, r, v_set(1.f));
    const __mmask16 normal = _mm512_cmp_ps_mask(turns, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(normal, (__m512)p, n);
#else
    return v_exp(x - top);
#endif
}

/* Rounded to int8 with the scale that makes the largest `steps`: `n` values, and the scale, x = out * scale nearly. What is
 * not finite makes the scale NaN, so that it is not lost. */
INLINE float quantise_to(const int steps, const float *x, int64_t n, int8_t *out) {
    int32_t bits = 0; /* of |x|: ordered as the numbers are, infinity and NaN on top */
    float top;
    for (int64_t i = 0; i < n; i++) {
        int32_t b;
        memcpy(&b, x + i, 4);
        b &= 0x7fffffff;
        bits = b > bits ? b : bits;
    }
    memcpy(&top, &bits, 4);
    if (bits >= 0x7f800000 || top < 1e-30f) {
        for (int64_t i = 0; i < n; i++) out[i] = 0;
        return bits >= 0x7f800000 ? __builtin_nanf("") : 0.f;
    }
    const float inverse = (float)steps / top;
    for (int64_t i = 0; i < n; i++) {
        const float rounded = x[i] * inverse + 12582912.f; /* to nearest, ties to even; the integer lands in the low bits */
        int32_t b;
        memcpy(&b, &rounded, 4);
        out[i] = (int8_t)(b - 0x4b400000);
    }
    return top / (float)steps;
}
INLINE float quantise_i8(const float *x, int64_t n, int8_t *out) { return quantise_to(127, x, n, out); }

#endif
