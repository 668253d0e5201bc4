// The two products of prefill over bfloat16 pairs, in AMX tiles. A tile of keys is read where it lies: a row
// of keys is a row of pairs of channels. Values are pairs of keys instead, so they are transposed first.
#pragma once
#include "amx.h"
#include "product.h"

namespace MC_ISA {

constexpr int EDGE_ROWS = 2 * TILE_ROWS, MOST_PAIRS = 128;  // 256 channels

// C[rows][64] (+)= A[rows][pairs] * B[pairs][64] over pairs of bfloat16; `pairs` is a multiple of 16. C has
// room for `rows` rounded up to 32. Columns are computed 32 at a time.
static void tile_product(const uint32_t *a, int64_t a_row, const uint32_t *b, int64_t rows, int64_t pairs,
                         float *c, int columns, bool add) {
    alignas(64) uint32_t edge[EDGE_ROWS][MOST_PAIRS];
    constexpr size_t wide = QUERIES * sizeof(float);
    for (int64_t r = 0; r < rows; r += EDGE_ROWS) {
        const uint32_t *from = a + r * a_row;
        int64_t step = a_row;
        if (rows - r < EDGE_ROWS) {
            // what lies behind the last row is not ours to read
            for (int64_t i = 0; i < EDGE_ROWS; i++)
                for (int64_t k = 0; k < pairs; k++) edge[i][k] = i < rows - r ? from[i * a_row + k] : 0;
            from = edge[0], step = MOST_PAIRS;
        }
        stores_done();
        for (int column = 0; column < columns; column += 2 * TILE_PAIRS) {
            float *to = c + r * QUERIES + column, *below = to + TILE_ROWS * QUERIES;
            if (add) {
                TILE_LOAD(0, to, wide);
                TILE_LOAD(1, to + TILE_PAIRS, wide);
                TILE_LOAD(2, below, wide);
                TILE_LOAD(3, below + TILE_PAIRS, wide);
            } else {
                TILE_ZERO(0);
                TILE_ZERO(1);
                TILE_ZERO(2);
                TILE_ZERO(3);
            }
            for (int64_t k = 0; k < pairs; k += TILE_PAIRS) {
                TILE_LOAD(4, from + k, (size_t)step * 4);
                TILE_LOAD(5, from + TILE_ROWS * step + k, (size_t)step * 4);
                TILE_LOAD(6, b + k * QUERIES + column, wide);
                TILE_LOAD(7, b + k * QUERIES + column + TILE_PAIRS, wide);
                TILE_MULTIPLY(0, 4, 6);
                TILE_MULTIPLY(1, 4, 7);
                TILE_MULTIPLY(2, 5, 6);
                TILE_MULTIPLY(3, 5, 7);
            }
            TILE_STORE(0, to, wide);
            TILE_STORE(1, to + TILE_PAIRS, wide);
            TILE_STORE(2, below, wide);
            TILE_STORE(3, below + TILE_PAIRS, wide);
        }
    }
}

static inline int64_t tile_pairs(int n) { return (n + 2 * TILE_PAIRS - 1) / (2 * TILE_PAIRS) * TILE_PAIRS; }

// value rows [n][D] of floats or bfloat16 -> [D][tile_pairs(n)] of pairs (row 2i, row 2i+1); missing rows are zero.
// D is a multiple of 32.
template <class X> static void transpose_values(const X *rows, int64_t stride, int n, int64_t D, uint32_t *y) {
    int64_t pairs = tile_pairs(n);
    for (int64_t i = 0; i < pairs; i += LANES)
        for (int64_t d = 0; d < D; d += LANES) {
            Vf block[LANES];
            for (int j = 0; j < LANES; j++) {
                int64_t low = 2 * (i + j), high = low + 1;
                uint32_t row[LANES];
                for (int x = 0; x < LANES; x++)
                    row[x] = (low < n ? to_bf16(rows[low * stride + d + x]) : 0) |
                             (high < n ? (uint32_t)to_bf16(rows[high * stride + d + x]) << 16 : 0);
                block[j] = load((const float *)row);
            }
            transpose(block);
            for (int j = 0; j < LANES; j++) store((float *)(y + (d + j) * pairs + i), block[j]);
        }
}

}  // namespace MC_ISA
