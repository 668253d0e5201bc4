// Rows of a cache or of queries in any storage, widened to float and back.
#pragma once
#include "attention.h"
#include "vector.h"

namespace MC_ISA {

// `at` counts elements; for MC_I4 bytes, of two channels each.
static void widen_row(int32_t type, const void *data, int64_t at, int64_t D, float *y) {
    int64_t d = 0;
    switch (type) {
    case MC_F32:
        for (; d < D; d++) y[d] = ((const float *)data)[at + d];
        break;
    case MC_BF16:
        for (; d + LANES <= D; d += LANES) store(y + d, widen_bf16((const uint16_t *)data + at + d));
        for (; d < D; d++) y[d] = from_bf16(((const uint16_t *)data)[at + d]);
        break;
    case MC_F16:
        for (; d + LANES <= D; d += LANES) store(y + d, widen_f16((const uint16_t *)data + at + d));
        for (; d < D; d++) y[d] = from_f16(((const uint16_t *)data)[at + d]);
        break;
    case MC_I8:
        for (; d + LANES <= D; d += LANES) store(y + d, widen_i8((const int8_t *)data + at + d));
        for (; d < D; d++) y[d] = ((const int8_t *)data)[at + d];
        break;
    default:
        for (; d < D; d++) {
            uint8_t two = ((const uint8_t *)data)[at + d / 2];
            y[d] = (float)((d % 2 ? two >> 4 : two & 15) - 8);
        }
    }
}

static void widen_rows(int32_t type, const void *data, int64_t at, int64_t step, int n, int64_t D, float *y) {
    for (int i = 0; i < n; i++) widen_row(type, data, at + i * step, D, y + i * D);
}

static void narrow_row(int32_t type, const float *x, int64_t D, void *data, int64_t at) {
    if (type == MC_F32)
        for (int64_t d = 0; d < D; d++) ((float *)data)[at + d] = x[d];
    else if (type == MC_BF16) {
        int64_t d = 0;
        uint16_t *y = (uint16_t *)data + at;
#if defined(__AVX512BF16__)
        for (; d + LANES <= D; d += LANES) _mm256_storeu_si256((__m256i *)(y + d), (__m256i)_mm512_cvtneps_pbh((__m512)load(x + d)));
#endif
        for (; d < D; d++) y[d] = to_bf16(x[d]);
    }
    else
        for (int64_t d = 0; d < D; d++) ((uint16_t *)data)[at + d] = to_f16(x[d]);
}

// Each row of x [n][64] times its own factor.
static void scale_rows(float *x, int n, int columns, const float *by) {
    for (int j = 0; j < n; j++)
        for (int v = 0; v < columns; v += LANES) store(x + j * 64 + v, load(x + j * 64 + v) * by[j]);
}

}  // namespace MC_ISA
