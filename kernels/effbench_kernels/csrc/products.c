/* Grouped products of expert layers on a CPU, in float32 and bfloat16 with float32 sums.

   Rows are grouped by expert: rows offsets[e] up to offsets[e + 1] belong to expert e. A weight is read where it lies, in the
   one pass that its expert needs; nothing is packed or copied, and rows are gathered through an index while they are used. */

#include <stdlib.h>

#include "vectors.h"

#define STRIP (NR * LANES) /* columns that a row of accumulators holds */
#define ROW_BLOCK 192
#define COL_BYTES (192 * 1024) /* of weights that one thread keeps in its cache while it goes over the rows */

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
} product;

#define T float
#define NAME(x) x##_f32
#define LOAD load_f32
#define WIDE(x) (x)
#define STORE4 store4_f32
#define DOT_STEP LANES
#define DOT_VEC vec
#define DOT_LOAD load_f32
#define DOT(acc, a, b) ((acc) + (a) * (b))
#define A_TYPE float
#define PAIR 1
#define LOAD_LINES(wide, b, col)                                                      \
  _Pragma("GCC unroll 8") for (int j_ = 0; j_ < NR; j_++) wide[j_] = load_f32((b)[0] + (col) + j_ * LANES)
#define BROADCAST(at) ((vec){0} + *(at))
#define STORE_LINE(at, acc)                                                           \
  _Pragma("GCC unroll 8") for (int j_ = 0; j_ < NR; j_++) *(vec_u *)((at) + j_ * LANES) = (acc)[j_]
#include "product.h"
#undef A_TYPE
#undef PAIR
#undef LOAD_LINES
#undef BROADCAST
#undef STORE_LINE
#undef T
#undef NAME
#undef LOAD
#undef WIDE
#undef STORE4
#undef DOT_STEP
#undef DOT_VEC
#undef DOT_LOAD
#undef DOT

#define T bf16
#define NAME(x) x##_bf16
#define LOAD load_bf16
#define WIDE(x) widen_bf16(x)
#define STORE4 store4_bf16
#if defined(__AVX512BF16__)
#define DOT_STEP (2 * LANES)
#define DOT_VEC __m512bh
#define DOT_LOAD(at) ((__m512bh)_mm512_loadu_si512((const void *)(at)))
#define DOT(acc, a, b) ((vec)_mm512_dpbf16_ps((__m512)(acc), a, b))
#define A_TYPE uint32_t /* two neighbours */
#define PAIR 2
/* Two lines of 64 columns, interleaved: wide[0] holds columns 0-3, 8-11, … of both, wide[1] columns 4-7, 12-15, … */
#define LOAD_LINES(wide, b, col)                                                      \
  _Pragma("GCC unroll 2") for (int j_ = 0; j_ < 2; j_++) {                            \
    __m512i one_ = _mm512_loadu_si512((b)[0] + (col) + j_ * 32), two_ = _mm512_loadu_si512((b)[1] + (col) + j_ * 32); \
    wide[2 * j_] = (__m512bh)_mm512_unpacklo_epi16(one_, two_);                       \
    wide[2 * j_ + 1] = (__m512bh)_mm512_unpackhi_epi16(one_, two_);                   \
  }
#define BROADCAST(at) ((__m512bh)_mm512_set1_epi32(*(const int32_t *)(at)))
#define STORE_LINE(at, acc) store_pairs(at, acc)
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
#else
#define DOT_STEP LANES
#define DOT_VEC vec
#define DOT_LOAD load_bf16
#define DOT(acc, a, b) ((acc) + (a) * (b))
#define A_TYPE bf16
#define PAIR 1
#define LOAD_LINES(wide, b, col)                                                      \
  _Pragma("GCC unroll 8") for (int j_ = 0; j_ < NR; j_++) wide[j_] = load_bf16((b)[0] + (col) + j_ * LANES)
#define BROADCAST(at) ((vec){0} + widen_bf16(*(at)))
#define STORE_LINE(at, acc)                                                           \
  for (int j_ = 0; j_ < NR * LANES; j_++) (at)[j_] = narrow_bf16((acc)[j_ / LANES][j_ % LANES])
#endif
#include "product.h"

/* How many columns a tile has: what fits a thread's cache, and few enough that every thread gets tiles. */
static int64_t tile_columns(int64_t o, int64_t col_bytes, int64_t groups, int64_t threads, int64_t unit) {
  int64_t cols = COL_BYTES / (col_bytes ? col_bytes : 1);
  int64_t share = groups * o / (4 * threads);
  if (share < cols) cols = share;
  cols = cols / unit * unit;
  if (cols < unit) cols = unit;
  return cols < o ? cols : o;
}

