/* Rows times weights whose columns are contiguous, and rows times rows, in one element type; names as in dots.h. */

/* Sums over p of a[i][p] · b[p][·] for `rows` rows and STRIP columns: weights whose columns lie together, and outer products.
   A step of `depth` takes PAIR lines of b at once; a holds that many elements for each, `step` apart. */
INLINE void NAME(axpys)(const int rows, const A_TYPE *const *a, int64_t step, const T *const *b, int64_t col, int64_t depth, T *out,
                        int64_t ldo) {
  vec acc[MR][NR];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) acc[i][j] = (vec){0};
  for (int64_t p = 0; p < depth; p++) {
    DOT_VEC wide[NR];
    LOAD_LINES(wide, b + p * PAIR, col);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      DOT_VEC scalar = BROADCAST(a[i] + p * step);
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) acc[i][j] = DOT(acc[i][j], scalar, wide[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) STORE_LINE(out + i * ldo, acc[i]);
}

static void NAME(axpy_tile)(int rows, const A_TYPE *const *a, int64_t step, const T *const *b, int64_t col, int64_t depth, T *out,
                            int64_t ldo) {
  switch (rows) {
    case 6: NAME(axpys)(6 <= MR ? 6 : MR, a, step, b, col, depth, out, ldo); return;
    case 5: NAME(axpys)(5 <= MR ? 5 : MR, a, step, b, col, depth, out, ldo); return;
    case 4: NAME(axpys)(4 <= MR ? 4 : MR, a, step, b, col, depth, out, ldo); return;
    case 3: NAME(axpys)(3, a, step, b, col, depth, out, ldo); return;
    case 2: NAME(axpys)(2, a, step, b, col, depth, out, ldo); return;
    case 1: NAME(axpys)(1, a, step, b, col, depth, out, ldo); return;
  }
}
