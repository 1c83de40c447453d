/* What the typed headers need, for float; see dots.h. */
#define T float
#define NAME(x) x##_f32
#define LOAD load_f32
#define STORE store_f32
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
#define PARTS 2
#define TABLE __m512 /* 4 bits: the 16 numbers; 8 bits: the scale */
#define PANEL_LOAD(at) load_f32((const float *)(at))
