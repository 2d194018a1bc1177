// On how many tokens each pair of latents is active, without a matrix of all pairs.
#pragma once

#include <cstdint>
#include <vector>

#include "sparse_products.h"

namespace sparsekern {

// The pairs i < j with a count of at least `at_least`, collected until all are known.
class Cooccurrences {
public:
    // The codes are in CSR form; in a row latents rise and none comes twice.
    Cooccurrences(const Codes& codes, std::int64_t at_least, int threads);

    std::int64_t size() const { return crow_.back(); }
    // crow [d_sae + 1], col and counts [size()]; columns rise.
    void copy(std::int64_t* crow, std::int32_t* col, std::int32_t* counts, int threads) const;

private:
    struct Pair {
        std::int32_t latent, count;
    };
    std::vector<std::int64_t> crow_;
    std::vector<std::int64_t> first_;       // of each part's latents
    std::vector<std::vector<Pair>> parts_;  // theirs, latent by latent
};

}  // namespace sparsekern
