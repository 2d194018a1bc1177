// Entries sorted by latent, against a stable sort.
#include "cuda/by_latent.h"

#include <numeric>

#include "cuda_test.h"

using namespace sparsekern::cuda;
using namespace sparsekern::test;

namespace {

// `crowded`: nine in ten entries are of one latent.
void check_case(std::int64_t entries, std::int64_t d_sae, std::int64_t split, bool crowded) {
    Random random(3);
    Buffer<std::int32_t> latent(entries);
    for (std::int64_t e = 0; e < entries; ++e)
        latent[e] = static_cast<std::int32_t>(crowded && random.below(10) ? d_sae / 3 : random.below(d_sae));
    std::vector<std::int32_t> order(entries);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) { return latent[a] < latent[b]; });

    const std::int64_t pieces = most_pieces(entries, split);
    Buffer<std::int32_t> start(d_sae + 1), found(entries), piece_start(d_sae), piece_latent(pieces);
    Buffer<std::uint8_t> workspace(sort_workspace(entries, d_sae));
    sort_by_latent(latent.data(), entries, d_sae, split,
                   {start.data(), found.data(), piece_start.data(), piece_latent.data()}, workspace.data(), nullptr);

    const std::string where = std::to_string(entries) + " entries of " + std::to_string(d_sae) + " latents";
    for (std::int64_t e = 0; e < entries; ++e)
        CHECK(found[e] == order[e], where << ", place " << e << ": " << found[e] << ", not " << order[e]);
    std::int64_t before = 0, piece = 0;
    for (std::int64_t i = 0; i < d_sae; ++i) {
        CHECK(start[i] == before, where << ", latent " << i << " starts at " << start[i] << ", not " << before);
        CHECK(piece_start[i] == piece, where << ", latent " << i << ": piece " << piece_start[i] << ", not " << piece);
        const std::int64_t count = std::count(latent.data(), latent.data() + entries, i);
        before += count;
        if (count > split)
            for (std::int64_t some = 0; some < count; some += split, ++piece)
                CHECK(piece_latent[piece] == i, where << ", piece " << piece << " is of " << piece_latent[piece]);
    }
    CHECK(start[d_sae] == entries, where << " end at " << start[d_sae]);
    for (; piece < pieces; ++piece)
        CHECK(piece_latent[piece] == d_sae, where << ", unused piece " << piece << " is of " << piece_latent[piece]);
}

}  // namespace

NATIVE_TEST(entries_by_latent) {
    check_case(0, 5, 4, false);
    check_case(1, 1, 4, false);
    check_case(500, 1, 128, false);
    check_case(700, 40, 4, true);
    check_case(4097, 300, 128, false);  // two digits of a latent, two tiles
    in_several_orders([] { check_case(9000, 257, 128, true); }, 2);
    // Three digits; tiles of the scan of the pieces wait for each other.
    in_several_orders([] { check_case(300, 70000, 2, true); }, kThreadSanitizer ? 1 : 2);
}
