/* The forward pass of an expert layer on a CPU in one call, and the order of its pairs.

   Three passes with all threads: act(x · w_in) for every pair, the product with w_out, the sum of each token's rows. Activations
   are applied while a tile is in the cache, and nothing but the hidden rows and the products' rows is written. */

#include <stdlib.h>

#include "lay.h"
#include "tiles.h"
#include "vectors.h"
#if BF16_PAIRS
#include "decode.h"
#endif

enum { SILU = 0, RELU = 1 };

typedef struct {
  const void *x;          /* (tokens, d), rows ld_x apart */
  const void *w_in;       /* (experts, 2f or f, d): gate before value; experts stride_in and rows ld_in apart */
  const void *w_out;      /* (experts, o, f), likewise */
  const bf16 *scales_in;  /* bits 4 or 8: the scales of w_in, whose codes it then points to; see quantised_torch.py */
  const bf16 *scales_out; /* likewise */
  const void *b_in;       /* whole, or NULL */
  const void *b_out;      /* whole, or NULL */
  const float *weight;    /* (tokens, k) */
  const void *add;        /* (tokens, o), or NULL */
  const int64_t *offsets; /* (experts + 1) */
  const int64_t *token;   /* (pairs) */
  const int64_t *inverse; /* (tokens, k) */
  void *h;                /* (pairs, f): room for the hidden rows */
  void *rows;             /* (pairs, o): room for the products' rows */
  void *pre;              /* (pairs, 2f or f) where the sums before the activation are wanted, or NULL */
  void *out;              /* (tokens, o) */
  int64_t tokens, k, experts, d, f, o, ld_x, stride_in, ld_in, stride_out, ld_out, ld_add, act, gated, is_bf16, threads;
  int64_t bits, group_in, group_out; /* bits 0: weights as they are */
} layer;

typedef struct {
  const void *u;       /* (pairs, f) */
  const void *pre;     /* (pairs, 2f or f) */
  const float *factor; /* (pairs), or NULL: 1 */
  void *act_out;       /* (pairs, f) */
  void *dpre;          /* (pairs, 2f or f) */
  float *dots;         /* (pairs) */
  int64_t pairs, f, act, gated, is_bf16, threads;
} hidden_gradient;

#include "float32.h"
#include "dots.h"
#include "panels.h"
#if BF16_PAIRS
#include "quantised.h"
#endif
#include "layer.h"
#include "undefine.h"

#include "bfloat16.h"
#include "dots.h"
#include "panels.h"
#if BF16_PAIRS
#include "quantised.h"
#endif
#include "layer.h"
#include "undefine.h"

#define MOST_COLUMNS 128

static void count_tiles(const layer *job, int64_t columns, int64_t cols, int64_t block, int64_t *start) {
  start[0] = 0;
  for (int64_t e = 0; e < job->experts; e++)
    start[e + 1] = start[e] + (job->offsets[e + 1] - job->offsets[e] + block - 1) / block * ((columns + cols - 1) / cols);
}

