/* The steps of an expert layer between its products, in one element type: included once for float and once for bfloat16. */

/* Columns first up to last of act(rows · w_in + b_in) · factor for the rows of one tile, to h; the sums before act to pre. */
static void NAME(hidden_tile)(const layer *job, const T *const *x, int64_t e, const place *at, const float *factor, float *scratch) {
  const int64_t width = at->last - at->first, ld = (width + LANES - 1) / LANES * LANES, halves = job->gated ? 2 : 1;
  const T *w = (const T *)job->w_in + e * job->stride_in, *bias = job->b_in ? (const T *)job->b_in + e * halves * job->f : NULL;
  float *value = scratch + at->rows * ld;
  for (int64_t half = 0; half < halves; half++)
    NAME(dot_block)(x, at->rows, w + half * job->f * job->ld_in, job->ld_in, job->d, bias ? bias + half * job->f : NULL, NULL, NULL,
                    half ? value : scratch, ld, at->first, at->last);
  for (int64_t i = 0; i < at->rows; i++) {
    const int64_t n = at->from + i;
    T *h = (T *)job->h + n * job->f + at->first, *pre = job->pre ? (T *)job->pre + n * halves * job->f + at->first : NULL;
    for (int64_t c = 0; c < width; c += LANES) {
      const vec gate = load_f32(scratch + i * ld + c), other = job->gated ? load_f32(value + i * ld + c) : (vec){0} + 1.0f;
      const vec zero = {0};
      const vec out = (job->act == RELU ? (vec)((bits)gate & ~(bits)(gate <= zero)) : gate / (1.0f + exp_vec(zero - gate))) * other * factor[n];
      if (c + LANES <= width) {
        STORE(h + c, out);
        if (pre) STORE(pre + c, gate);
        if (pre && job->gated) STORE(pre + job->f + c, other);
      } else {
        T rest[3][LANES];
        STORE(rest[0], out), STORE(rest[1], gate), STORE(rest[2], other);
        memcpy(h + c, rest[0], (width - c) * sizeof(T));
        if (pre) memcpy(pre + c, rest[1], (width - c) * sizeof(T));
        if (pre && job->gated) memcpy(pre + job->f + c, rest[2], (width - c) * sizeof(T));
      }
    }
  }
}

/* Token t's output: the sum of its rows, and its line of add. */
static void NAME(sum_rows)(const layer *job, int64_t t) {
  T *out = (T *)job->out + t * job->o;
  const T *add = job->add ? (const T *)job->add + t * job->ld_add : NULL;
  for (int64_t c = 0; c < job->o; c += LANES) {
    const int64_t part = job->o - c < LANES ? job->o - c : LANES;
    T line[LANES] = {0};
    vec sum = {0};
    for (int64_t k = 0; k <= job->k; k++) {
      const T *from = add ? add + c : NULL;
      if (k < job->k) {
        const int64_t n = job->inverse[t * job->k + k];
        from = n < job->offsets[job->experts] ? (const T *)job->rows + n * job->o + c : NULL;
      }
      if (!from) continue;
      if (part < LANES) from = memcpy(line, from, part * sizeof(T));
      sum += LOAD(from);
    }
    STORE(part < LANES ? line : out + c, sum);
    if (part < LANES) memcpy(out + c, line, part * sizeof(T));
  }
}
