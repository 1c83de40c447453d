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

#endif
