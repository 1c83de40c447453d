/* Grouped products of expert layers on a CPU, in float32 and bfloat16 with float32 sums.

   Rows are grouped by expert: rows offsets[e] up to offsets[e + 1] belong to expert e. A weight is read where it lies, in the
   one pass that its expert needs; nothing is packed or copied, and rows are gathered through an index while they are used. */

#include <stdlib.h>

#include "lay.h"
#include "tiles.h"
#include "vectors.h"

typedef struct {
  const void *x;          /* rows of width d */
  const int64_t *row;     /* row of x for each sorted position, or NULL: the position itself */
  const void *w;          /* (experts, o, d) through strides */
  const void *bias;       /* (experts, o), or NULL */
  void *out;              /* (positions, o), rows ldo apart */
  const int64_t *offsets; /* (experts + 1) */
  const int64_t *left_row; /* effbench_outer: row of left for each sorted position, or NULL */
  int64_t experts, d, o;
  int64_t ldx, ldo, stride_e, stride_o, stride_d, stride_bias;
  int64_t is_bf16, threads;
  int64_t zeroed; /* effbench_outer: out holds zeros already */
} product;

#include "float32.h"
#include "dots.h"
#include "panels.h"
#include "axpys.h"
#include "undefine.h"

#include "bfloat16.h"
#include "dots.h"
#include "panels.h"
#include "axpys.h"
#include "undefine.h"

/* out[i] = x[row i] · w[e] + bias[e], for every row of every expert. Returns 0, or 1 where this target cannot do it. */
int effbench_product(const product *job) {
  const int64_t item = job->is_bf16 ? 2 : 4, dots = job->stride_d == 1;
  if (!dots && (job->stride_o != 1 || job->o < STRIP || job->bias || (job->is_bf16 && (!BF16_PAIRS || job->d % 2)))) return 1;
  int64_t active = 0, *start = malloc(sizeof(int64_t) * (job->experts + 1));
  for (int64_t e = 0; e < job->experts; e++) active += job->offsets[e + 1] > job->offsets[e];
  const int many = dots && job->offsets[job->experts] >= PANEL_ROWS * active;
  const int64_t block = many ? PANEL_BLOCK : tile_rows(job->d * item, MR);
  const int64_t cols = many ? STRIP : tile_columns(job->o, job->d * item, active, job->threads, dots ? 2 * NR : STRIP);
  start[0] = 0;
  for (int64_t e = 0; e < job->experts; e++)
    start[e + 1] = start[e] + (job->offsets[e + 1] - job->offsets[e] + block - 1) / block * ((job->o + cols - 1) / cols);
#pragma omp parallel num_threads(job->threads)
  {
    int64_t e = 0;
    const void **lines = malloc(sizeof(void *) * (block + (dots ? 0 : job->d)));
    uint32_t *panel = many ? malloc(PANEL_BYTES) : NULL;
#pragma omp for schedule(monotonic : dynamic, 1) nowait
    for (int64_t tile = 0; tile < start[job->experts]; tile++) {
      const place at = find(job->offsets, start, &e, tile, block, cols, job->o);
      const char *w = (const char *)job->w + e * job->stride_e * item;
      const void *bias = job->bias ? (const char *)job->bias + e * job->stride_bias * item : NULL;
      char *out = (char *)job->out + at.from * job->ldo * item;
      for (int64_t i = 0; i < at.rows; i++)
        lines[i] = (const char *)job->x + (job->row ? job->row[at.from + i] : at.from + i) * job->ldx * item;
      for (int64_t p = 0; p < job->d && !dots; p++) lines[block + p] = w + p * job->stride_d * item;
      if (dots && job->is_bf16)
        row_block_bf16((const bf16 *const *)lines, at.rows, (const bf16 *)w, job->stride_o, job->d, bias, NULL, (bf16 *)out, NULL, job->ldo, at.first, at.last, panel);
      else if (dots)
        row_block_f32((const float *const *)lines, at.rows, (const float *)w, job->stride_o, job->d, bias, NULL, (float *)out, NULL, job->ldo, at.first, at.last, panel);
      else
        for (int64_t strip = at.first; strip < at.last; strip += STRIP) {
          const int64_t col = strip + STRIP <= job->o ? strip : job->o - STRIP; /* the last strip overlaps: the same values again */
          for (int64_t i = 0; i < at.rows; i += MR) {
            const int part = at.rows - i < MR ? (int)(at.rows - i) : MR;
            if (job->is_bf16)
              axpy_tile_bf16(part, (const BF16_A *const *)lines + i, 1, (const bf16 *const *)lines + block, col, job->d / 2, (bf16 *)out + i * job->ldo + col, job->ldo);
            else
              axpy_tile_f32(part, (const float *const *)lines + i, 1, (const float *const *)lines + block, col, job->d, (float *)out + i * job->ldo + col, job->ldo);
          }
        }
    }
    free(lines);
    free(panel);
  }
  free(start);
  return 0;
}

