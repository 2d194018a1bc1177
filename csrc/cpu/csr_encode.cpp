// The part of csr_encode.h that no instruction set makes faster.
#include "csr_encode.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <stdexcept>
#include <utility>

#include "parallel.h"

namespace sparsekern {

void ThresholdEntries::add_rows(const std::int64_t* rows, std::int64_t count, const float* scores, std::int64_t n,
                                const float* threshold, int threads) {
    parallel_for(count, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t b = begin; b < end; ++b) {
            const float* row = scores + b * n;
            std::int64_t passing = 0;
            for (std::int64_t i = 0; i < n; ++i) passing += row[i] > threshold[i];
            std::vector<Entry>& entries = rows_[rows[b]];
            entries.resize(passing + 1);  // written to in any case: no branch to guess
            std::int64_t at = 0;
            for (std::int64_t i = 0; i < n; ++i) {
                entries[at] = {static_cast<std::int32_t>(i), row[i]};
                at += row[i] > threshold[i];
            }
            entries.resize(passing);
        }
    });
}

std::int64_t ThresholdEntries::size() const {
    std::int64_t size = 0;
    for (const auto& row : rows_) size += static_cast<std::int64_t>(row.size());
    return size;
}

void ThresholdEntries::copy(std::int64_t* crow, std::int32_t* col, float* values, int threads) const {
    const std::int64_t rows = static_cast<std::int64_t>(rows_.size());
    crow[0] = 0;
    for (std::int64_t b = 0; b < rows; ++b) crow[b + 1] = crow[b] + static_cast<std::int64_t>(rows_[b].size());
    parallel_for(rows, useful_threads(static_cast<double>(crow[rows]), threads), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t b = begin; b < end; ++b) {
            std::int64_t at = crow[b];
            for (const Entry& entry : rows_[b]) {
                col[at] = entry.latent;
                values[at++] = entry.value;
            }
        }
    });
}

bool BatchLargest::add_rows(const std::int64_t* rows, std::int64_t count, const float* scores) {
    const std::int64_t n = input_.weights.n, d = input_.weights.d;
    // Of d additions in any order, each off by half a unit in the last place.
    const float rounding = (static_cast<float>(d) + 8) * 6e-8f;
    const std::size_t most = static_cast<std::size_t>(2 * count_ + n);
    for (std::int64_t r = 0; r < count; ++r, scores += n) {
        double squares = 0;
        for (std::int64_t c = 0; c < d; ++c) {
            const double x = input_.row(rows[r])[c];
            squares += x * x;
        }
        const float missing = rounding * static_cast<float>(std::sqrt(squares) * (1 + 1e-6));
        for (std::int64_t i = 0; i < n; ++i) {
            if (!std::isfinite(scores[i])) return false;
            const float error = norms_[i] * missing + 4e-7f * std::fabs(input_.bias_of(i)) + 1e-33f;
            if (scores[i] + error >= floor_) add({rows[r], static_cast<std::int32_t>(i), scores[i], error});
        }
        if (entries_.size() > most) select();
    }
    return true;
}

void BatchLargest::select() {
    const std::int64_t size = static_cast<std::int64_t>(entries_.size());
    if (size < count_) return;
    // What `count` entries certainly reach, and what no more than that many could exceed.
    const auto bound = [&](float sign) {
        std::vector<float> bounds(size);
        std::transform(entries_.begin(), entries_.end(), bounds.begin(),
                       [=](const Entry& e) { return e.score + sign * e.error; });
        std::nth_element(bounds.begin(), bounds.begin() + (count_ - 1), bounds.end(), std::greater<float>());
        return bounds[count_ - 1];
    };
    const float low = bound(-1), high = bound(1);
    raise(low);
    if (size == count_) return;
    const auto sure = std::stable_partition(entries_.begin(), entries_.end(),
                                            [=](const Entry& e) { return e.score - e.error > high; });
    const auto possible = std::stable_partition(sure, entries_.end(),
                                                [=](const Entry& e) { return e.score + e.error >= low; });
    const std::int64_t open = count_ - (sure - entries_.begin());
    if (possible - sure > open) {
        struct Exact {
            double score;
            Entry entry;
        };
        std::vector<Exact> exact;
        exact.reserve(possible - sure);
        for (auto e = sure; e != possible; ++e) {
            const float *w = input_.weights.row(e->latent), *x = input_.row(e->row);
            double score = 0;
            for (std::int64_t c = 0; c < input_.weights.d; ++c) score += static_cast<double>(w[c]) * x[c];
            exact.push_back({score + input_.bias_of(e->latent), *e});
        }
        std::nth_element(exact.begin(), exact.begin() + (open - 1), exact.end(), [](const Exact& a, const Exact& b) {
            if (a.score != b.score) return a.score > b.score;
            return a.entry.row != b.entry.row ? a.entry.row < b.entry.row : a.entry.latent < b.entry.latent;
        });
        std::transform(exact.begin(), exact.begin() + open, sure, [](const Exact& e) { return e.entry; });
    }
    entries_.resize(count_);
}

void BatchLargest::copy(std::int64_t* crow, std::int32_t* col, float* values) {
    select();
    if (static_cast<std::int64_t>(entries_.size()) != count_) throw std::logic_error("entries are missing");
    std::fill_n(crow, input_.rows + 1, 0);
    for (const Entry& e : entries_) ++crow[e.row + 1];
    for (std::int64_t b = 0; b < input_.rows; ++b) crow[b + 1] += crow[b];
    std::vector<std::int64_t> next(crow, crow + input_.rows);
    std::vector<std::pair<std::int32_t, float>> sorted(count_);
    for (const Entry& e : entries_) sorted[next[e.row]++] = {e.latent, e.score};
    for (std::int64_t b = 0; b < input_.rows; ++b) {
        std::sort(sorted.begin() + crow[b], sorted.begin() + crow[b + 1]);
        for (std::int64_t at = crow[b]; at < crow[b + 1]; ++at) {
            col[at] = sorted[at].first;
            values[at] = std::max(sorted[at].second, 0.0f);
        }
    }
}

}  // namespace sparsekern
