// Latent by latent (Gustavson's row product of the transposed codes with the codes): the entries after those of latent i, on
// the tokens where it is active, are counted in an array of all latents, and a bit for each latent that was met keeps these
// in order. Counting is scattered additions, which no instruction set makes faster.
#include "cooccurrence.h"

#include <algorithm>
#include <atomic>

#include "parallel.h"

#if !defined(__GNUC__) && !defined(__clang__)
#define __builtin_prefetch(address) ((void)(address))
#endif

namespace sparsekern {
namespace {

// The place of the lowest bit that is set.
inline int lowest_bit(std::uint64_t bits) {
#if defined(__GNUC__) || defined(__clang__)
    return __builtin_ctzll(bits);
#else
    int place = 0;
    while (!(bits >> place & 1)) ++place;
    return place;
#endif
}

// The later entries of a token, seen from one of its latents.
struct Rest {
    std::int64_t begin;
    std::int64_t size;
};

constexpr std::int64_t kAhead = 12;          // tokens whose entries are fetched before they are counted
constexpr std::int64_t kPartsPerThread = 16;  // latents differ much: a thread that is through takes more of them

}  // namespace

Cooccurrences::Cooccurrences(const Codes& codes, std::int64_t at_least, int threads) : crow_(codes.d_sae + 1, 0) {
    const std::int64_t n = codes.d_sae, entries = codes.slots();
    std::vector<std::int64_t> start(n + 1, 0), work(n + 1, 0);
    for (std::int64_t b = 0; b < codes.rows; ++b)
        for (std::int64_t e = codes.begin(b), end = codes.begin(b + 1); e < end; ++e) {
            ++start[codes.index[e] + 1];
            work[codes.index[e] + 1] += end - e;
        }
    for (std::int64_t i = 0; i < n; ++i) {
        start[i + 1] += start[i];
        work[i + 1] += work[i] + (n - i) / 64 + 1;  // going through the bits
    }
    std::vector<Rest> rests(entries);
    {
        std::vector<std::int64_t> next(start.begin(), start.end() - 1);
        for (std::int64_t b = 0; b < codes.rows; ++b)
            for (std::int64_t e = codes.begin(b), end = codes.begin(b + 1); e < end; ++e)
                rests[next[codes.index[e]]++] = {e + 1, end - e - 1};
    }

    threads = useful_threads(4.0 * work[n], threads);
    const std::int64_t parts = threads == 1 ? 1 : kPartsPerThread * threads;
    for (std::int64_t part = 0; part <= parts; ++part)
        first_.push_back(part == parts ? n
                                       : std::lower_bound(work.begin(), work.end(), work[n] / parts * part) - work.begin());
    parts_.resize(parts);
    parallel_for(parts, threads, parts, [&](std::int64_t begin, std::int64_t end) {
        std::vector<std::int32_t> count(n, 0);
        std::vector<std::uint64_t> met(n / 64 + 1, 0);
        for (std::int64_t part = begin; part < end; ++part)
            for (std::int64_t i = first_[part]; i < first_[part + 1]; ++i) {
                for (std::int64_t p = start[i]; p < start[i + 1]; ++p) {
                    if (p + kAhead < entries) __builtin_prefetch(codes.index + rests[p + kAhead].begin);
                    const std::int32_t* other = codes.index + rests[p].begin;
                    for (std::int64_t left = rests[p].size; left > 0; --left, ++other) {
                        ++count[*other];
                        met[*other / 64] |= std::uint64_t{1} << *other % 64;
                    }
                }
                const std::size_t before = parts_[part].size();
                for (std::int64_t word = (i + 1) / 64; word <= n / 64; ++word)
                    for (std::uint64_t& bits = met[word]; bits; bits &= bits - 1) {
                        const std::int32_t j = static_cast<std::int32_t>(64 * word + lowest_bit(bits));
                        if (count[j] >= at_least) parts_[part].push_back({j, count[j]});
                        count[j] = 0;
                    }
                crow_[i + 1] = static_cast<std::int64_t>(parts_[part].size() - before);
            }
    });
    for (std::int64_t i = 0; i < n; ++i) crow_[i + 1] += crow_[i];
}

void Cooccurrences::copy(std::int64_t* crow, std::int32_t* col, std::int32_t* counts, int threads) const {
    std::copy(crow_.begin(), crow_.end(), crow);
    const std::int64_t parts = static_cast<std::int64_t>(parts_.size());
    parallel_for(parts, useful_threads(4.0 * size(), threads), parts, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t part = begin; part < end; ++part) {
            std::int64_t at = crow_[first_[part]];
            for (const Pair& pair : parts_[part]) {
                col[at] = pair.latent;
                counts[at++] = pair.count;
            }
        }
    });
}

}  // namespace sparsekern
