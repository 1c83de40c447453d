/* Weight rows laid out for panels.h. */
#ifndef EFFBENCH_LAY_H
#define EFFBENCH_LAY_H

#include "tiles.h"
#include "vectors.h"

#define PANEL_STEPS 1024
#define PANEL_BYTES ((PANEL_STEPS + 1 + PANEL_BLOCK) * STRIP * sizeof(uint32_t))

#if defined(__AVX512F__)
/* 16 × 16 elements of 32 bits from rows `stride` bytes apart to lines STRIP apart, their places exchanged. */
INLINE void turn16(const char *from, int64_t stride, uint32_t *to) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps((const float *)(from + i * stride));
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44), a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44), a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88), b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_ps(to + i * STRIP, _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_ps(to + (i + 8) * STRIP, _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd));
    _mm512_storeu_ps(to + (i + 4) * STRIP, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88));
    _mm512_storeu_ps(to + (i + 12) * STRIP, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd));
  }
}
#endif

/* panel[step · STRIP + c] = step `step` (4 bytes; a last half one is filled up with zeros) of row c; zero from `cols` on. */
static __attribute__((unused)) void lay_panel(const char *w, int64_t stride, int64_t bytes, int64_t cols, uint32_t *panel) {
  const int64_t steps = (bytes + 3) / 4;
  int64_t whole_steps = 0, whole_cols = 0;
#if defined(__AVX512F__)
  whole_steps = bytes / 64 * 16, whole_cols = cols / 16 * 16;
  for (int64_t s = 0; s < whole_steps; s += 16)
    for (int64_t c = 0; c < whole_cols; c += 16) turn16(w + c * stride + s * 4, stride, panel + s * STRIP + c);
#endif
  for (int64_t c = 0; c < STRIP; c++)
    for (int64_t s = c < whole_cols ? whole_steps : 0; s < steps; s++) {
      uint32_t one = 0;
      if (c < cols) memcpy(&one, w + c * stride + s * 4, bytes - s * 4 < 4 ? bytes - s * 4 : 4);
      panel[s * STRIP + c] = one;
    }
}

#endif
