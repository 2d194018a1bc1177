// The k largest of short rows, such as the experts of a token by their scores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/parallel.h"

namespace sparsekern {

// index[b][j]: where the j-th largest of values[b] is; ties to the lower index. NaN counts as the largest number.
template <class T>
void largest(const T* values, std::int64_t rows, std::int64_t n, std::int64_t k, std::int32_t* index, int threads) {
    parallel_for(rows, useful_threads(static_cast<double>(rows) * n, threads), [=](std::int64_t begin, std::int64_t end) {
        std::vector<std::int32_t> order(k > 1 ? n : 0);
        for (std::int64_t b = begin; b < end; ++b) {
            const T* row = values + b * n;
            const auto before = [row](std::int32_t i, std::int32_t j) {
                const bool above = row[i] > row[j] || (row[i] != row[i] && row[j] == row[j]);
                const bool below = row[j] > row[i] || (row[j] != row[j] && row[i] == row[i]);
                return above || (!below && i < j);
            };
            if (k == 1) {
                std::int32_t best = 0;
                for (std::int32_t i = 1; i < n; ++i)
                    if (before(i, best)) best = i;
                index[b] = best;
                continue;
            }
            for (std::int32_t i = 0; i < n; ++i) order[i] = i;
            std::partial_sort_copy(order.begin(), order.end(), index + b * k, index + (b + 1) * k, before);
        }
    });
}

}  // namespace sparsekern
