// Entries of sparse codes sorted by latent, and by entry within a latent.
//
// Sums over the entries of a latent then run in one order, without floating-point atomics. Latents of more than `split`
// entries are summed in pieces of that length, each by a block of its own, so that a latent that fires on every token
// leaves no serial tail.
#pragma once

#include <cstdint>

#include "cuda/device.h"

namespace sparsekern::cuda {

// Where sort_by_latent writes.
struct EntriesByLatent {
    std::int32_t* start;         // [d_sae + 1]: the entries of latent i are order[start[i] .. start[i + 1])
    std::int32_t* order;         // [entries]
    std::int32_t* piece_start;   // [d_sae]: how many pieces the latents before i have; up to `split` entries are none
    std::int32_t* piece_latent;  // [most_pieces]: the latent of each piece, d_sae for pieces that are not used
};

// No more pieces than this, so that nobody has to wait for the device to know their number: a latent of c > split
// entries has ceil(c / split) < 2 c / split of them.
inline std::int64_t most_pieces(std::int64_t entries, std::int64_t split) { return 2 * entries / split; }

// Bytes of memory that sort_by_latent works in.
std::int64_t sort_workspace(std::int64_t entries, std::int64_t d_sae);

// `latent` [entries] holds numbers in [0, d_sae). There may be up to 2^31 - split entries.
void sort_by_latent(const std::int32_t* latent, std::int64_t entries, std::int64_t d_sae, std::int64_t split,
                    const EntriesByLatent& out, void* workspace, Stream stream);

}  // namespace sparsekern::cuda
