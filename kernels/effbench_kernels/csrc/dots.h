/* Rows times weights whose rows are contiguous, in one element type: included once for float and once for bfloat16.

   NAME(x) gives a name its suffix, T is the element type, LOAD makes LANES of them floats, STORE the reverse, WIDE widens one.
   DOT_STEP elements are taken by one step of a dot product, DOT adds their products to a vector of floats. */

/* MR × NR dot products: rows x[i], weight rows w + j · ldw, both contiguous over d. */
INLINE void NAME(dots)(const int rows, const int cols, const T *const *x, const T *w, int64_t ldw, int64_t d, vec4 *out) {
  vec acc[MR][NR];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NR; j++) acc[i][j] = (vec){0};
  int64_t k = 0;
  for (; k + DOT_STEP <= d; k += DOT_STEP) {
    DOT_VEC wide[NR];
#pragma GCC unroll 8
    for (int j = 0; j < cols; j++) wide[j] = DOT_LOAD(w + j * ldw + k);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      DOT_VEC row = DOT_LOAD(x[i] + k);
#pragma GCC unroll 8
      for (int j = 0; j < cols; j++) acc[i][j] = DOT(acc[i][j], row, wide[j]);
    }
  }
  if (k < d) {
    T rest_w[NR][DOT_STEP] = {{0}}, rest_x[DOT_STEP];
    for (int j = 0; j < cols; j++) memcpy(rest_w[j], w + j * ldw + k, (d - k) * sizeof(T));
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      memset(rest_x, 0, sizeof rest_x);
      memcpy(rest_x, x[i] + k, (d - k) * sizeof(T));
      DOT_VEC row = DOT_LOAD(rest_x);
#pragma GCC unroll 8
      for (int j = 0; j < cols; j++) acc[i][j] = DOT(acc[i][j], row, DOT_LOAD(rest_w[j]));
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++) out[i] = sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
}

static void NAME(dot_tile)(int rows, int cols, const T *const *x, const T *w, int64_t ldw, int64_t d, vec4 *out) {
  if (cols == NR) switch (rows) {
      case 6: NAME(dots)(6 <= MR ? 6 : MR, NR, x, w, ldw, d, out); return;
      case 5: NAME(dots)(5 <= MR ? 5 : MR, NR, x, w, ldw, d, out); return;
      case 4: NAME(dots)(4 <= MR ? 4 : MR, NR, x, w, ldw, d, out); return;
      case 3: NAME(dots)(3, NR, x, w, ldw, d, out); return;
      case 2: NAME(dots)(2, NR, x, w, ldw, d, out); return;
      case 1: NAME(dots)(1, NR, x, w, ldw, d, out); return;
    }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < cols; j++) {
      vec4 one;
      NAME(dots)(1, 1, x + i, w + j * ldw, ldw, d, &one);
      out[i][j] = one[0];
    }
}

/* Up to NR sums of a row and their bias, the bias times a factor if there is one: to out, or as floats to wide. */
INLINE void NAME(store_sums)(vec4 sums, vec4 shift, const float *factor, int cols, T *out, float *wide) {
  const vec4 value = sums + (factor ? shift * *factor : shift);
  T four[NR];
  if (!out) {
    memcpy(wide, &value, cols * sizeof(float));
    return;
  }
  STORE4(cols == NR ? out : four, value);
  if (cols < NR) memcpy(out, four, cols * sizeof(T));
}

/* Output columns first up to last of one expert for `rows` rows of x: x[i] · w[o] + bias[o], the bias times factor[i] if there are
   factors. To out[i][o], or as floats to wide[i][o - first]. */
INLINE void NAME(dot_block)(const T *const *x, int64_t rows, const T *w, int64_t ldw, int64_t d, const T *bias, const float *factor,
                            T *out, float *wide, int64_t ldo, int64_t first, int64_t last) {
  for (int64_t o = first; o < last; o += NR) {
    const int cols = last - o < NR ? (int)(last - o) : NR;
    vec4 shift = {0};
    for (int j = 0; j < cols && bias; j++) shift[j] = WIDE(bias[o + j]);
    for (int64_t i = 0; i < rows; i += MR) {
      const int part = rows - i < MR ? (int)(rows - i) : MR;
      vec4 sums[MR];
      NAME(dot_tile)(part, cols, x + i, w + o * ldw, ldw, d, sums);
      for (int a = 0; a < part; a++)
        NAME(store_sums)(sums[a], shift, factor ? factor + i + a : NULL, cols, out ? out + (i + a) * ldo + o : NULL, wide ? wide + (i + a) * ldo + o - first : NULL);
    }
  }
}
