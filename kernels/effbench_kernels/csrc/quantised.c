/* Grouped products of expert layers with weights of 4 or 8 bits, in float32 and bfloat16 with float32 sums, for AVX-512.

   Codes become numbers in registers (decode.h). */

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

#if BF16_PAIRS
#include "decode.h"
#include "tiles.h"

#include "float32.h"
#include "dots.h"
#include "quantised.h"
#include "undefine.h"

#include "bfloat16.h"
#include "dots.h"
#include "quantised.h"
#include "undefine.h"

/* out[i] = x[row i] · w[e] + bias[e], for every row of every expert. Returns 0, or 1 where this target cannot do it. */
int effbench_quantised(const quantised *job) {
  const int64_t item = job->is_bf16 ? 2 : 4, block = tile_rows(job->d * item, QR);
  const int64_t code_bytes = job->bits == 4 ? job->d / 2 : job->d, scale_items = job->d / job->group * (job->bits == 4 ? 2 : 1);
  if (!reads_codes(job->d, job->group, job->bits)) return 1;
  int64_t active = 0, *start = malloc(sizeof(int64_t) * (job->experts + 1));
  for (int64_t e = 0; e < job->experts; e++) active += job->offsets[e + 1] > job->offsets[e];
  const int64_t cols = tile_columns(job->o, code_bytes, active, job->threads, 2 * NR);
  start[0] = 0;
  for (int64_t e = 0; e < job->experts; e++)
    start[e + 1] = start[e] + (job->offsets[e + 1] - job->offsets[e] + block - 1) / block * ((job->o + cols - 1) / cols);
#pragma omp parallel num_threads(job->threads)
  {
    int64_t e = 0;
    const void *lines[ROW_BLOCK];
#pragma omp for schedule(monotonic : dynamic, 1) nowait
    for (int64_t tile = 0; tile < start[job->experts]; tile++) {
      const place at = find(job->offsets, start, &e, tile, block, cols, job->o);
      const uint8_t *codes = job->codes + e * job->o * code_bytes;
      const bf16 *scales = job->scales + e * job->o * scale_items;
      const void *bias = job->bias ? (const char *)job->bias + e * job->stride_bias * item : NULL;
      char *out = (char *)job->out + at.from * job->ldo * item;
      for (int64_t i = 0; i < at.rows; i++)
        lines[i] = (const char *)job->x + (job->row ? job->row[at.from + i] : at.from + i) * job->ldx * item;
      if (job->is_bf16)
        few_block_bf16(job->bits, (const bf16 *const *)lines, at.rows, codes, scales, job->d, job->group, bias, NULL, (bf16 *)out, NULL, job->ldo, at.first, at.last);
      else
        few_block_f32(job->bits, (const float *const *)lines, at.rows, codes, scales, job->d, job->group, bias, NULL, (float *)out, NULL, job->ldo, at.first, at.last);
    }
  }
  free(start);
  return 0;
}
#else
int effbench_quantised(const quantised *job) { return job != NULL; }
#endif
