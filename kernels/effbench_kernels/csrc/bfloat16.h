/* What the typed headers need, for bfloat16; see dots.h. Where the processor multiplies pairs of them, it is given pairs. */
#define T bf16
#define NAME(x) x##_bf16
#define LOAD load_bf16
#define STORE store_bf16
#define WIDE(x) widen_bf16(x)
#define STORE4 store4_bf16
#if defined(__AVX512BF16__)
#define DOT_STEP (2 * LANES)
#define DOT_VEC __m512bh
#define DOT_LOAD(at) ((__m512bh)_mm512_loadu_si512((const void *)(at)))
#define DOT(acc, a, b) ((vec)_mm512_dpbf16_ps((__m512)(acc), a, b))
#define A_TYPE BF16_A
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
#define PANEL_LOAD(at) ((__m512bh)_mm512_loadu_si512(at))
#else
#define DOT_STEP LANES
#define DOT_VEC vec
#define DOT_LOAD load_bf16
#define DOT(acc, a, b) ((acc) + (a) * (b))
#define A_TYPE BF16_A
#define PAIR 1
#define LOAD_LINES(wide, b, col)                                                      \
  _Pragma("GCC unroll 8") for (int j_ = 0; j_ < NR; j_++) wide[j_] = load_bf16((b)[0] + (col) + j_ * LANES)
#define BROADCAST(at) ((vec){0} + widen_bf16(*(at)))
#define STORE_LINE(at, acc)                                                           \
  for (int j_ = 0; j_ < NR * LANES; j_++) (at)[j_] = narrow_bf16((acc)[j_ / LANES][j_ % LANES])
#define PANEL_LOAD(at) load_f32((const float *)(at)) /* never used: see row_block */
#endif
#define PARTS 1
#define TABLE __m512i
