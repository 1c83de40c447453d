/* How the grouped products are cut into tiles for threads: an expert, a block of its rows, a block of its columns. */
#ifndef EFFBENCH_TILES_H
#define EFFBENCH_TILES_H

#include <stdint.h>

#define ROW_BLOCK 192          /* most rows of a tile */
#define ROW_BYTES (320 * 1024) /* of rows that one thread goes over again and again, once for every few columns */
#define COL_BYTES (192 * 1024) /* of weights that it keeps in its cache meanwhile */

/* How many rows a tile has: what stays in a thread's cache, in whole register tiles. */
static int64_t tile_rows(int64_t row_bytes, int64_t unit) {
  int64_t rows = ROW_BYTES / (row_bytes ? row_bytes : 1) / unit * unit;
  if (rows < 4 * unit) rows = 4 * unit;
  return rows < ROW_BLOCK ? rows : ROW_BLOCK;
}

#define PANEL_ROWS 48   /* so many rows of an expert repay laying its weights out anew (panels.h) */
#define PANEL_BLOCK 768 /* most rows of a tile then */

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

#endif