/* The forward pass. Returns 0, or 1 where this target cannot do it. */
int effbench_forward(const layer *job) {
  const int64_t item = job->is_bf16 ? 2 : 4, kept = job->offsets[job->experts];
#if BF16_PAIRS
  if (job->bits && !(reads_codes(job->d, job->group_in, job->bits) && reads_codes(job->f, job->group_out, job->bits))) return 1;
#else
  if (job->bits) return 1;
#endif
  int64_t active = 0, *start_in = malloc(2 * sizeof(int64_t) * (job->experts + 1)), *start_out = start_in + job->experts + 1;
  float *factor = malloc(sizeof(float) * (kept + 1));
  for (int64_t e = 0; e < job->experts; e++) active += job->offsets[e + 1] > job->offsets[e];
  for (int64_t pair = 0; pair < job->tokens * job->k; pair++)
    if (job->inverse[pair] < kept) factor[job->inverse[pair]] = job->weight[pair];
  const int many = !job->bits && kept >= PANEL_ROWS * active;
  int64_t cols_in = many ? STRIP : tile_columns(job->f, (job->gated ? 2 : 1) * job->d * item, active, job->threads, 2 * NR);
  if (cols_in > MOST_COLUMNS) cols_in = MOST_COLUMNS;
  const int64_t cols_out = many ? STRIP : tile_columns(job->o, job->f * item, active, job->threads, 2 * NR);
  const int64_t block_in = many ? PANEL_BLOCK : tile_rows(job->d * item, MR), block_out = many ? PANEL_BLOCK : tile_rows(job->f * item, MR);
  count_tiles(job, job->f, cols_in, block_in, start_in);
  count_tiles(job, job->o, cols_out, block_out, start_out);
#pragma omp parallel num_threads(job->threads)
  {
    const void *lines[PANEL_BLOCK];
    float *scratch = malloc(sizeof(float) * 2 * (many ? PANEL_BLOCK * STRIP : ROW_BLOCK * (MOST_COLUMNS + LANES)));
    uint32_t *panel = many ? malloc(PANEL_BYTES) : NULL;
    int64_t e = 0;
#pragma omp for schedule(monotonic : dynamic, 1)
    for (int64_t tile = 0; tile < start_in[job->experts]; tile++) {
      const place at = find(job->offsets, start_in, &e, tile, block_in, cols_in, job->f);
      for (int64_t i = 0; i < at.rows; i++) lines[i] = (const char *)job->x + job->token[at.from + i] * job->ld_x * item;
      if (job->is_bf16)
        hidden_tile_bf16(job, (const bf16 *const *)lines, e, &at, factor, scratch, panel);
      else
        hidden_tile_f32(job, (const float *const *)lines, e, &at, factor, scratch, panel);
    }
    e = 0;
#pragma omp for schedule(monotonic : dynamic, 1)
    for (int64_t tile = 0; tile < start_out[job->experts]; tile++) {
      const place at = find(job->offsets, start_out, &e, tile, block_out, cols_out, job->o);
      for (int64_t i = 0; i < at.rows; i++) lines[i] = (const char *)job->h + (at.from + i) * job->f * item;
      if (job->is_bf16)
        output_tile_bf16(job, (const bf16 *const *)lines, e, &at, factor, panel);
      else
        output_tile_f32(job, (const float *const *)lines, e, &at, factor, panel);
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < job->tokens; t++)
      if (job->is_bf16)
        sum_rows_bf16(job, t);
      else
        sum_rows_f32(job, t);
    free(scratch);
    free(panel);
  }
  free(start_in);
  free(factor);
  return 0;
}

/* With u the gradient of act(pre) before the factor of its pair: act_out = factor · act(pre), dpre = the gradient of pre,
   dots = <u, act(pre)>. One pass over what is read. */
void effbench_hidden_gradient(const hidden_gradient *job) {
#pragma omp parallel for schedule(static) num_threads(job->threads)
  for (int64_t n = 0; n < job->pairs; n++)
    if (job->is_bf16)
      gradient_line_bf16(job, n);
    else
      gradient_line_f32(job, n);
}

/* Pairs by expert, stably: a counting sort of index (tokens, k). Ids outside 0 … experts - 1 come last, as expert `experts`. */
void effbench_sort(const int64_t *index, int64_t tokens, int64_t k, int64_t experts, int64_t *offsets, int64_t *token, int64_t *slot,
                   int64_t *expert, int64_t *inverse) {
  int64_t *next = calloc(experts + 2, sizeof(int64_t));
  for (int64_t pair = 0; pair < tokens * k; pair++) next[1 + (index[pair] < 0 || index[pair] >= experts ? experts : index[pair])]++;
  for (int64_t e = 0; e <= experts; e++) next[e + 1] += next[e];
  memcpy(offsets, next, sizeof(int64_t) * (experts + 1));
  for (int64_t t = 0, pair = 0; t < tokens; t++)
    for (int64_t s = 0; s < k; s++, pair++) {
      const int64_t e = index[pair] < 0 || index[pair] >= experts ? experts : index[pair], n = next[e]++;
      token[n] = t, slot[n] = s, expert[n] = e, inverse[pair] = n;
    }
  free(next);
}
