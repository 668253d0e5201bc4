// Vectors of the instruction set this file is compiled for, without a line of intrinsics where the
// compiler does as well. Everything is static: two instruction sets never share a symbol.
#pragma once
#include <immintrin.h>
#include <cstdint>

namespace MC_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#else
constexpr int LANES = 8, REGISTERS = 16;
#endif

typedef float Vf __attribute__((vector_size(LANES * 4)));
typedef int32_t Vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t Vu __attribute__((vector_size(LANES * 4)));
typedef float VfLoose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ViLoose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ViBytes __attribute__((vector_size(LANES * 4), aligned(1), may_alias));

static inline Vf load(const float *p) { return *(const VfLoose *)p; }
static inline void store(float *p, Vf x) { *(VfLoose *)p = x; }
static inline Vi load_int(const int32_t *p) { return *(const ViLoose *)p; }
static inline void store_int(int32_t *p, Vi x) { *(ViLoose *)p = x; }
static inline Vf all(float x) { return x - (Vf){}; }
static inline Vi all_int(int32_t x) { return x - (Vi){}; }
static inline Vf larger(Vf a, Vf b) { return a > b ? a : b; }

static inline float sum_of(Vf x) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}
static inline float max_of(Vf x) {
    float m = x[0];
    for (int i = 1; i < LANES; i++) m = x[i] > m ? x[i] : m;
    return m;
}

// x less the nearest whole number, at most a half either side of zero
static inline Vf fraction_of(Vf x) {
#if defined(__AVX512DQ__)
    return (Vf)_mm512_reduce_ps((__m512)x, 0);
#else
    const Vf magic = all(12582912.0f);
    return x - ((x + magic) - magic);
#endif
}
// y * 2**(x - f) where x - f is whole
static inline Vf times_power(Vf y, Vf x, Vf f) {
#if defined(__AVX512F__)
    return (Vf)_mm512_scalef_ps((__m512)y, (__m512)(x - f));
#else
    // the low bits of the sum are the whole number
    Vu power = (Vu)(x - f + all(12582912.0f)) << 23;
    return x < -125.0f ? (Vf){} : (Vf)((Vu)y + power);
#endif
}

// 2**x to 2e-7 for x up to 126; -inf gives 0.
static inline Vf exp2v(Vf x) {
    Vf f = fraction_of(x), p = all(1.5403530e-4f);
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return times_power(p, x, f);
}
// The same to 8e-5, for what is rounded to bfloat16.
static inline Vf exp2_rough(Vf x) {
    Vf f = fraction_of(x), p = all(5.5171664e-2f);
    p = p * f + 2.4261114e-1f;
    p = p * f + 6.9326099e-1f;
    p = p * f + 9.9992807e-1f;
    return times_power(p, x, f);
}

// tanh through exp; |error| < 1e-6
static inline Vf tanhv(Vf x) {
    Vf a = (Vf)((Vi)x & 0x7fffffff);
    a = a > 20.0f ? all(20.0f) : a;
    Vf e = exp2v(a * -2.885390082f);
    Vf y = (1.0f - e) / (1.0f + e);
    return (Vf)((Vi)y | ((Vi)x & (int32_t)0x80000000));
}

static inline float from_bf16(uint16_t h) {
    union { uint32_t u; float f; } x = {(uint32_t)h << 16};
    return x.f;
}
static inline uint16_t to_bf16(float f) {
    union { float f; uint32_t u; } x = {f};
    if ((x.u & 0x7fffffff) > 0x7f800000) return (uint16_t)((x.u >> 16) | 0x40);
    return (uint16_t)((x.u + 0x7fff + ((x.u >> 16) & 1)) >> 16);
}
static inline uint16_t to_bf16(uint16_t stored) { return stored; }
static inline uint16_t to_f16(float f) { return (uint16_t)_cvtss_sh(f, 0); }
static inline float from_f16(uint16_t h) { return _cvtsh_ss(h); }

#if defined(__AVX512BF16__)
// Lane i of the result is the pair (low[i], high[i]) in bfloat16.
static inline Vi pair_of(Vf low, Vf high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Vi)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
#elif defined(MC_AMX)
static inline Vi pair_of(Vf low, Vf high) {
    Vi y;
    for (int i = 0; i < LANES; i++) y[i] = (int32_t)(to_bf16(low[i]) | (uint32_t)to_bf16(high[i]) << 16);
    return y;
}
#endif

