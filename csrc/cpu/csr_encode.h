// Encoders that keep any number of latents in a row, by screening.h: those above a threshold, and the largest of a whole
// batch. How many entries there are is known at the end, so they are collected here and copied out then.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "screening.h"

namespace sparsekern {

// What passes the threshold, row by row.
class ThresholdEntries {
public:
    struct Entry {
        std::int32_t latent;
        float value;
    };

    explicit ThresholdEntries(std::int64_t rows) : rows_(rows) {}

    // By rising latent.
    std::vector<Entry>& row(std::int64_t b) { return rows_[b]; }

    // Fills `count` rows from all of their scores, [count, n].
    void add_rows(const std::int64_t* rows, std::int64_t count, const float* scores, std::int64_t n,
                  const float* threshold, int threads);

    std::int64_t size() const;
    // crow [rows + 1], col and values [size()]
    void copy(std::int64_t* crow, std::int32_t* col, float* values, int threads) const;

private:
    std::vector<std::vector<Entry>> rows_;
};

// The `count` largest scores of a batch, ties to the lower row and then to the lower latent. Scores come with what float32
// rounding can have done to them; where that could decide, those of exact arithmetic do, in float64.
class BatchLargest {
public:
    struct Entry {
        std::int64_t row;
        std::int32_t latent;
        float score, error;
    };

    // What `input` points to must live as long, but for the quantised copy.
    BatchLargest(const EncoderInput& input, std::int64_t count) : input_(input), count_(count) {}

    std::int64_t count() const { return count_; }
    const std::vector<Entry>& entries() const { return entries_; }
    // Nothing with an upper bound below this is among the largest.
    float floor() const { return floor_; }
    void raise(float floor) { floor_ = std::max(floor_, floor); }

    // At least |W[i]| of every latent, for add_rows().
    void bound_weights(const float* norm) { norms_.assign(norm, norm + input_.weights.n); }

    void add(const Entry& entry) { entries_.push_back(entry); }
    // Adds `count` rows with all their scores, [count, n], which a float32 product made in an order of its own. False if a
    // score is not finite.
    bool add_rows(const std::int64_t* rows, std::int64_t count, const float* scores);
    // Leaves the `count` largest of the entries.
    void select();

    // crow [rows + 1], col and values [count], after the ReLU.
    void copy(std::int64_t* crow, std::int32_t* col, float* values);

private:
    EncoderInput input_;
    std::int64_t count_;
    float floor_ = std::numeric_limits<float>::lowest();
    std::vector<Entry> entries_;
    std::vector<float> norms_;
};

struct CsrEncode {
    // Both return the number of candidates rescored and set certain[rows], 0 where a row must be computed in full: its
    // entries are then left out. `threshold` is [n], without NaN.
    std::int64_t (*threshold)(const EncoderInput&, const float* threshold, ThresholdEntries& found,
                              std::uint8_t* certain);
    std::int64_t (*batch_topk)(const EncoderInput&, BatchLargest& found, std::uint8_t* certain);
};

// One table for each instruction set; nullptr where this build has none for the machine's architecture.
const CsrEncode* csr_encode_generic();
const CsrEncode* csr_encode_avx2();
const CsrEncode* csr_encode_avx512();

}  // namespace sparsekern
