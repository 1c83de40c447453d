/* Vectors of floats, loads of float and bfloat16, and the two ways to sum them, for whatever the compiler's target offers.

   LANES floats to a vector; MR rows by NR columns of accumulators fill the registers and no more. */
#ifndef EFFBENCH_VECTORS_H
#define EFFBENCH_VECTORS_H

#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define MR 6
#define NR 4
#elif defined(__AVX2__)
#define LANES 8
#define MR 3
#define NR 4
#else
#define LANES 4
#define MR 6
#define NR 4
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float vec_u __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_bits __attribute__((vector_size(LANES * 2)));
typedef uint16_t half_bits_u __attribute__((vector_size(LANES * 2), aligned(2)));
typedef float vec4 __attribute__((vector_size(16)));
typedef uint16_t bf16;

#define STRIP (NR * LANES) /* columns that a row of accumulators holds */
#if defined(__AVX512BF16__)
#define BF16_PAIRS 1 /* products of two neighbours at once */
typedef uint32_t BF16_A;
#else
#define BF16_PAIRS 0
typedef bf16 BF16_A;
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE float widen_bf16(bf16 value) {
  uint32_t wide = (uint32_t)value << 16;
  float out;
  memcpy(&out, &wide, 4);
  return out;
}

/* Round to nearest, ties to even; NaN stays NaN. */
INLINE bf16 narrow_bf16(float value) {
  uint32_t wide;
  memcpy(&wide, &value, 4);
  if ((wide & 0x7fffffffu) > 0x7f800000u) return (bf16)((wide >> 16) | 0x40);
  return (bf16)((wide + 0x7fffu + ((wide >> 16) & 1)) >> 16);
}

INLINE vec load_f32(const float *at) { return *(const vec_u *)at; }

INLINE vec load_bf16(const bf16 *at) {
  half_bits narrow = *(const half_bits_u *)at;
  bits wide = __builtin_convertvector(narrow, bits) << 16;
  return (vec)wide;
}

/* Four floats as four bfloat16. */
INLINE void store4_bf16(bf16 *at, vec4 value) {
#if defined(__AVX512BF16__)
  __m128bh narrow = _mm_cvtneps_pbh((__m128)value);
  memcpy(at, &narrow, 8);
#else
  for (int i = 0; i < 4; i++) at[i] = narrow_bf16(value[i]);
#endif
}

INLINE void store4_f32(float *at, vec4 value) { memcpy(at, &value, sizeof value); }

/* The sums of four vectors. */
INLINE vec4 sum4(vec a, vec b, vec c, vec d) {
#if defined(__AVX512F__)
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
  return (vec4)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#else
  vec4 out = {0, 0, 0, 0};
  for (int lane = 0; lane < LANES; lane++) out += (vec4){a[lane], b[lane], c[lane], d[lane]};
  return out;
#endif
}

/* exp to 2 units in the last place: 0 below -87.3, infinity above 88.7, NaN for NaN (Cephes, expf). */
INLINE vec exp_vec(vec x) {
  const vec zero = {0}, low = zero - 87.33f, high = zero + 88.72f, shift = zero + 12582912.0f; /* 1.5 · 2^23 rounds to an integer */
  const bits under = (bits)(x < low), over = (bits)(x > high);
  const vec inside = (vec)(((bits)x & ~(under | over)) | ((bits)low & under) | ((bits)high & over));
  const vec rounded = inside * 1.44269504088896341f + shift, n = rounded - shift;
  const vec r = inside - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vec out = (vec)((bits)p + ((bits)rounded << 23));
  const bits infinity = (((bits)zero + 0x7f800000u) & over) | ((bits)out & ~(under | over));
  const bits nan = (bits)(x != x);
  return (vec)((infinity & ~nan) | ((bits)x & nan));
}

INLINE void store_f32(float *at, vec value) { *(vec_u *)at = value; }

INLINE void store_bf16(bf16 *at, vec value) {
#if defined(__AVX512BF16__)
  __m256bh narrow = _mm512_cvtneps_pbh((__m512)value);
  memcpy(at, &narrow, 32);
#else
  for (int i = 0; i < LANES; i++) at[i] = narrow_bf16(value[i]);
#endif
}

#if BF16_PAIRS
/* A strip whose columns LOAD_LINES of bfloat16.h has interleaved. */
INLINE void store_pairs(bf16 *at, const vec acc[NR]) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#pragma GCC unroll 2
  for (int j = 0; j < 2; j++) {
    __m512 a = _mm512_permutex2var_ps((__m512)acc[2 * j], low, (__m512)acc[2 * j + 1]);
    __m512 b = _mm512_permutex2var_ps((__m512)acc[2 * j], high, (__m512)acc[2 * j + 1]);
    _mm512_storeu_si512(at + j * 32, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
}
#endif

#endif
