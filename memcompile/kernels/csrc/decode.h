// Decode: one or a few queries over a long cache, bound by memory. A vector lane is a channel; every key
// and value row is read once for all queries of its group. The keys of a key/value head are cut into parts
// (Flash-Decoding, Dao et al. 2023) and the parts are merged by their log-sum-exp.
#pragma once
#include "attention.h"
#include "prefill.h"
#include "rows.h"
#include "scratch.h"
#include "vector.h"
#include "visibility.h"

namespace MC_ISA {

constexpr int MAX_ROWS = 16;     // queries of one group that decode takes together
constexpr int PART_KEYS = 1024;  // scores kept at a time: long, so that memory is read in long streams
constexpr int NEAR_KEYS = 32;    // value rows read at a time
constexpr int AHEAD_ROWS = 48;   // how far ahead rows are fetched

struct Decode {
    const McAttention *c;
    const Interval *keys;
    const int32_t *query_at;
    int64_t keys_stride, parts;
    int32_t rows;               // H/G * T
    float *partial;             // [B,G,parts][rows][D + 2]: output, maximum (log2), sum
    mutable bool no_memory;     // some task found none
};

// How decode reads a cache: as one of its types, or a bfloat16 one in words of two channels, which are
// multiplied with pairs of queries' channels; values in words of two keys, with pairs of probabilities.
constexpr int PAIRS = -1;
#if defined(__AVX512BF16__)
static inline bool in_pairs(const McAttention &c) {
    return c.kv_type == MC_BF16 && (c.q_type == MC_BF16 || c.products == MC_BF16) && c.D % (2 * LANES) == 0;
}
static inline Vf add_pairs(Vf c, Vf a, Vf b) {
    return (Vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
}
// n floats, n a multiple of LANES, become n bfloat16 in the same place.
static inline void narrow_in_place(float *x, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES)
        _mm256_storeu_si256((__m256i *)((uint16_t *)x + i), (__m256i)_mm512_cvtneps_pbh((__m512)load(x + i)));
}
#else
static inline bool in_pairs(const McAttention &) { return false; }
#endif

// The cache's channels as decode reads them: MC_I4 rows give even channels, then odd ones, of 2*LANES.
static inline int64_t channel_of(int32_t type, int64_t i) {
    if (type != MC_I4) return i;
    int64_t block = i / (2 * LANES) * (2 * LANES), in = i % (2 * LANES);
    return block + (in < LANES ? 2 * in : 2 * (in - LANES) + 1);
}

// The channel that element i of the sum over values is: words of two keys are zipped within 128 bits.
static inline int64_t value_channel_of(const McAttention &c, int64_t i) {
    if (!in_pairs(c)) return channel_of(c.kv_type, i);
    int64_t in = i % (2 * LANES), lane = in % LANES;
    return i - in + lane / 4 * 8 + in / LANES * 4 + lane % 4;
}

// N vectors of one row, from vector `first` on.
template <int TYPE, int N> static inline void read_row(const void *data, int64_t at, int first, Vf (&y)[N]) {
    if constexpr (TYPE == MC_I4) {
        const uint8_t *p = (const uint8_t *)data + at + first * LANES / 2;
        for (int i = 0; i < N; i += 2) {
            Vi bytes = widen_bytes(p + i * LANES / 2);
            y[i] = low_codes(bytes);
            if (i + 1 < N) y[i + 1] = high_codes(bytes);
        }
    } else {
        for (int i = 0; i < N; i++) {
            int64_t from = at + (first + i) * LANES;
            if constexpr (TYPE == MC_F32) y[i] = load((const float *)data + from);
            if constexpr (TYPE == PAIRS) y[i] = load((const float *)((const uint16_t *)data + at) + (first + i) * LANES);
            if constexpr (TYPE == MC_BF16) y[i] = widen_bf16((const uint16_t *)data + from);
            if constexpr (TYPE == MC_F16) y[i] = widen_f16((const uint16_t *)data + from);
            if constexpr (TYPE == MC_I8) y[i] = widen_i8((const int8_t *)data + from);
        }
    }
}

// A row that comes later is fetched while one is multiplied: hardware does so as far as a page goes, and not for
// chosen slots. Codes, read slowly, come into the first cache; floats into the second, for lines on their way to
// the first hold up loads.
template <int TYPE, int N> static inline void prefetch(const void *data, int64_t at, int first) {
    constexpr bool CODES = TYPE == MC_I8 || TYPE == MC_I4;
    // bytes of a stored row's element, and of a vector
    constexpr int SIZE = TYPE == MC_F32 ? 4 : CODES ? 1 : 2;
    constexpr int VECTOR = TYPE == MC_I4 ? LANES / 2 : TYPE == PAIRS ? LANES * 4 : LANES * SIZE;
    const char *p = (const char *)data + at * SIZE + first * VECTOR;
    for (int i = 0; i < N * VECTOR; i += 64) __builtin_prefetch(p + i, 0, CODES ? 3 : 2);
}

// c + a * b, for words as `TYPE` has them.
template <int TYPE> static inline Vf add_product(Vf c, Vf a, Vf b) {
#if defined(__AVX512BF16__)
    if constexpr (TYPE == PAIRS) return add_pairs(c, a, b);
#endif
    return c + a * b;
}

// Scores of LANES keys for R queries, over N of the D/LANES vectors; `add` goes on with earlier ones.
// D counts words, and `at` goes on for AHEAD_ROWS, here and wherever rows of keys are read.
template <int TYPE, int R, int N>
static inline void score(const void *k, const int64_t *at, int first, const float *q, int64_t D, float *s,
                         int64_t s_row, bool add) {
    Vf q_at[R][N];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) q_at[r][i] = load(q + r * D + (first + i) * LANES);
    Vf acc[R][LANES];
    for (int j = 0; j < LANES; j++) {
        Vf row[N];
        prefetch<TYPE, N>(k, at[j + AHEAD_ROWS], first);
        read_row<TYPE, N>(k, at[j], first, row);
        for (int r = 0; r < R; r++) {
            Vf x = {};
            for (int i = 0; i < N; i++) x = add_product<TYPE>(x, q_at[r][i], row[i]);
            acc[r][j] = x;
        }
    }
    for (int r = 0; r < R; r++) {
        Vf x = sums(acc[r]);
        store(s + r * s_row, add ? load(s + r * s_row) + x : x);
    }
}