// LANES values of a cache row, as float. MC_I4 comes as the even channels of 2*LANES, then the odd ones.
static inline Vf widen_bf16(const uint16_t *p) {
#if defined(__AVX512F__)
    return (Vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
    return (Vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#endif
}
static inline Vf widen_f16(const uint16_t *p) {
#if defined(__AVX512F__)
    return (Vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
    return (Vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#endif
}
static inline Vf widen_i8(const int8_t *p) {
#if defined(__AVX512F__)
    return (Vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#else
    return (Vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#endif
}
static inline Vi widen_bytes(const uint8_t *p) {
#if defined(__AVX512F__)
    return (Vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#else
    return (Vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#endif
}
// The first n of LANES values, the others zero; nothing behind them is read.
static inline Vf load_some(const float *p, int64_t n) {
    if (n >= LANES) return load(p);
#if defined(__AVX512F__)
    return (Vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    Vi lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return (Vf)_mm256_maskload_ps(p, (__m256i)(lane < all_int((int32_t)n)));
#endif
}
// The first n of 4*LANES bytes, the others zero.
static inline Vi load_bytes(const void *p, int64_t n) {
    if (n >= LANES * 4) return *(const ViBytes *)p;
#if defined(__AVX512BW__)
    return (Vi)_mm512_maskz_loadu_epi8(((__mmask64)1 << n) - 1, p);
#else
    Vi y = {};
    __builtin_memcpy(&y, p, (size_t)n);
    return y;
#endif
}
// to the nearest
static inline Vi to_ints(Vf x) {
#if defined(__AVX512F__)
    return (Vi)_mm512_cvtps_epi32((__m512)x);
#else
    return (Vi)_mm256_cvtps_epi32((__m256)x);
#endif
}
// LANES numbers as bytes, their low ones
static inline void store_bytes(int8_t *p, Vi x) {
    typedef int8_t Vb __attribute__((vector_size(LANES)));
    Vb y = __builtin_convertvector(x, Vb);
    __builtin_memcpy(p, &y, LANES);
}
static inline Vf to_floats(Vi x) { return __builtin_convertvector(x, Vf); }
// Lane i of the result is lane from[i] of x.
static inline Vf permute(Vf x, Vi from) {
#if defined(__AVX512F__)
    return (Vf)_mm512_permutexvar_ps((__m512i)from, (__m512)x);
#else
    return (Vf)_mm256_permutevar8x32_ps((__m256)x, (__m256i)from);
#endif
}
// Each lane gains the sum of four products of its bytes, unsigned times signed, exactly.
static inline Vi dot4(Vi sum, Vi bytes, Vi signed_bytes) {
#if defined(__AVX512VNNI__)
    return (Vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)signed_bytes);
#else
    // even and odd bytes as 16-bit numbers, each pair multiplied and added
    Vi even = bytes & 0x00ff00ff, odd = (bytes >> 8) & 0x00ff00ff;
#if defined(__AVX512BW__)
    __m512i x = (__m512i)signed_bytes, low = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8);
    sum += (Vi)_mm512_madd_epi16((__m512i)even, low);
    return sum + (Vi)_mm512_madd_epi16((__m512i)odd, _mm512_srai_epi16(x, 8));
#else
    __m256i x = (__m256i)signed_bytes, low = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
    sum += (Vi)_mm256_madd_epi16((__m256i)even, low);
    return sum + (Vi)_mm256_madd_epi16((__m256i)odd, _mm256_srai_epi16(x, 8));
#endif
#endif
}
static inline Vf low_codes(Vi bytes) { return __builtin_convertvector((bytes & 15) - 8, Vf); }
static inline Vf high_codes(Vi bytes) { return __builtin_convertvector((bytes >> 4) - 8, Vf); }

// LANES codes of 3 bits, from number k on: 16 take six bytes, four of their low two bits, two of the high ones.
static inline Vi widen_threes(const uint8_t *codes, int64_t k) {
    const uint8_t *p = codes + k / 16 * 6;
    int32_t low = 0, high = 0;
    __builtin_memcpy(&low, p + k % 16 / 4, LANES / 4);
    __builtin_memcpy(&high, p + 4 + k % 16 / 8, LANES / 8);
    Vi lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return (all_int(low) >> 2 * lane & 3) | (all_int(high) >> lane & 1) << 2;
}
// Entries of a table of 16 floats; only the low four bits of a code count.
struct Table {
    Vf part[16 / LANES];
};
static inline Table load_table(const float *p, int64_t n) {
    Table table;
    for (int64_t i = 0; i < 16 / LANES; i++) table.part[i] = load_some(p + i * LANES, n - i * LANES);
    return table;
}
static inline Vf entries(const Table &table, Vi codes) {
#if defined(__AVX512F__)
    return permute(table.part[0], codes);
#else
    return (codes & 8) != 0 ? permute(table.part[1], codes) : permute(table.part[0], codes);
#endif
}

// The two interleavings of a and b: a0 b0 a1 b1 ...
static inline void interleave(Vf a, Vf b, Vf &low, Vf &high) {
    Vi lo, hi;
    for (int i = 0; i < LANES; i++) {
        lo[i] = i / 2 + (i % 2) * LANES;
        hi[i] = LANES / 2 + i / 2 + (i % 2) * LANES;
    }
    low = __builtin_shuffle(a, b, lo);
    high = __builtin_shuffle(a, b, hi);
}

// Transpose LANES x LANES in registers: log2(LANES) rounds of perfect shuffles.
static inline void transpose(Vf (&x)[LANES]) {
    Vf y[LANES];
    for (int round = 1; round < LANES; round *= 2) {
        for (int i = 0; i < LANES / 2; i++) interleave(x[i], x[i + LANES / 2], y[2 * i], y[2 * i + 1]);
        for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
}

// Lane i of the result joins the lanes of x[i].
template <class F> static inline Vf joined(Vf (&x)[LANES], F join) {
    for (int n = LANES / 2; n >= 1; n /= 2)
        for (int i = 0; i < n; i++) {
            Vf low, high;
            interleave(x[i], x[i + n], low, high);
            x[i] = join(low, high);
        }
    return x[0];
}
static inline Vf sums(Vf (&x)[LANES]) {
    return joined(x, [](Vf a, Vf b) { return a + b; });
}

}  // namespace MC_ISA