/* The tile number `tile`, as its expert (at or after *e), its first row and its block of columns. */
typedef struct { int64_t from, rows, first, last; } place;

static place find(const int64_t *offsets, const int64_t *start, int64_t *e, int64_t tile, int64_t block, int64_t cols, int64_t o) {
  while (start[*e + 1] <= tile) ++*e;
  const int64_t rows = offsets[*e + 1] - offsets[*e], row_blocks = rows ? (rows + block - 1) / block : 1;
  const int64_t at = tile - start[*e];
  place here;
  here.first = at / row_blocks * cols;
  here.last = here.first + cols < o ? here.first + cols : o;
  here.from = offsets[*e] + at % row_blocks * block;
  here.rows = offsets[*e + 1] - here.from < block ? offsets[*e + 1] - here.from : block;
  return here;
}

/* out[i] = x[row i] · w[e] + bias[e], for every row of every expert. Returns 0, or 1 where this target cannot do it. */
int effbench_product(const product *job) {
  const int64_t item = job->is_bf16 ? 2 : 4, dots = job->stride_d == 1, block = ROW_BLOCK;
  if (!dots && (job->stride_o != 1 || job->o < STRIP || job->bias || (job->is_bf16 && (PAIR == 1 || job->d % 2)))) return 1;
  int64_t active = 0, *start = malloc(sizeof(int64_t) * (job->experts + 1));
  for (int64_t e = 0; e < job->experts; e++) active += job->offsets[e + 1] > job->offsets[e];
  const int64_t cols = tile_columns(job->o, job->d * item, active, job->threads, dots ? 2 * NR : STRIP);
  start[0] = 0;
  for (int64_t e = 0; e < job->experts; e++)
    start[e + 1] = start[e] + (job->offsets[e + 1] - job->offsets[e] + block - 1) / block * ((job->o + cols - 1) / cols);
#pragma omp parallel num_threads(job->threads)
  {
    int64_t e = 0;
    const void **lines = malloc(sizeof(void *) * (block + (dots ? 0 : job->d)));
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t tile = 0; tile < start[job->experts]; tile++) {
      const place at = find(job->offsets, start, &e, tile, block, cols, job->o);
      const char *w = (const char *)job->w + e * job->stride_e * item;
      const void *bias = job->bias ? (const char *)job->bias + e * job->stride_bias * item : NULL;
      char *out = (char *)job->out + at.from * job->ldo * item;
      for (int64_t i = 0; i < at.rows; i++)
        lines[i] = (const char *)job->x + (job->row ? job->row[at.from + i] : at.from + i) * job->ldx * item;
      for (int64_t p = 0; p < job->d && !dots; p++) lines[block + p] = w + p * job->stride_d * item;
      if (dots && job->is_bf16)
        dot_block_bf16((const bf16 *const *)lines, at.rows, (const bf16 *)w, job->stride_o, job->d, bias, (bf16 *)out, job->ldo, at.first, at.last);
      else if (dots)
        dot_block_f32((const float *const *)lines, at.rows, (const float *)w, job->stride_o, job->d, bias, (float *)out, job->ldo, at.first, at.last);
      else
        for (int64_t strip = at.first; strip < at.last; strip += STRIP) {
          const int64_t col = strip + STRIP <= job->o ? strip : job->o - STRIP; /* the last strip overlaps: the same values again */
          for (int64_t i = 0; i < at.rows; i += MR) {
            const int part = at.rows - i < MR ? (int)(at.rows - i) : MR;
            if (job->is_bf16)
              axpy_tile_bf16(part, (const A_TYPE *const *)lines + i, 1, (const bf16 *const *)lines + block, col, job->d / 2, (bf16 *)out + i * job->ldo + col, job->ldo);
            else
              axpy_tile_f32(part, (const float *const *)lines + i, 1, (const float *const *)lines + block, col, job->d, (float *)out + i * job->ldo + col, job->ldo);
          }
        }
    }
    free(lines);
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
  if (job->d < STRIP || (job->is_bf16 && PAIR == 1)) return 1;
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
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t tile = 0; tile < start[job->experts]; tile++) {
      while (start[e + 1] <= tile) e++;
      const int64_t from = job->offsets[e], rows = job->offsets[e + 1] - from;
      const int64_t first = (tile - start[e]) * cols, width = first + cols < job->o ? cols : job->o - first;
      char *out = (char *)job->out + (e * job->o + first) * job->d * item;
      if (!rows) {
        memset(out, 0, width * job->d * item);
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
            axpy_tile_bf16(part, (const A_TYPE *const *)a, width, (const bf16 *const *)lines, col, (rows + 1) / 2, (bf16 *)out + o * job->d + col, job->d);
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
