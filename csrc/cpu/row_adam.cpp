// The part of row_adam.h that no instruction set makes faster.
#include "row_adam.h"

#include <algorithm>
#include <vector>

namespace sparsekern {

void sort_slots(const std::int32_t* index, std::int64_t slots, std::int64_t n, const SortedSlots& out) {
    std::fill_n(out.start, n + 1, 0);
    for (std::int64_t s = 0; s < slots; ++s) ++out.start[index[s] + 1];
    for (std::int64_t i = 0; i < n; ++i) out.start[i + 1] += out.start[i];
    std::vector<std::int32_t> next(out.start, out.start + n);
    for (std::int64_t s = 0; s < slots; ++s) out.order[next[index[s]]++] = static_cast<std::int32_t>(s);
}

}  // namespace sparsekern
