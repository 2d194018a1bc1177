// Pairs of latents against counting in a dense matrix.
#include "cpu/cooccurrence.h"

#include "cpu/parallel.h"
#include "native_test.h"

using namespace sparsekern;
using namespace sparsekern::test;

namespace {

// Tokens of up to `most` of the latents, some of none and one of all.
void check_case(std::int64_t tokens, std::int64_t latents, std::int64_t most, std::int64_t at_least) {
    Random random(20261123);
    Buffer<std::int64_t> crow(tokens + 1);
    std::vector<std::int32_t> entries;
    std::vector<std::int64_t> dense(latents * latents, 0);
    crow[0] = 0;
    for (std::int64_t b = 0; b < tokens; ++b) {
        const std::int64_t wanted = b == tokens / 2 ? latents : random.below(most + 1);
        std::vector<std::int32_t> row;
        for (std::int64_t i = 0, left = latents; i < latents; ++i, --left)
            if (random.below(left) < wanted - static_cast<std::int64_t>(row.size()))
                row.push_back(static_cast<std::int32_t>(i));
        for (std::int32_t i : row)
            for (std::int32_t j : row) dense[i * latents + j] += i < j;
        entries.insert(entries.end(), row.begin(), row.end());
        crow[b + 1] = static_cast<std::int64_t>(entries.size());
    }
    Buffer<std::int32_t> index(static_cast<std::int64_t>(entries.size()));
    std::copy(entries.begin(), entries.end(), index.data());
    const Codes codes = {index.data(), tokens, -1, latents, crow.data()};
    for (int threads = 1; threads <= 4; ++threads) {
        const Cooccurrences found(codes, at_least, threads);
        Buffer<std::int64_t> begin(latents + 1);
        Buffer<std::int32_t> col(found.size()), counts(found.size());
        found.copy(begin.data(), col.data(), counts.data(), threads);
        std::int64_t at = 0;
        for (std::int64_t i = 0; i < latents; ++i) {
            CHECK(begin[i] == at, "latent " << i << " begins at " << begin[i] << ", expected " << at);
            for (std::int64_t j = i + 1; j < latents; ++j) {
                if (dense[i * latents + j] < at_least) continue;
                CHECK(at < found.size() && col[at] == j && counts[at] == dense[i * latents + j],
                      "pair " << at << ", expected " << i << " and " << j << "; tokens " << tokens << ", latents "
                              << latents << ", threads " << threads);
                ++at;
            }
        }
        CHECK(begin[latents] == at && at == found.size(), "there are " << found.size() << " pairs, expected " << at);
    }
}

}  // namespace

NATIVE_TEST(cooccurrence_odd_shapes) {
    for (std::int64_t tokens : {0, 1, 50})
        for (std::int64_t latents : {1, 2, 63, 64, 65, 129})
            for (std::int64_t at_least : {1, 3}) check_case(tokens, latents, std::min<std::int64_t>(latents, 9), at_least);
}

NATIVE_TEST(cooccurrence_on_threads) { check_case(kThreadSanitizer ? 6000 : 20000, 300, 40, 2); }