// o [R][D] += sum over n keys of p [R][..] * value row, N vectors of the row at a time.
template <int TYPE, int R, int N>
static inline void gather(const void *v, const int64_t *at, int n, int first, const float *p, int64_t p_row,
                          float *o, int64_t D) {
    Vf acc[R][N];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) acc[r][i] = load(o + r * D + (first + i) * LANES);
    for (int j = 0; j < n; j++) {
        Vf row[N];
        prefetch<TYPE, N>(v, at[j + AHEAD_ROWS], first);
        read_row<TYPE, N>(v, at[j], first, row);
        for (int r = 0; r < R; r++)
            for (int i = 0; i < N; i++) acc[r][i] += p[r * p_row + j] * row[i];
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) store(o + r * D + (first + i) * LANES, acc[r][i]);
}

#if defined(__AVX512BF16__)
// The same with two keys at a time; N vectors of words are 2N of channels. Row n is read where n is odd: p is 0.
template <int R, int N>
static inline void gather_pairs(const void *v, const int64_t *at, int n, int first, const float *p, int64_t p_row,
                                float *o, int64_t D) {
    Vf acc[R][2 * N];
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 2 * N; i++) acc[r][i] = load(o + r * D + (2 * first + i) * LANES);
    for (int j = 0; j < n; j += 2) {
        Vf even[N], odd[N];
        prefetch<PAIRS, N>(v, at[j + AHEAD_ROWS], first);
        prefetch<PAIRS, N>(v, at[j + 1 + AHEAD_ROWS], first);
        read_row<PAIRS, N>(v, at[j], first, even);
        read_row<PAIRS, N>(v, at[j + 1], first, odd);
        for (int i = 0; i < N; i++) {
            Vf low = (Vf)_mm512_unpacklo_epi16((__m512i)even[i], (__m512i)odd[i]);
            Vf high = (Vf)_mm512_unpackhi_epi16((__m512i)even[i], (__m512i)odd[i]);
            for (int r = 0; r < R; r++) {
                Vf by = all(p[r * p_row + j / 2]);
                acc[r][2 * i] = add_pairs(acc[r][2 * i], by, low);
                acc[r][2 * i + 1] = add_pairs(acc[r][2 * i + 1], by, high);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int i = 0; i < 2 * N; i++) store(o + r * D + (2 * first + i) * LANES, acc[r][i]);
}
#endif

// Vectors of a row that are taken together. Whole rows, so that memory is read in one stream: where they are
// wide, two queries at a time fill the registers, else four.
constexpr int WIDE = REGISTERS == 32 ? 8 : 4, NARROW = WIDE / 2;

template <int TYPE, int R, int MOST>
static void score_all(const void *k, const int64_t *at, const float *q, int64_t D, float *s) {
    int vectors = (int)(D / LANES), i = 0;
    for (; i + MOST <= vectors; i += MOST) score<TYPE, R, MOST>(k, at, i, q, D, s, PART_KEYS, i > 0);
    for (; i + 2 <= vectors; i += 2) score<TYPE, R, 2>(k, at, i, q, D, s, PART_KEYS, i > 0);
    if constexpr (TYPE != MC_I4)
        for (; i < vectors; i++) score<TYPE, R, 1>(k, at, i, q, D, s, PART_KEYS, i > 0);
}

template <int TYPE, int R, int MOST>
static void gather_all(const void *v, const int64_t *at, int n, const float *p, float *o, int64_t D) {
    int vectors = (int)(D / LANES), i = 0;
#if defined(__AVX512BF16__)
    if constexpr (TYPE == PAIRS) {
        vectors /= 2;
        for (; i + MOST / 2 <= vectors; i += MOST / 2)
            gather_pairs<R, MOST / 2>(v, at, n, i, p, PART_KEYS, o, D);
        for (; i < vectors; i++) gather_pairs<R, 1>(v, at, n, i, p, PART_KEYS, o, D);
        return;
    }
#endif
    for (; i + MOST <= vectors; i += MOST) gather<TYPE, R, MOST>(v, at, n, i, p, PART_KEYS, o, D);
    for (; i + 2 <= vectors; i += 2) gather<TYPE, R, 2>(v, at, n, i, p, PART_KEYS, o, D);
    if constexpr (TYPE != MC_I4)
        for (; i < vectors; i++) gather<TYPE, R, 1>(v, at, n, i, p, PART_KEYS, o, D);
}

template <int TYPE>
static void score_rows(int rows, const void *k, const int64_t *at, const float *q, int64_t D, float *s) {
    int r = 0;
    if (D / LANES >= WIDE) {
        for (; r + 2 <= rows; r += 2) score_all<TYPE, 2, WIDE>(k, at, q + r * D, D, s + r * PART_KEYS);
    } else {
        for (; r + 4 <= rows; r += 4) score_all<TYPE, 4, NARROW>(k, at, q + r * D, D, s + r * PART_KEYS);
        for (; r + 3 <= rows; r += 3) score_all<TYPE, 3, NARROW>(k, at, q + r * D, D, s + r * PART_KEYS);
        for (; r + 2 <= rows; r += 2) score_all<TYPE, 2, NARROW>(k, at, q + r * D, D, s + r * PART_KEYS);
    }
    for (; r < rows; r++) score_all<TYPE, 1, WIDE>(k, at, q + r * D, D, s + r * PART_KEYS);
}

template <int TYPE>
static void gather_rows(int rows, const void *v, const int64_t *at, int n, const float *p, float *o,
                        int64_t D) {
    int r = 0;
    if (D / LANES >= WIDE) {
        for (; r + 2 <= rows; r += 2) gather_all<TYPE, 2, WIDE>(v, at, n, p + r * PART_KEYS, o + r * D, D);
    } else {
        for (; r + 4 <= rows; r += 4) gather_all<TYPE, 4, NARROW>(v, at, n, p + r * PART_KEYS, o + r * D, D);
        for (; r + 3 <= rows; r += 3) gather_all<TYPE, 3, NARROW>(v, at, n, p + r * PART_KEYS, o + r * D, D);
        for (; r + 2 <= rows; r += 2) gather_all<TYPE, 2, NARROW>(v, at, n, p + r * PART_KEYS, o + r * D, D);
    }
    for (; r < rows; r++) gather_all<TYPE, 1, WIDE>(v, at, n, p + r * PART_KEYS, o + r * D, D);
}

template <int TYPE>
static void decode_part(const Decode &d, int64_t b, int64_t g, int64_t part, const float *q, float *partial) {
    const McAttention &c = *d.c;
    int64_t D = c.D, words = TYPE == PAIRS ? D / 2 : D, used = c.used ? c.used[b] : c.S;
    int64_t candidates = c.slots ? c.slot_count : used;
    int64_t from = candidates * part / d.parts, to = candidates * (part + 1) / d.parts;
    if (!c.slots) {  // parts begin at whole chunks
        from = part * ((used + d.parts - 1) / d.parts);
        to = from + (used + d.parts - 1) / d.parts;
        to = to > used ? used : to;
    }
    const int32_t *slots = c.slots ? c.slots + (b * c.G + g) * c.slot_count : nullptr;
    const Interval *keys = d.keys ? d.keys + b * d.keys_stride : nullptr;
    int rows = d.rows;
    float *s = scratch.take<float>(MAX_ROWS * PART_KEYS), *o = partial;
    float *m = partial + rows * D, *l = m + rows;
    int64_t *at = scratch.take<int64_t>(PART_KEYS + LANES + AHEAD_ROWS);
    int32_t *slot = scratch.take<int32_t>(PART_KEYS + LANES + AHEAD_ROWS);
    for (int64_t i = 0; i < rows * D; i++) o[i] = 0;
    for (int r = 0; r < rows; r++) m[r] = NOTHING, l[r] = 0;
    float to_log2 = c.softcap > 0 ? LOG2E : c.scale * LOG2E;
    int64_t k_at = b * c.k.batch + g * c.k.head, v_at = b * c.v.batch + g * c.v.head;
    const float *k_token = c.k_token_scale ? c.k_token_scale + (b * c.G + g) * c.S : nullptr;
    const float *v_token = c.v_token_scale ? c.v_token_scale + (b * c.G + g) * c.S : nullptr;

    for (int64_t next = from; next < to;) {
        int n = 0;
        for (; n < PART_KEYS && next < to; next++) {
            int64_t i = slots ? slots[next] : next;
            // an empty slot may hold anything, NaN included: it is not read
            if (i < 0 || i >= used || (keys && keys[i].low > keys[i].high)) continue;
            slot[n++] = (int32_t)i;
        }
        if (!n) continue;
        int padded = (n + LANES - 1) / LANES * LANES;
        for (int j = n; j < padded; j++) slot[j] = slot[n - 1];
        // what is fetched at the end of a chunk: the beginning of the next one, where slots are not chosen
        for (int j = padded; j < padded + AHEAD_ROWS; j++) slot[j] = slot[n - 1] + (slots ? 0 : j - n + 1);
        for (int j = 0; j < padded + AHEAD_ROWS; j++) at[j] = k_at + (int64_t)slot[j] * c.k.token;
        for (int j = 0; j < padded; j += LANES)
            score_rows<TYPE>(rows, c.k.data, at + j, q, words, s + j);
        for (int r = 0; r < rows; r++) {
            float *x = s + r * PART_KEYS;
            if (k_token)
                for (int j = 0; j < n; j++) x[j] *= k_token[slot[j]];
            if (c.softcap > 0)
                for (int j = 0; j < padded; j += LANES)
                    store(x + j, tanhv(load(x + j) * (c.scale / c.softcap)) * c.softcap);
            int32_t q_at = d.query_at[b * c.T + r % c.T];
            if (keys)
                for (int j = 0; j < n; j++)
                    if (q_at < keys[slot[j]].low || q_at > keys[slot[j]].high) x[j] = -__builtin_inff();
            for (int j = n; j < padded; j++) x[j] = -__builtin_inff();
            Vf top = load(x);
            for (int j = LANES; j < padded; j += LANES) top = larger(top, load(x + j));
            float now = max_of(top) * to_log2;
            now = now > m[r] ? now : m[r];
            Vf sum = {};
            for (int j = 0; j < padded; j += LANES) {
                Vf y = exp2v(load(x + j) * to_log2 - now);
                store(x + j, y);
                sum += y;
            }
            float less = exp2v(all(m[r] - now))[0];
            l[r] = l[r] * less + sum_of(sum);
            m[r] = now;
            if (less != 1.0f)
                for (int64_t i = 0; i < D; i += LANES) store(o + r * D + i, load(o + r * D + i) * less);
            if (v_token)
                for (int j = 0; j < n; j++) x[j] *= v_token[slot[j]];
#if defined(__AVX512BF16__)
            if constexpr (TYPE == PAIRS) narrow_in_place(x, padded);
#endif
        }
        for (int j = 0; j < padded + AHEAD_ROWS; j++) at[j] = v_at + (int64_t)slot[j] * c.v.token;
        // few enough at a time that the rows' other channels are still in the first cache
        for (int j = 0; j < n; j += NEAR_KEYS)
            gather_rows<TYPE>(rows, c.v.data, at + j, n - j < NEAR_KEYS ? n - j : NEAR_KEYS,
                              s + (TYPE == PAIRS ? j / 2 : j), o, D);
    }
}

static void decode_task(void *data, size_t index) {
    const Decode &d = *(const Decode *)data;
    const McAttention &c = *d.c;
    int64_t part = (int64_t)index % d.parts, g = (int64_t)index / d.parts % c.G;
    int64_t b = (int64_t)index / d.parts / c.G, group = c.H / c.G, D = c.D;
    size_t bytes = 4 * ((size_t)d.rows * (size_t)D + MAX_ROWS * PART_KEYS + 4 * (PART_KEYS + LANES + AHEAD_ROWS)) + 4096;
    if (!scratch.reserve(bytes + 4 * (size_t)D)) {
        __atomic_store_n(&d.no_memory, true, __ATOMIC_RELAXED);
        return;
    }
    float *q = scratch.take<float>((size_t)d.rows * (size_t)D), *row = scratch.take<float>((size_t)D);
    for (int r = 0; r < d.rows; r++) {
        int64_t h = g * group + r / c.T, t = r % c.T;
        widen_row(c.q_type, c.q.data, b * c.q.batch + h * c.q.head + t * c.q.token, D, row);
        for (int64_t i = 0; i < D; i++) {
            int64_t channel = channel_of(c.kv_type, i);
            q[r * D + i] = row[channel] * (c.k_scale ? c.k_scale[g * D + channel] : 1.0f);
        }
    }
#if defined(__AVX512BF16__)
    if (in_pairs(c)) narrow_in_place(q, d.rows * D);
#endif
    float *partial = d.partial + index * (size_t)d.rows * (size_t)(D + 2);
    switch (c.kv_type) {
    case MC_F32: return decode_part<MC_F32>(d, b, g, part, q, partial);
    case MC_BF16:
#if defined(__AVX512BF16__)
        if (in_pairs(c)) return decode_part<PAIRS>(d, b, g, part, q, partial);
#endif
        return decode_part<MC_BF16>(d, b, g, part, q, partial);
    case MC_F16: return decode_part<MC_F16>(d, b, g, part, q, partial);
    case MC_I8: return decode_part<MC_I8>(d, b, g, part, q, partial);
    default: return decode_part<MC_I4>(d, b, g, part, q, partial);
    }
}

// Merge the parts of every query by log-sum-exp.
static void merge_parts(const Decode &d) {
    const McAttention &c = *d.c;
    int64_t D = c.D, group = c.H / c.G;
    size_t size = (size_t)d.rows * (size_t)(D + 2);
    float out[256], plain[256];
    for (int64_t bg = 0; bg < c.B * c.G; bg++)
        for (int r = 0; r < d.rows; r++) {
            const float *first = d.partial + (size_t)(bg * d.parts) * size;
            float m = NOTHING, l = 0;
            for (int64_t p = 0; p < d.parts; p++) {
                float x = first[p * (int64_t)size + d.rows * D + r];
                m = x > m ? x : m;
            }
            for (int64_t i = 0; i < D; i++) out[i] = 0;
            for (int64_t p = 0; p < d.parts; p++) {
                const float *part = first + p * (int64_t)size;
                float by = exp2v(all(part[d.rows * D + r] - m))[0];
                l += by * part[d.rows * D + d.rows + r];
                for (int64_t i = 0; i < D; i++) out[i] += by * part[r * D + i];
            }
            int64_t b = bg / c.G, g = bg % c.G, h = g * group + r / c.T, t = r % c.T;
            float by = l > 0 ? 1.0f / l : 0.0f;
            for (int64_t i = 0; i < D; i++) {
                int64_t channel = value_channel_of(c, i);
                plain[channel] = out[i] * by * (c.v_scale ? c.v_scale[g * D + channel] : 1.0f);
            }
            narrow_row(c.q_type, plain, D, c.out.data, b * c.out.batch + h * c.out.head + t * c.out.token);
            if (c.lse)
                c.lse[(b * c.H + h) * c.T + t] = l > 0 ? m * LN2 + __builtin_logf(l) : -__builtin_inff();
        }
}

}  // namespace MC_ISA
