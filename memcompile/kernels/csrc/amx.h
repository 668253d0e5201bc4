// The tile registers of AMX as far as prefill uses them: eight tiles of 16 rows of 64 bytes. Two bodies: the
// instructions, or (MC_AMX_MODEL) a model of them in plain C++ that gives the same bits on any machine.
#pragma once
#include <cstddef>
#include <cstdint>
#if !defined(MC_AMX_MODEL)
#include <immintrin.h>
#endif

namespace MC_ISA {

constexpr int TILE_ROWS = 16, TILE_PAIRS = 16;  // a row: 16 floats, or 16 pairs of bfloat16

// What `ldtilecfg` reads (palette 1).
struct alignas(64) TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static const TileShapes FULL_TILES = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

#if defined(MC_AMX_MODEL)

struct Tiles {
    uint32_t data[8][TILE_ROWS][TILE_PAIRS];
    bool configured;

    void load(int t, const void *from, size_t stride) {
        for (int r = 0; r < TILE_ROWS; r++) __builtin_memcpy(data[t][r], (const char *)from + r * stride, 64);
    }
    void store(int t, void *to, size_t stride) {
        for (int r = 0; r < TILE_ROWS; r++) __builtin_memcpy((char *)to + r * stride, data[t][r], 64);
    }
    void zero(int t) { __builtin_memset(data[t], 0, sizeof data[t]); }

    static float number(uint32_t bits) {
        // denormals count as zero
        float x;
        if (!(bits & 0x7f800000)) bits &= 0x80000000;
        __builtin_memcpy(&x, &bits, 4);
        return x;
    }
    static float flushed(float x) {
        uint32_t bits;
        __builtin_memcpy(&bits, &x, 4);
        return number(bits);
    }
    // tdpbf16ps (Intel SDM): two sums of fused products, even and odd, in the order of k; both are added,
    // then added to c. Every step rounds to nearest even and flushes denormals.
    void multiply(int c, int a, int b) {
        for (int m = 0; m < TILE_ROWS; m++) {
            float even[TILE_PAIRS] = {}, odd[TILE_PAIRS] = {};
            for (int k = 0; k < TILE_PAIRS; k++) {
                float low = number(data[a][m][k] << 16), high = number(data[a][m][k] & 0xffff0000);
                for (int n = 0; n < TILE_PAIRS; n++) {
                    uint32_t pair = data[b][k][n];
                    even[n] = flushed(__builtin_fmaf(low, number(pair << 16), even[n]));
                    odd[n] = flushed(__builtin_fmaf(high, number(pair & 0xffff0000), odd[n]));
                }
            }
            for (int n = 0; n < TILE_PAIRS; n++) {
                float sum = flushed(number(data[c][m][n]) + flushed(even[n] + odd[n]));
                __builtin_memcpy(&data[c][m][n], &sum, 4);
            }
        }
    }
};
static thread_local Tiles tiles_of_thread;

// Using a tile that is not configured is a fault, as it is on the machine.
static Tiles &tiles() {
    if (!tiles_of_thread.configured) __builtin_trap();
    return tiles_of_thread;
}
static inline void stores_done() {}
static inline void tiles_begin() { tiles_of_thread.configured = true; }
static inline void tiles_end() { tiles_of_thread.configured = false; }
#define TILE_LOAD(t, from, stride) tiles().load(t, from, stride)
#define TILE_STORE(t, to, stride) tiles().store(t, to, stride)
#define TILE_ZERO(t) tiles().zero(t)
#define TILE_MULTIPLY(c, a, b) tiles().multiply(c, a, b)

#else

// The compiler does not know that tiles are loaded from memory: what was stored before has to be there by then.
static inline void stores_done() { __asm__ volatile("" ::: "memory"); }
static inline void tiles_begin() {
    stores_done();
    _tile_loadconfig(&FULL_TILES);
}
static inline void tiles_end() { _tile_release(); }
// tile numbers are part of the instruction: they have to be literals
#define TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)

#endif

}  // namespace MC_ISA
