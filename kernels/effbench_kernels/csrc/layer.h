/* The steps of an expert layer between its products, in one element type: included once for float and once for bfloat16. */

/* A block of one expert's product, the weights' rows counted from `skip` on, whether they are numbers or codes. */
INLINE void NAME(weights_block)(int64_t bits, const T *const *x, int64_t rows, const void *w, const bf16 *scales, int64_t e, int64_t skip,
                                int64_t height, int64_t stride, int64_t ldw, int64_t d, int64_t group, const T *bias, const float *factor,
                                T *out, float *wide, int64_t ldo, int64_t first, int64_t last, uint32_t *panel) {
#if BF16_PAIRS
  if (bits) {
    const int64_t row = e * height + skip, ldc = bits == 4 ? d / 2 : d, lds = d / group * (bits == 4 ? 2 : 1);
    NAME(few_block)(bits, x, rows, (const uint8_t *)w + row * ldc, scales + row * lds, d, group, bias, factor, out, wide, ldo, first, last);
    return;
  }
#endif
  NAME(row_block)(x, rows, (const T *)w + e * stride + skip * ldw, ldw, d, bias, factor, out, wide, ldo, first, last, panel);
}

/* Columns first up to last of act(rows · w_in + b_in) · factor for the rows of one tile, to h; the sums before act to pre. */
static void NAME(hidden_tile)(const layer *job, const T *const *x, int64_t e, const place *at, const float *factor, float *scratch, uint32_t *panel) {
  const int64_t width = at->last - at->first, ld = (width + LANES - 1) / LANES * LANES, halves = job->gated ? 2 : 1;
  const T *bias = job->b_in ? (const T *)job->b_in + e * halves * job->f : NULL;
  float *value = scratch + at->rows * ld;
  for (int64_t half = 0; half < halves; half++)
    NAME(weights_block)(job->bits, x, at->rows, job->w_in, job->scales_in, e, half * job->f, halves * job->f, job->stride_in, job->ld_in, job->d,
                        job->group_in, bias ? bias + half * job->f : NULL, NULL, NULL, half ? value : scratch, ld, at->first, at->last, panel);
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

/* Columns first up to last of w_out · h + factor · b_out for the rows of one tile. */
static void NAME(output_tile)(const layer *job, const T *const *h, int64_t e, const place *at, const float *factor, uint32_t *panel) {
  const T *bias = job->b_out ? (const T *)job->b_out + e * job->o : NULL;
  NAME(weights_block)(job->bits, h, at->rows, job->w_out, job->scales_out, e, 0, job->o, job->stride_out, job->ld_out, job->f, job->group_out, bias,
                      factor + at->from, (T *)job->rows + at->from * job->o, NULL, job->o, at->first, at->last, panel);
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

/* One pair's line of the backward pass: u is the gradient of act(pre); see effbench_hidden_gradient. */
static void NAME(gradient_line)(const hidden_gradient *job, int64_t n) {
  const int64_t f = job->f, wide = job->gated ? 2 * f : f;
  const T *u = (const T *)job->u + n * f, *pre = (const T *)job->pre + n * wide;
  T *act = (T *)job->act_out + n * f, *dpre = (T *)job->dpre + n * wide;
  const float factor = job->factor ? job->factor[n] : 1.0f;
  const vec zero = {0}, one = zero + 1.0f;
  vec dot = zero;
  for (int64_t c = 0; c < f; c += LANES) {
    const int64_t part = f - c < LANES ? f - c : LANES;
    T lines[3][LANES] = {{0}}, outs[3][LANES];
    const int whole = part == LANES;
    if (!whole) {
      memcpy(lines[0], u + c, part * sizeof(T)), memcpy(lines[1], pre + c, part * sizeof(T));
      if (job->gated) memcpy(lines[2], pre + f + c, part * sizeof(T));
    }
    const vec grad = LOAD(whole ? u + c : lines[0]), gate = LOAD(whole ? pre + c : lines[1]);
    const vec value = job->gated ? LOAD(whole ? pre + f + c : lines[2]) : one;
    vec plain, slope;
    if (job->act == RELU) {
      plain = (vec)((bits)gate & ~(bits)(gate <= zero));
      slope = (vec)((bits)one & ~(bits)(gate <= zero));
    } else {
      const vec sigmoid = one / (one + exp_vec(zero - gate));
      plain = gate * sigmoid;
      slope = sigmoid + plain * (one - sigmoid);
    }
    dot += grad * plain * value;
    STORE(whole ? act + c : outs[0], plain * value * factor);
    STORE(whole ? dpre + c : outs[1], grad * factor * value * slope);
    if (job->gated) STORE(whole ? dpre + f + c : outs[2], grad * factor * plain);
    if (!whole) {
      memcpy(act + c, outs[0], part * sizeof(T)), memcpy(dpre + c, outs[1], part * sizeof(T));
      if (job->gated) memcpy(dpre + f + c, outs[2], part * sizeof(T));
    }
  }
  const vec4 sums = sum4(dot, zero, zero, zero);
  job->dots[n] = sums[0];
}