/* One tile's columns of left, gathered: packed[p · width + o] is left[p][o], or the pair of rows 2p and 2p + 1. */
static void pack(const product *job, int64_t from, int64_t rows, int64_t first, int64_t width, void *packed) {
  const int64_t lines = job->is_bf16 ? 2 : 1;
  for (int64_t p = 0; p * lines < rows; p++) {
    const int64_t i = from + p * lines;
    const int64_t one = (job->left_row ? job->left_row[i] : i) * job->stride_d + first;
    if (!job->is_bf16) {
      memcpy((float *)packed + p * width, (const float *)job->w + one, width * sizeof(float));
      continue;
    }
    const bf16 *a = (const bf16 *)job->w + one, *b = NULL;
    if (2 * p + 1 < rows) b = (const bf16 *)job->w + (job->left_row ? job->left_row[i + 1] : i + 1) * job->stride_d + first;
    for (int64_t o = 0; o < width; o++) ((uint32_t *)packed)[p * width + o] = a[o] | (uint32_t)(b ? b[o] : 0) << 16;
  }
}

/* out[e] (o, d) = the sum over the rows i of expert e of left[left_row i] (o) ⊗ x[row i] (d); zero for an expert without rows.
   left is the job's w, its rows stride_d apart; out is contiguous. Returns as effbench_product does. */
int effbench_outer(const product *job) {
  const int64_t item = job->is_bf16 ? 2 : 4;
  if (job->d < STRIP || (job->is_bf16 && !BF16_PAIRS)) return 1;
  int64_t longest = 0, *start = malloc(sizeof(int64_t) * (job->experts + 1));
  for (int64_t e = 0; e < job->experts; e++)
    if (job->offsets[e + 1] - job->offsets[e] > longest) longest = job->offsets[e + 1] - job->offsets[e];
  const int64_t col_bytes = 4 * longest > job->d * item ? 4 * longest : job->d * item;
  const int64_t cols = tile_columns(job->o, col_bytes, job->experts, job->threads, MR);
  start[0] = 0;
  for (int64_t e = 0; e < job->experts; e++) start[e + 1] = start[e] + (job->o + cols - 1) / cols;
#pragma omp parallel num_threads(job->threads)
  {
    int64_t e = 0;
    const void **lines = malloc(sizeof(void *) * (longest + 1));
    float *packed = malloc(sizeof(float) * cols * (longest + 1));
    void *zeros = calloc(job->d, item);
#pragma omp for schedule(monotonic : dynamic, 1) nowait
    for (int64_t tile = 0; tile < start[job->experts]; tile++) {
      while (start[e + 1] <= tile) e++;
      const int64_t from = job->offsets[e], rows = job->offsets[e + 1] - from;
      const int64_t first = (tile - start[e]) * cols, width = first + cols < job->o ? cols : job->o - first;
      char *out = (char *)job->out + (e * job->o + first) * job->d * item;
      if (!rows) {
        if (!job->zeroed) memset(out, 0, width * job->d * item);
        continue;
      }
      for (int64_t i = 0; i < rows; i++)
        lines[i] = (const char *)job->x + (job->row ? job->row[from + i] : from + i) * job->ldx * item;
      lines[rows] = zeros; /* the second of an odd number's last pair */
      pack(job, from, rows, first, width, packed);
      for (int64_t strip = 0; strip < job->d; strip += STRIP) {
        const int64_t col = strip + STRIP <= job->d ? strip : job->d - STRIP;
        for (int64_t o = 0; o < width; o += MR) {
          const int part = width - o < MR ? (int)(width - o) : MR;
          const float *a[MR];
          for (int i = 0; i < part; i++) a[i] = packed + o + i;
          if (job->is_bf16)
            axpy_tile_bf16(part, (const BF16_A *const *)a, width, (const bf16 *const *)lines, col, (rows + 1) / 2, (bf16 *)out + o * job->d + col, job->d);
          else
            axpy_tile_f32(part, a, width, (const float *const *)lines, col, rows, (float *)out + o * job->d + col, job->d);
        }
      }
    }
    free(lines);
    free(packed);
    free(zeros);
  }
  free(start);
  return 0;
}
