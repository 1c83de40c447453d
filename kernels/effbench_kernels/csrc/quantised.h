/* Dot products with weights of 4 or 8 bits, in one element type of x: included once for float and once for bfloat16.

   A half is 32 weights of a row; a group has one scale (4 bits: and one zero) and is made of whole halves. TABLE holds what turns
   the codes of a group into numbers, DECODE makes the PARTS vectors of a half from it. */

INLINE void NAME(few_dots)(const int bits, const int rows, const int cols, const T *const *x, const uint8_t *codes, int64_t ldc,
                           const bf16 *scales, int64_t lds, int64_t d, int64_t group, vec4 *out) {
  vec acc[QR][NR];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) acc[i][j] = (vec){0};
  for (int64_t first = 0, g = 0; first < d; first += group, g++) {
    TABLE table[NR];
#pragma GCC unroll 8
    for (int j = 0; j < cols; j++) table[j] = NAME(table)(bits, scales + j * lds, g);
    for (int64_t k = first; k < first + group; k += HALF) {
      DOT_VEC wide[NR][PARTS];
#pragma GCC unroll 8
      for (int j = 0; j < cols; j++) NAME(decode)(bits, codes + j * ldc, k, table[j], wide[j]);
#pragma GCC unroll 8
      for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; part++) {
          DOT_VEC row = DOT_LOAD(x[i] + k + part * DOT_STEP);
#pragma GCC unroll 8
          for (int j = 0; j < cols; j++) acc[i][j] = DOT(acc[i][j], row, wide[j][part]);
        }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) out[i] = sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
}

INLINE void NAME(few_tile)(const int bits, int rows, int cols, const T *const *x, const uint8_t *codes, int64_t ldc, const bf16 *scales,
                           int64_t lds, int64_t d, int64_t group, vec4 *out) {
  if (cols == NR) switch (rows) {
      case 4: NAME(few_dots)(bits, 4, NR, x, codes, ldc, scales, lds, d, group, out); return;
      case 3: NAME(few_dots)(bits, 3, NR, x, codes, ldc, scales, lds, d, group, out); return;
      case 2: NAME(few_dots)(bits, 2, NR, x, codes, ldc, scales, lds, d, group, out); return;
      case 1: NAME(few_dots)(bits, 1, NR, x, codes, ldc, scales, lds, d, group, out); return;
    }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < cols; j++) {
      vec4 one;
      NAME(few_dots)(bits, 1, 1, x + i, codes + j * ldc, ldc, scales + j * lds, lds, d, group, &one);
      out[i][j] = one[0];
    }
}

/* As dot_block of dots.h, with codes and scales for weights. */
INLINE void NAME(few_block)(int64_t bits, const T *const *x, int64_t rows, const uint8_t *codes, const bf16 *scales, int64_t d, int64_t group,
                            const T *bias, const float *factor, T *out, float *wide, int64_t ldo, int64_t first, int64_t last) {
  const int64_t ldc = bits == 4 ? d / 2 : d, lds = d / group * (bits == 4 ? 2 : 1);
  for (int64_t o = first; o < last; o += NR) {
    const int cols = last - o < NR ? (int)(last - o) : NR;
    vec4 shift = {0};
    for (int j = 0; j < cols && bias; j++) shift[j] = WIDE(bias[o + j]);
    for (int64_t i = 0; i < rows; i += QR) {
      const int part = rows - i < QR ? (int)(rows - i) : QR;
      vec4 sums[QR];
      if (bits == 4)
        NAME(few_tile)(4, part, cols, x + i, codes + o * ldc, ldc, scales + o * lds, lds, d, group, sums);
      else
        NAME(few_tile)(8, part, cols, x + i, codes + o * ldc, ldc, scales + o * lds, lds, d, group, sums);
      for (int a = 0; a < part; a++)
        NAME(store_sums)(sums[a], shift, factor ? factor + i + a : NULL, cols, out ? out + (i + a) * ldo + o : NULL, wide ? wide + (i + a) * ldo + o - first : NULL);
    }
  }
}
