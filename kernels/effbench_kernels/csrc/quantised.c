/* Grouped products of expert layers with weights of 4 or 8 bits, in float32 and bfloat16 with float32 sums, for AVX-512.

   Codes become numbers in registers, each the value that `unpack` of quantised_torch.py gives in the type of x. */

#include <stdlib.h>

#include "vectors.h"

typedef struct {
  const void *x;          /* rows of width d */
  const int64_t *row;     /* row of x for each sorted position, or NULL: the position itself */
  const uint8_t *codes;   /* (experts, o, d / 2) or (experts, o, d) */
  const bf16 *scales;     /* (experts, o, d / group, 2) or (experts, o, d / group) */
  const void *bias;       /* (experts, o), or NULL */
  void *out;              /* (positions, o), rows ldo apart */
  const int64_t *offsets; /* (experts + 1) */
  int64_t experts, d, o, ldx, ldo, stride_bias, group, bits, is_bf16, threads;
} quantised;

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include "tiles.h"

#define HALF 32
#define QR 4

#include "float32.h"
#define PARTS 2
#define TABLE __m512 /* 4 bits: the 16 numbers; 8 bits: the scale */

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
#include "quantised.h"
#undef PARTS
#undef TABLE
#include "undefine.h"

#include "bfloat16.h"
#define PARTS 1
#define TABLE __m512i

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
#include "quantised.h"

/* out[i] = x[row i] · w[e] + bias[e], for every row of every expert. Returns 0, or 1 where this target cannot do it. */
int effbench_quantised(const quantised *job) {
  const int64_t item = job->is_bf16 ? 2 : 4;
  const int64_t code_bytes = job->bits == 4 ? job->d / 2 : job->d, scale_items = job->d / job->group * (job->bits == 4 ? 2 : 1);
  if (job->d % (job->bits == 4 ? 2 * HALF : HALF) || job->group % HALF) return 1;
  int64_t active = 0, *start = malloc(sizeof(int64_t) * (job->experts + 1));
  for (int64_t e = 0; e < job->experts; e++) active += job->offsets[e + 1] > job->offsets[e];
  const int64_t cols = tile_columns(job->o, code_bytes, active, job->threads, 2 * NR);
  start[0] = 0;
  for (int64_t e = 0; e < job->experts; e++)
    start[e + 1] = start[e] + (job->offsets[e + 1] - job->offsets[e] + ROW_BLOCK - 1) / ROW_BLOCK * ((job->o + cols - 1) / cols);
#pragma omp parallel num_threads(job->threads)
  {
    int64_t e = 0;
    const void *lines[ROW_BLOCK];
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t tile = 0; tile < start[job->experts]; tile++) {
      const place at = find(job->offsets, start, &e, tile, ROW_BLOCK, cols, job->o);
      const uint8_t *codes = job->codes + e * job->o * code_bytes;
      const bf16 *scales = job->scales + e * job->o * scale_items;
      const void *bias = job->bias ? (const char *)job->bias + e * job->stride_bias * item : NULL;
      char *out = (char *)job->out + at.from * job->ldo * item;
      for (int64_t i = 0; i < at.rows; i++)
        lines[i] = (const char *)job->x + (job->row ? job->row[at.from + i] : at.from + i) * job->ldx * item;
      if (job->is_bf16)
        few_block_bf16(job, (const bf16 *const *)lines, at.rows, codes, scales, bias, (bf16 *)out, at.first, at.last);
      else
        few_block_f32(job, (const float *const *)lines, at.rows, codes, scales, bias, (float *)out, at.first, at.last);
    }
  }
  free(start);
  return 0;
}
#else
int effbench_quantised(const quantised *job) { return job != NULL; }
#endif
