// Who may look at whom. A key is visible to the queries whose position lies in an interval of its own:
// causal, window, sinks, block stride and empty slots all come down to two numbers a key.
#pragma once
#include "attention.h"

namespace MC_ISA {

// NOWHERE is the place of a query that sees nothing, below that of any other
constexpr int32_t LAST = INT32_MAX, NOWHERE = INT32_MIN, FIRST = INT32_MIN + 1;

struct Interval {
    int32_t low, high;  // low > high: visible to nobody
};

static inline Interval interval_of(const McAttention &c, int64_t p) {
    if (p < 0) return {LAST, FIRST};
    Interval seen = {c.causal ? (int32_t)p : FIRST, LAST};
    if (c.window > 0) {
        bool pinned = p < c.sinks || (c.stride > 0 && (p / c.block) % c.stride == 0);
        if (!c.causal) seen.low = pinned ? FIRST : (int32_t)(p - c.window + 1);
        if (!pinned) seen.high = (int32_t)(p + c.window - 1);
    }
    return seen;
}

// What a tile of keys knows of itself: enough to skip it, or to leave its scores as they are.
struct TileView {
    int32_t lowest, highest;      // some query outside of [lowest, highest] sees none of the keys
    int32_t all_from, all_to;     // a query inside of [all_from, all_to] sees all of them
    bool has_empty;
};

static inline TileView view_of(const Interval *keys, int64_t count) {
    TileView v = {LAST, FIRST, FIRST, LAST, false};
    for (int64_t i = 0; i < count; i++) {
        Interval k = keys[i];
        if (k.low > k.high) {
            v.has_empty = true;
            v.all_from = LAST;
            continue;
        }
        if (k.low < v.lowest) v.lowest = k.low;
        if (k.high > v.highest) v.highest = k.high;
        if (k.low > v.all_from) v.all_from = k.low;
        if (k.high < v.all_to) v.all_to = k.high;
    }
    return v;
}

}  // namespace MC_ISA
