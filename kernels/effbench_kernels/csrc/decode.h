/* Codes of 4 or 8 bits as vectors of numbers, for AVX-512: the table of a group, and a half of 32 weights by it.

   Each number is the value that `unpack` of quantised_torch.py gives in that type. */
#ifndef EFFBENCH_DECODE_H
#define EFFBENCH_DECODE_H

#include "vectors.h"

#define HALF 32
#define QR 4 /* rows of a tile: the tables take the registers of two more */

INLINE __m512 table_f32(const int bits, const bf16 *scales, int64_t g) {
  if (bits == 8) return _mm512_set1_ps(widen_bf16(scales[g]));
  const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return _mm512_fmadd_ps(codes, _mm512_set1_ps(widen_bf16(scales[2 * g])), _mm512_set1_ps(widen_bf16(scales[2 * g + 1])));
}

INLINE void decode_f32(const int bits, const uint8_t *codes, int64_t k, __m512 table, vec wide[2]) {
#pragma GCC unroll 2
  for (int part = 0; part < 2; part++)
    if (bits == 8) {
      __m128i bytes = _mm_loadu_si128((const __m128i *)(codes + k + part * 16));
      wide[part] = (vec)_mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), table);
    } else {
      __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + k / 64 * 32 + part * 16)));
      wide[part] = (vec)_mm512_permutexvar_ps(k / 32 % 2 ? _mm512_srli_epi32(pairs, 4) : pairs, table); /* the low 4 bits count */
    }
}

INLINE __m512i table_bf16(const int bits, const bf16 *scales, int64_t g) {
  __m512 wide = table_f32(bits, scales, g);
  return bits == 8 ? _mm512_castps_si512(wide) : _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(wide));
}

INLINE void decode_bf16(const int bits, const uint8_t *codes, int64_t k, __m512i table, __m512bh wide[1]) {
  if (bits == 8) {
    vec both[2];
    decode_f32(8, codes, k, _mm512_castsi512_ps(table), both);
    wide[0] = _mm512_cvtne2ps_pbh((__m512)both[1], (__m512)both[0]);
    return;
  }
  __m256i pairs = _mm256_loadu_si256((const __m256i *)(codes + k / 64 * 32));
  if (k / 32 % 2) pairs = _mm256_srli_epi16(pairs, 4);
  __m512i index = _mm512_cvtepu8_epi16(_mm256_and_si256(pairs, _mm256_set1_epi8(15)));
  wide[0] = (__m512bh)_mm512_permutexvar_epi16(index, table);
}

/* Whether the products below can read such codes. */
INLINE int reads_codes(int64_t d, int64_t group, int64_t bits) { return d % (bits == 4 ? 2 * HALF : HALF) == 0 && group % HALF == 0; }

#endif
