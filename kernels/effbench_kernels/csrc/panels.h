/* Rows times weights whose rows are contiguous, for many rows: weights laid out anew once, then no sum across a vector.

   In one element type; names as in dots.h. A panel holds PANEL_STEPS steps of STRIP weight rows, a step being one float or a pair of
   bfloat16: panel[step · STRIP + column]. */

/* STRIP sums of each of `rows` rows over `steps` steps, and the last element of an odd depth; added to out if it holds a part. */
INLINE void NAME(panel_sums)(const int rows, const T *const *x, int64_t from, const uint32_t *panel, int64_t steps, int odd, float *out, int part) {
  vec acc[MR][NR];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) acc[i][j] = part ? load_f32(out + i * STRIP + j * LANES) : (vec){0};
  for (int64_t s = 0; s < steps; s++) {
    DOT_VEC wide[NR];
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) wide[j] = PANEL_LOAD(panel + s * STRIP + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      DOT_VEC scalar = BROADCAST(x[i] + from + s * PAIR);
#pragma GCC unroll 8
      for (int j = 0; j < NR; j++) acc[i][j] = DOT(acc[i][j], scalar, wide[j]);
    }
  }
#if PAIR == 2
  if (odd)
    for (int i = 0; i < rows; i++) {
      const uint32_t last = *(const uint16_t *)(x[i] + from + steps * PAIR);
      for (int j = 0; j < NR; j++) acc[i][j] = DOT(acc[i][j], BROADCAST(&last), PANEL_LOAD(panel + steps * STRIP + j * LANES));
    }
#endif
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) store_f32(out + i * STRIP + j * LANES, acc[i][j]);
}

/* As dot_block, for up to PANEL_BLOCK rows; panel has room for a panel and PANEL_BLOCK lines of STRIP floats. */
static void NAME(panel_block)(const T *const *x, int64_t rows, const T *w, int64_t ldw, int64_t d, const T *bias, const float *factor,
                              T *out, float *wide, int64_t ldo, int64_t first, int64_t last, uint32_t *panel) {
  float *sums = (float *)(panel + PANEL_STEPS * STRIP);
  for (int64_t strip = first; strip < last; strip += STRIP) {
    const int64_t cols = last - strip < STRIP ? last - strip : STRIP;
    for (int64_t from = 0; from < d; from += PANEL_STEPS * PAIR) {
      const int64_t deep = d - from < PANEL_STEPS * PAIR ? d - from : PANEL_STEPS * PAIR;
      lay_panel((const char *)(w + strip * ldw + from), ldw * (int64_t)sizeof(T), deep * (int64_t)sizeof(T), cols, panel);
      for (int64_t i = 0; i < rows; i += MR) {
        float *line = sums + i * STRIP;
        if (rows - i >= MR)
          NAME(panel_sums)(MR, x + i, from, panel, deep / PAIR, deep % PAIR, line, from > 0);
        else
          for (int64_t rest = i; rest < rows; rest++) NAME(panel_sums)(1, x + rest, from, panel, deep / PAIR, deep % PAIR, sums + rest * STRIP, from > 0);
      }
    }
    float shift[STRIP] = {0};
    for (int64_t c = 0; c < cols && bias; c++) shift[c] = WIDE(bias[strip + c]);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t c = 0; c < cols; c += LANES) {
        const vec value = load_f32(sums + i * STRIP + c) + load_f32(shift + c) * (factor ? factor[i] : 1.0f);
        const int64_t part = cols - c < LANES ? cols - c : LANES;
        if (!out) {
          memcpy(wide + i * ldo + strip - first + c, &value, part * sizeof(float));
          continue;
        }
        T line[LANES];
        STORE(part == LANES ? out + i * ldo + strip + c : line, value);
        if (part < LANES) memcpy(out + i * ldo + strip + c, line, part * sizeof(T));
      }
  }
}

/* Few rows or many, whichever way is faster for them; panel NULL: always the first. */
INLINE void NAME(row_block)(const T *const *x, int64_t rows, const T *w, int64_t ldw, int64_t d, const T *bias, const float *factor,
                            T *out, float *wide, int64_t ldo, int64_t first, int64_t last, uint32_t *panel) {
  if (panel && rows >= PANEL_ROWS && (sizeof(T) == sizeof(float) || BF16_PAIRS))
    NAME(panel_block)(x, rows, w, ldw, d, bias, factor, out, wide, ldo, first, last, panel);
  else
    NAME(dot_block)(x, rows, w, ldw, d, bias, factor, out, wide, ldo, first, last);
}
