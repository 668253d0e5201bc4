// Which keys a head looks at, chosen when a prompt is read (docs/passes/attention.sparse.md gives the rules
// and their papers). A head's pattern is four numbers: a kind and what it needs. The choice is made once a
// call, over the row's slots in use: blocks of keys for each block of queries, and single columns besides.
#pragma once
#include "attention.h"
#include "largest.h"
#include "prefill.h"

namespace MC_ISA {

enum Kind { DENSE, SHAPE, BLOCKS, ANTIDIAGONAL, VERTICAL_SLASH };

constexpr int64_t LAST_QUERIES = 64, FORCED_COLUMNS = 30, FORCED_DIAGONALS = 100, LEAST_SLASHES = 50;

struct Selection {
    const McAttention *c;
    int64_t block, across, down;
    uint8_t *blocks;          // [B,H,down,across]
    int32_t *columns;         // [B,H,most]: chosen slots in rising order
    int32_t *column_count;    // [B,H]
    int64_t most;
    bool failed;
};

struct Head {
    const Selection *s;
    int64_t b, h, g, used, first;  // first: slot of the call's first query
    uint8_t *blocks;
    int64_t first_own(int64_t i) const { return first + i * s->block; }
    int64_t last_own(int64_t i) const {
        int64_t end = (i + 1) * s->block;
        return first + (end < s->c->T ? end : s->c->T) - 1;
    }
    uint8_t *row(int64_t i) const { return blocks + i * s->across; }
    // a block of queries always sees the blocks that it lies in itself
    void keep_own(int64_t i) const {
        for (int64_t j = first_own(i) / s->block; j <= last_own(i) / s->block; j++) row(i)[j] = 1;
    }
};

static void read_key(const McAttention &c, const Head &head, int64_t slot, float *y) {
    widen_row(c.kv_type, c.k.data, head.b * c.k.batch + head.g * c.k.head + slot * c.k.token, c.D, y);
    if (c.k_scale)
        for (int64_t d = 0; d < c.D; d++) y[d] *= c.k_scale[head.g * c.D + d];
    if (c.k_token_scale) {
        float by = c.k_token_scale[(head.b * c.G + head.g) * c.S + slot];
        for (int64_t d = 0; d < c.D; d++) y[d] *= by;
    }
}

static void read_query(const McAttention &c, const Head &head, int64_t t, float *y) {
    widen_row(c.q_type, c.q.data, head.b * c.q.batch + head.h * c.q.head + t * c.q.token, c.D, y);
}

// The first tokens, the last ones before each query, and everything for the call's last queries.
static void select_shape(const Head &head, int64_t first_tokens, int64_t local, int64_t tail) {
    const Selection &s = *head.s;
    for (int64_t i = 0; i < s.down; i++) {
        bool whole = (i + 1) * s.block > s.c->T - tail;
        for (int64_t j = 0; j * s.block <= head.last_own(i); j++)
            if (whole || j * s.block < first_tokens || (j + 1) * s.block - 1 > head.first_own(i) - local)
                head.row(i)[j] = 1;
        head.keep_own(i);
    }
}

// The blocks whose mean key fits the mean query best.
static bool select_blocks(const Head &head, int64_t keep, int64_t first_blocks, int64_t recent_blocks) {
    const Selection &s = *head.s;
    const McAttention &c = *s.c;
    int64_t D = c.D;
    float *work = (float *)malloc((size_t)(s.across * (D + 2) + 2 * D) * 4);
    if (!work) return false;
    float *means = work, *score = means + s.across * D, *copy = score + s.across, *mean = copy + s.across;
    float *row = mean + D;
    for (int64_t j = 0; j < s.across; j++) {
        float *m = means + j * D;
        for (int64_t d = 0; d < D; d++) m[d] = 0;
        int64_t to = (j + 1) * s.block < head.used ? (j + 1) * s.block : head.used;
        for (int64_t slot = j * s.block; slot < to; slot++) {
            read_key(c, head, slot, row);
            for (int64_t d = 0; d < D; d++) m[d] += row[d];
        }
        for (int64_t d = 0; d < D; d++) m[d] /= (float)(to - j * s.block);
    }
    for (int64_t i = 0; i < s.down; i++) {
        int64_t to = (i + 1) * s.block < c.T ? (i + 1) * s.block : c.T;
        for (int64_t d = 0; d < D; d++) mean[d] = 0;
        for (int64_t t = i * s.block; t < to; t++) {
            read_query(c, head, t, row);
            for (int64_t d = 0; d < D; d++) mean[d] += row[d];
        }
        int64_t seen = head.last_own(i) / s.block + 1, left = keep;
        uint8_t *mark = head.row(i);
        head.keep_own(i);
        for (int64_t j = 0; j < seen; j++)
            if (j < first_blocks || j >= seen - recent_blocks) mark[j] = 1;
        for (int64_t j = 0; j < seen; j++) left -= mark[j];
        for (int64_t j = 0; j < seen; j++) {
            score[j] = NOTHING;
            if (mark[j]) continue;
            Vf sum = {};
            int64_t d = 0;
            for (; d + LANES <= D; d += LANES) sum += load(mean + d) * load(means + j * D + d);
            score[j] = sum_of(sum);
            for (; d < D; d++) score[j] += mean[d] * means[j * D + d];
        }
        if (left > 0) mark_largest(score, seen, left, mark, copy);
    }
    free(work);
    return true;
}

// Scores of 64 query columns x [steps][64] over n rows of keys, `group` tokens a row, all in float.
static void score_groups(const Head &head, const float *x, int64_t group, int64_t rows, float *scores,
                         float *buffer) {
    const McAttention &c = *head.s->c;
    constexpr int64_t AT_ONCE = 16;
    for (int64_t r = 0; r < rows; r += AT_ONCE) {
        int64_t n = rows - r < AT_ONCE ? rows - r : AT_ONCE;
        for (int64_t i = 0; i < n * group; i++) {
            float *row = buffer + i * c.D;
            int64_t slot = r * group + i;
            if (slot < head.used) read_key(c, head, slot, row);
            else
                for (int64_t d = 0; d < c.D; d++) row[d] = 0;
        }
        product<float>(buffer, group * c.D, 1, x, n, group * c.D, scores + r * QUERIES, QUERIES, false);
    }
}

// Sums along the antidiagonals of stride x stride cells stand for the cells (XAttention).
static bool select_antidiagonal(const Head &head, int64_t stride, float threshold) {
    const Selection &s = *head.s;
    const McAttention &c = *s.c;
    int64_t D = c.D, groups = (head.used + stride - 1) / stride, in_block = s.block / stride;
    size_t floats = (size_t)(stride * D * QUERIES + groups * QUERIES + 16 * stride * D + 2 * s.across + D);
    float *x = (float *)malloc((floats + 3 * QUERIES) * 4);
    if (!x) return false;
    float *scores = x + stride * D * QUERIES, *buffer = scores + groups * QUERIES;
    float *mass = buffer + 16 * stride * D, *copy = mass + s.across, *row = copy + s.across;
    float *m = row + D, *l = m + QUERIES, *shrink = l + QUERIES;
    int64_t per_call = QUERIES / in_block;  // query blocks that 64 columns hold
    for (int64_t i0 = 0; i0 < s.down; i0 += per_call) {
        for (int64_t i = 0; i < stride * D * QUERIES; i++) x[i] = 0;
        for (int64_t col = 0; col < QUERIES; col++)
            for (int64_t r = 0; r < stride; r++) {
                int64_t t = i0 * s.block + col * stride + (stride - 1 - r);
                if (t >= c.T) continue;
                read_query(c, head, t, row);
                for (int64_t d = 0; d < D; d++) x[(r * D + d) * QUERIES + col] = row[d];
            }
        int64_t last = head.last_own(i0 + per_call - 1 < s.down ? i0 + per_call - 1 : s.down - 1);
        int64_t rows = last / stride + 1;
        score_groups(head, x, stride, rows, scores, buffer);
        for (int64_t k = 0; k < rows; k++)
            for (int64_t col = 0; col < QUERIES; col++) {
                int64_t end = i0 * s.block + (col + 1) * stride;
                int64_t own = head.first + (end < c.T ? end : c.T) - 1;
                if (k * stride > own) scores[k * QUERIES + col] = -__builtin_inff();
            }
        for (int i = 0; i < QUERIES; i++) m[i] = NOTHING, l[i] = 0;
        softmax(scores, (int)rows, QUERIES, c.scale * LOG2E / (float)stride, m, l, shrink);
        for (int64_t i = i0; i < i0 + per_call && i < s.down; i++) {
            int64_t seen = head.last_own(i) / s.block + 1;
            float total = 0, held = 0;
            for (int64_t j = 0; j < seen; j++) {
                mass[j] = 0;
                for (int64_t k = j * in_block; k < (j + 1) * in_block && k < rows; k++)
                    for (int64_t col = (i - i0) * in_block; col < (i - i0 + 1) * in_block; col++)
                        if (i0 * s.block + col * stride < c.T) mass[j] += scores[k * QUERIES + col] / l[col];
                total += mass[j];
            }
            uint8_t *mark = head.row(i);
            head.keep_own(i);
            mark[0] = 1;
            for (int64_t j = 0; j < seen; j++)
                if (mark[j]) held += mass[j];
            // the largest first, until what is held reaches the threshold
            while (held < threshold * total) {
                int64_t best = -1;
                for (int64_t j = 0; j < seen; j++)
                    if (!mark[j] && (best < 0 || mass[j] > mass[best])) best = j;
                if (best < 0) break;
                mark[best] = 1, held += mass[best];
            }
        }
    }
    free(x);
    return true;
}

// Columns and diagonals that the last queries look at most (MInference).
static bool select_vertical_slash(const Head &head, int64_t vertical, int64_t slash, int32_t *columns,
                                  int32_t *count) {
    const Selection &s = *head.s;
    const McAttention &c = *s.c;
    int64_t used = head.used, last = c.T < LAST_QUERIES ? c.T : LAST_QUERIES, t0 = c.T - last, D = c.D;
    size_t floats = (size_t)(D * QUERIES + used * QUERIES + 16 * D + 3 * used + D + 3 * QUERIES);
    float *x = (float *)malloc(floats * 4 + (size_t)(2 * used));
    if (!x) return false;
    float *scores = x + D * QUERIES, *buffer = scores + used * QUERIES, *columns_sum = buffer + 16 * D;
    float *diagonal = columns_sum + used, *copy = diagonal + used, *row = copy + used, *m = row + D;
    float *l = m + QUERIES, *shrink = l + QUERIES;
    uint8_t *keep_column = (uint8_t *)(shrink + QUERIES), *keep_diagonal = keep_column + used;
    for (int64_t i = 0; i < D * QUERIES; i++) x[i] = 0;
    for (int64_t t = 0; t < last; t++) {
        read_query(c, head, t0 + t, row);
        for (int64_t d = 0; d < D; d++) x[d * QUERIES + t] = row[d];
    }
    score_groups(head, x, 1, used, scores, buffer);
    for (int64_t slot = 0; slot < used; slot++)
        for (int64_t t = 0; t < last; t++)
            if (slot > head.first + t0 + t) scores[slot * QUERIES + t] = -__builtin_inff();
    for (int i = 0; i < QUERIES; i++) m[i] = NOTHING, l[i] = 0;
    softmax(scores, (int)used, QUERIES, c.scale * LOG2E, m, l, shrink);
    for (int64_t i = 0; i < used; i++) columns_sum[i] = diagonal[i] = 0, keep_column[i] = keep_diagonal[i] = 0;
    for (int64_t slot = 0; slot < used; slot++)
        for (int64_t t = 0; t < last; t++) {
            int64_t distance = head.first + t0 + t - slot;
            if (distance < 0) continue;
            float p = scores[slot * QUERIES + t] / l[t];
            columns_sum[slot] += p, diagonal[distance] += p;
        }
    for (int64_t i = 0; i < used && i < FORCED_COLUMNS; i++) columns_sum[i] = __builtin_inff();
    for (int64_t i = 0; i < used && i < FORCED_DIAGONALS; i++) diagonal[i] = __builtin_inff();
    mark_largest(columns_sum, used, vertical < FORCED_COLUMNS ? FORCED_COLUMNS : vertical, keep_column, copy);
    mark_largest(diagonal, used, slash < LEAST_SLASHES ? LEAST_SLASHES : slash, keep_diagonal, copy);
    for (int64_t i = 0; i < s.down; i++) {
        uint8_t *mark = head.row(i);
        for (int64_t o = 0; o < used; o++) {
            if (!keep_diagonal[o] || head.last_own(i) < o) continue;
            int64_t from = head.first_own(i) > o ? head.first_own(i) - o : 0;
            for (int64_t j = from / s.block; j <= (head.last_own(i) - o) / s.block; j++) mark[j] = 1;
        }
        head.keep_own(i);
    }
    *count = 0;
    for (int64_t slot = 0; slot < used; slot++)
        if (keep_column[slot]) columns[(*count)++] = (int32_t)slot;
    free(x);
    return true;
}

static void select_task(void *data, size_t index) {
    Selection &s = *(Selection *)data;
    const McAttention &c = *s.c;
    int64_t b = (int64_t)index / c.H, h = (int64_t)index % c.H;
    Head head = {&s, b, h, h / (c.H / c.G), c.used ? c.used[b] : c.S, 0, s.blocks + (int64_t)index * s.down * s.across};
    head.first = head.used - c.T;
    const int32_t *p = c.pattern + h * 4;
    s.column_count[index] = 0;
    bool done = true;
    if (head.first < 0 || p[0] == DENSE || head.used <= c.pattern_from) {
        for (int64_t i = 0; i < s.down * s.across; i++) head.blocks[i] = 1;
        return;
    }
    for (int64_t i = 0; i < s.down * s.across; i++) head.blocks[i] = 0;
    if (p[0] == SHAPE) select_shape(head, p[1], p[2], p[3]);
    else if (p[0] == BLOCKS) done = select_blocks(head, p[1], p[2], p[3]);
    else if (p[0] == ANTIDIAGONAL) done = select_antidiagonal(head, p[1], (float)p[2] * 1e-6f);
    else done = select_vertical_slash(head, p[1], p[2], s.columns + (int64_t)index * s.most, s.column_count + index);
    if (!done) s.failed = true;
}

// Whether the patterns are ones that `select_task` knows, with numbers that make sense.
static bool patterns_are_legal(const McAttention &c) {
    for (int64_t h = 0; h < c.H; h++) {
        const int32_t *p = c.pattern + h * 4;
        if (p[0] < DENSE || p[0] > VERTICAL_SLASH || p[1] < 0 || p[2] < 0 || p[3] < 0) return false;
        if (p[0] == ANTIDIAGONAL && (p[1] < 1 || c.block_tokens % p[1] || c.block_tokens / p[1] > QUERIES)) return false;
    }
    return true;
}

// Whether a head's budget covers every key of the row, so that there is nothing to choose.
static bool covers(const int32_t *p, int64_t used, int64_t block) {
    switch (p[0]) {
    case DENSE: return true;
    case SHAPE: return (int64_t)p[1] + p[2] >= used || p[3] >= used;
    case BLOCKS: return (int64_t)p[1] * block >= used;
    case ANTIDIAGONAL: return p[2] > 1000000;
    default: return p[1] >= used || p[2] >= used;
    }
}

}  // namespace MC_ISA
