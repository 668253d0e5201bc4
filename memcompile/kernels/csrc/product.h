// The one matrix product behind prefill: C[rows][64] (+)= A[rows][steps] * B[steps][64].
// The 64 columns are queries, so A is read where it lies (keys, values) one scalar at a time and nothing
// is packed but the queries.
#pragma once
#include "vector.h"
// instruction sets that multiply pairs of bfloat16
#if defined(MC_AMX) || defined(__AVX512BF16__)
#define MC_PAIRS
#endif

namespace MC_ISA {

constexpr int QUERIES = 64;  // columns of B and C
// columns a register tile has, in vectors, and the rows that then fit
constexpr int TILE_VECTORS = REGISTERS == 32 ? 4 : 2;

// A is read by scalars of X: float, or a pair of bfloat16 that one instruction multiplies and adds.
template <class X> struct Multiply;

template <> struct Multiply<float> {
    static inline void add(Vf &c, float a, Vf b) { c += a * b; }
};

#if defined(__AVX512BF16__)
template <> struct Multiply<uint32_t> {
    static inline void add(Vf &c, uint32_t a, Vf b) {
        c = (Vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)(__m512)b);
    }
};
#endif

#if defined(MC_PAIRS)
// x [2n][64] float -> y [n][64] of pairs (x[2i], x[2i+1]) in bfloat16
static void pair_rows(const float *x, int64_t rows, uint32_t *y) {
    for (int64_t i = 0; i < rows / 2; i++)
        for (int v = 0; v < QUERIES; v += LANES)
            store_int((int32_t *)y + i * QUERIES + v,
                      pair_of(load(x + 2 * i * QUERIES + v), load(x + (2 * i + 1) * QUERIES + v)));
}
#endif

template <class X, int R, int V>
static inline void tile(const X *a, int64_t a_row, int64_t a_step, const X *b, int64_t steps, float *c,
                        bool add) {
    Vf acc[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) acc[r][v] = add ? load(c + r * QUERIES + v * LANES) : (Vf){};
    for (int64_t i = 0; i < steps; i++) {
        Vf bs[V];
        for (int v = 0; v < V; v++) bs[v] = load((const float *)b + i * QUERIES + v * LANES);
        const X *ai = a + i * a_step;
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) Multiply<X>::add(acc[r][v], ai[r * a_row], bs[v]);
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(c + r * QUERIES + v * LANES, acc[r][v]);
}

template <class X, int V>
static void product_columns(const X *a, int64_t a_row, int64_t a_step, const X *b, int64_t rows,
                            int64_t steps, float *c, bool add) {
    constexpr int R = V == 1 ? 12 : V == 2 ? (REGISTERS == 32 ? 12 : 6) : 6;
    int64_t r = 0;
    for (; r + R <= rows; r += R)
        tile<X, R, V>(a + r * a_row, a_row, a_step, b, steps, c + r * QUERIES, add);
    for (; r + 4 <= rows; r += 4)
        tile<X, 4, V>(a + r * a_row, a_row, a_step, b, steps, c + r * QUERIES, add);
    for (; r < rows; r++)
        tile<X, 1, V>(a + r * a_row, a_row, a_step, b, steps, c + r * QUERIES, add);
}

// `columns` of the 64 are computed, rounded up to whole vectors.
template <class X>
static void product(const X *a, int64_t a_row, int64_t a_step, const X *b, int64_t rows, int64_t steps,
                    float *c, int columns, bool add) {
    int vectors = (columns + LANES - 1) / LANES, v = 0;
    for (; v + TILE_VECTORS <= vectors; v += TILE_VECTORS)
        product_columns<X, TILE_VECTORS>(a, a_row, a_step, b + v * LANES, rows, steps, c + v * LANES, add);
    for (; v + 2 <= vectors; v += 2)
        product_columns<X, 2>(a, a_row, a_step, b + v * LANES, rows, steps, c + v * LANES, add);
    for (; v < vectors; v++)
        product_columns<X, 1>(a, a_row, a_step, b + v * LANES, rows, steps, c + v * LANES, add);
}

}  // namespace MC_ISA
