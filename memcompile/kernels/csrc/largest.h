// The largest of many numbers.
#pragma once
#include <cstdint>

namespace MC_ISA {

// The k-th largest of x (k from 1), which is reordered.
static float kth_largest(float *x, int64_t n, int64_t k) {
    int64_t low = 0, high = n - 1;
    for (k--; low < high;) {
        float pivot = x[(low + high) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i <= j) {
                float t = x[i];
                x[i++] = x[j], x[j--] = t;
            }
        }
        if (k <= j) high = j;
        else if (k >= i) low = i;
        else break;
    }
    return x[k];
}

// Mark the k largest of x; of equal ones the first.
static void mark_largest(const float *x, int64_t n, int64_t k, uint8_t *mark, float *work) {
    if (k >= n) {
        for (int64_t i = 0; i < n; i++) mark[i] = 1;
        return;
    }
    if (k <= 0) return;
    for (int64_t i = 0; i < n; i++) work[i] = x[i];
    float least = kth_largest(work, n, k);
    for (int64_t i = 0; i < n; i++)
        if (x[i] > least) mark[i] = 1, k--;
    for (int64_t i = 0; i < n && k > 0; i++)
        if (x[i] == least) mark[i] = 1, k--;
}

}  // namespace MC_ISA
