// Which pages of a long cache one query looks at (memcompile/dialect/pages.py gives the rule and its paper),
// and the bounds of each page that this is chosen by. A row of bounds is stored like two rows of keys: the
// largest values and the smallest. The bound of a query q is then one product, of (max(q, 0), min(q, 0)).
#pragma once
#include "attention.h"
#include "decode.h"
#include "select.h"
#include "tasks.h"

namespace MC_ISA {

constexpr int64_t SCORED_PAGES = 256;  // of one task

struct Paging {
    const McAttention *c;
    int64_t pages, parts;     // pages of the longest row; tasks a key/value head
    float *score;             // [B,G,pages]
    mutable bool no_memory;
};

static inline bool whole_vectors(const McAttention &c) {
    return c.D % LANES == 0 && (c.kv_type != MC_I4 || c.D % (2 * LANES) == 0);
}

static inline int64_t pages_of(const McAttention &c, int64_t b) {
    int64_t used = c.used ? c.used[b] : c.S;
    return (used + c.page_tokens - 1) / c.page_tokens;
}

// Whether a row has more than it may look at.
static inline bool chooses_pages(const McAttention &c, int64_t b) {
    return (c.used ? c.used[b] : c.S) > c.page_from && pages_of(c, b) > c.page_keep;
}

// Bounds of the pages from .. to, of every query of a group, [group][PART_KEYS].
static void score_pages(const McAttention &c, int64_t b, int64_t g, int64_t from, int64_t to, const float *q,
                        float *s, float *bounds) {
    int64_t first = b * c.bounds.batch + g * c.bounds.head, D = c.D, group = c.H / c.G;
    int64_t half = c.kv_type == MC_I4 ? D / 2 : D;
    if (!whole_vectors(c)) {
        for (int64_t j = from; j < to; j++)
            for (int side = 0; side < 2; side++) {
                widen_row(c.kv_type, c.bounds.data, first + j * c.bounds.token + side * half, D, bounds);
                for (int64_t r = 0; r < group; r++) {
                    float x = side ? s[r * PART_KEYS + j - from] : 0;
                    for (int64_t d = 0; d < D; d++) x += q[(2 * r + side) * D + d] * bounds[d];
                    s[r * PART_KEYS + j - from] = x;
                }
            }
        return;
    }
    int64_t at[LANES + AHEAD_ROWS];
    for (int64_t j = from; j < to; j += LANES) {
        for (int i = 0; i < LANES + AHEAD_ROWS; i++)
            at[i] = first + (j + i < to ? j + i : to - 1) * c.bounds.token;
        float *scored = s + (j - from);
        switch (c.kv_type) {
        case MC_F32: score_rows<MC_F32>((int)group, c.bounds.data, at, q, 2 * D, scored); break;
        case MC_BF16: score_rows<MC_BF16>((int)group, c.bounds.data, at, q, 2 * D, scored); break;
        case MC_F16: score_rows<MC_F16>((int)group, c.bounds.data, at, q, 2 * D, scored); break;
        case MC_I8: score_rows<MC_I8>((int)group, c.bounds.data, at, q, 2 * D, scored); break;
        default: score_rows<MC_I4>((int)group, c.bounds.data, at, q, 2 * D, scored);
        }
    }
}

static void score_pages_task(void *data, size_t index) {
    const Paging &p = *(const Paging *)data;
    const McAttention &c = *p.c;
    int64_t part = (int64_t)index % p.parts, bg = (int64_t)index / p.parts, b = bg / c.G, g = bg % c.G;
    int64_t group = c.H / c.G, D = c.D;
    int64_t from = part * SCORED_PAGES, to = from + SCORED_PAGES, pages = pages_of(c, b);
    to = to < pages ? to : pages;
    if (!chooses_pages(c, b) || from >= to) return;
    if (!scratch.reserve(4 * ((size_t)(2 * group * D + 2 * D) + (size_t)(group + 1) * PART_KEYS) + 4096)) {
        __atomic_store_n(&p.no_memory, true, __ATOMIC_RELAXED);
        return;
    }
    float *q = scratch.take<float>((size_t)(2 * group * D)), *row = scratch.take<float>((size_t)D);
    float *s = scratch.take<float>((size_t)(group * PART_KEYS)), *bounds = scratch.take<float>((size_t)D);
    for (int64_t r = 0; r < group; r++) {
        widen_row(c.q_type, c.q.data, b * c.q.batch + (g * group + r) * c.q.head, D, row);
        for (int64_t i = 0; i < D; i++) {
            int64_t channel = whole_vectors(c) ? channel_of(c.kv_type, i) : i;
            float x = row[channel] * (c.k_scale ? c.k_scale[g * D + channel] : 1.0f);
            q[2 * r * D + i] = x > 0 ? x : 0;
            q[(2 * r + 1) * D + i] = x < 0 ? x : 0;
        }
    }
    score_pages(c, b, g, from, to, q, s, bounds);
    float *best = p.score + bg * p.pages;
    for (int64_t j = from; j < to; j++) {
        float most = s[j - from];
        for (int64_t r = 1; r < group; r++)
            most = s[r * PART_KEYS + j - from] > most ? s[r * PART_KEYS + j - from] : most;
        best[j] = most;
    }
}

// Mark the pages that each key/value head looks at, [B,G,pages]; the newest page is always one of them.
static bool mark_pages(const Paging &p, uint8_t *marks) {
    const McAttention &c = *p.c;
    float *work = (float *)malloc((size_t)p.pages * 4);
    if (!work) return false;
    for (int64_t bg = 0; bg < c.B * c.G; bg++) {
        int64_t b = bg / c.G, n = pages_of(c, b);
        uint8_t *mark = marks + bg * p.pages;
        bool chooses = chooses_pages(c, b);
        for (int64_t j = 0; j < p.pages; j++) mark[j] = j < n && (!chooses || j == n - 1);
        if (chooses) mark_largest(p.score + bg * p.pages, n - 1, c.page_keep - 1, mark, work);
    }
    free(work);
    return true;
}

// The slots of marked pages, [B,G,most] in rising order, -1 after them.
static void list_slots(const Paging &p, const uint8_t *marks, int64_t most, int32_t *slots) {
    const McAttention &c = *p.c;
    for (int64_t bg = 0; bg < c.B * c.G; bg++) {
        int64_t b = bg / c.G, used = c.used ? c.used[b] : c.S, count = 0;
        int32_t *list = slots + bg * most;
        for (int64_t j = 0; j < pages_of(c, b); j++)
            for (int64_t s = j * c.page_tokens; marks[bg * p.pages + j] && s < (j + 1) * c.page_tokens && s < used; s++)
                list[count++] = (int32_t)s;
        while (count < most) list[count++] = -1;
    }
}

// One query over the pages that it chooses. `attend` runs decode over slots, or prefill over blocks where the
// head's width does not fill vectors.
template <class Attend>
static int32_t attend_to_pages(McAttention c, bool by_slot, Attend attend) {
    Paging p = {&c, 0, 0, nullptr, false};
    int64_t most = 0;
    bool any = false;
    for (int64_t b = 0; b < c.B; b++) {
        int64_t used = c.used ? c.used[b] : c.S, pages = pages_of(c, b);
        int64_t seen = chooses_pages(c, b) ? c.page_keep * c.page_tokens : used;
        any |= chooses_pages(c, b);
        p.pages = pages > p.pages ? pages : p.pages;
        most = seen > most ? seen : most;
    }
    if (!any) return attend(c);
    p.parts = (p.pages + SCORED_PAGES - 1) / SCORED_PAGES;
    size_t heads = (size_t)(c.B * c.G), pages = (size_t)p.pages;
    int64_t across = (c.S + c.page_tokens - 1) / c.page_tokens, group = c.H / c.G;
    p.score = (float *)malloc(heads * pages * 4);
    uint8_t *marks = (uint8_t *)malloc(heads * pages);
    size_t listed = by_slot ? heads * (size_t)most * 4 : (size_t)(c.B * c.H * across);
    void *list = malloc(listed + 1);
    int32_t code = 2;
    if (p.score && marks && list) {
        run(c, score_pages_task, heads * (size_t)p.parts, &p);
        if (!p.no_memory && mark_pages(p, marks)) {
            if (by_slot) {
                list_slots(p, marks, most, (int32_t *)list);
                c.slots = (const int32_t *)list, c.slot_count = most;
            } else {
                for (int64_t i = 0; i < c.B * c.H * across; i++)
                    ((uint8_t *)list)[i] = i % across < p.pages && marks[i / across / group * p.pages + i % across];
                c.blocks = (const uint8_t *)list, c.block_tokens = c.page_tokens;
                c.blocks_head = across, c.blocks_batch = c.H * across;
            }
            code = attend(c);
        }
    }
    free(p.score);
    free(marks);
    free(list);
    return code;
}

static inline int code_at(const McPages &a, int64_t at, int64_t d) {
    if (a.cache_type == MC_I8) return ((const int8_t *)a.bounds.data)[at + d];
    uint8_t two = ((const uint8_t *)a.bounds.data)[at + d / 2];
    return (d % 2 ? two >> 4 : two & 15) - 8;
}

static inline void put_code(const McPages &a, int64_t at, int64_t d, int code) {
    if (a.cache_type == MC_I8) {
        ((int8_t *)a.bounds.data)[at + d] = (int8_t)code;
        return;
    }
    uint8_t *byte = (uint8_t *)a.bounds.data + at + d / 2;
    *byte = d % 2 ? (uint8_t)((*byte & 15) | (code + 8) << 4) : (uint8_t)((*byte & 0xf0) | (code + 8));
}

static void widen_page(const McPages &a, const float *row, int64_t g, int64_t largest, int64_t smallest, bool first) {
    int low = a.cache_type == MC_I8 ? -128 : -8, high = -low - 1;
    for (int64_t d = 0; d < a.D; d++) {
        float x = __builtin_nearbyintf(row[d] / a.k_scale[g * a.D + d]);
        int code = (int)(x < (float)low ? (float)low : x > (float)high ? (float)high : x);
        if (first || code > code_at(a, largest, d)) put_code(a, largest, d, code);
        if (first || code < code_at(a, smallest, d)) put_code(a, smallest, d, code);
    }
}

int32_t page_bounds(const McPages &a) {
    float row[256], old[256];
    int64_t half = a.cache_type == MC_I4 ? a.D / 2 : a.D;
    for (int64_t b = 0; b < a.B; b++)
        for (int64_t t = 0; t < a.T; t++) {
            int64_t slot = a.used[b] - a.T + t;
            if (slot < 0) continue;  // a row shorter than the chunk
            bool first = slot % a.page_tokens == 0;
            for (int64_t g = 0; g < a.G; g++) {
                widen_row(a.type, a.k.data, b * a.k.batch + g * a.k.head + t * a.k.token, a.D, row);
                int64_t largest = b * a.bounds.batch + g * a.bounds.head + slot / a.page_tokens * a.bounds.token;
                if (a.cache_type >= MC_I8) {
                    widen_page(a, row, g, largest, largest + half, first);
                    continue;
                }
                for (int side = 0; side < 2; side++) {
                    int64_t at = largest + side * half;
                    if (!first) {
                        widen_row(a.cache_type, a.bounds.data, at, a.D, old);
                        for (int64_t d = 0; d < a.D; d++)
                            old[d] = (side ? old[d] < row[d] : old[d] > row[d]) ? old[d] : row[d];
                    }
                    narrow_row(a.cache_type, first ? row : old, a.D, a.bounds.data, at);
                }
            }
        }
    return 0;
}

}  // namespace MC_ISA
