// The kernels behind bits.h. A word of a row of `a` is compared with the same word of a panel in vectors of 32-bit lanes;
// how lanes are counted is all that differs between instruction sets. bit_slices.inl has another way for many long rows.

namespace sparsekern {
namespace {

inline std::uint32_t ones_in(std::uint32_t x) {
    x -= x >> 1 & 0x55555555u;  // of 2 bits, of 4, of 8, and then of all
    x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
    x = (x + (x >> 4)) & 0x0f0f0f0fu;
    return (x * 0x01010101u) >> 24;
}

// Vectors of 32-bit lanes, and counters of the bits that differ in each lane.
#if SPARSEKERN_LEVEL == 0

constexpr int kBitLanes = 4;
struct BitVector {
    std::uint32_t lane[kBitLanes];
};
inline BitVector load_bits(const std::uint32_t* from) {
    BitVector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
inline BitVector same_bits_in_all(std::uint32_t word) { return {{word, word, word, word}}; }

struct BitCounter {
    std::uint32_t sum[kBitLanes] = {};

    void add(const BitVector& a, const BitVector& b) {
        for (int i = 0; i < kBitLanes; ++i) sum[i] += ones_in(a.lane[i] ^ b.lane[i]);
    }
    void flush() {}
    void store(std::int32_t* to) const { std::memcpy(to, sum, sizeof sum); }
    // A bit for each lane that is below its bound.
    std::uint64_t below(const std::int32_t* bound) const {
        std::uint64_t found = 0;
        for (int i = 0; i < kBitLanes; ++i)
            found |= static_cast<std::uint64_t>(static_cast<std::int32_t>(sum[i]) < bound[i]) << i;
        return found;
    }
};

#elif SPARSEKERN_LEVEL == 1

constexpr int kBitLanes = 8;
using BitVector = __m256i;
inline BitVector load_bits(const std::uint32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline BitVector same_bits_in_all(std::uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }

// Half-bytes are counted by a table and gathered in bytes, which hold 31 words (Mula's method).
struct BitCounter {
    __m256i sum, bytes;

    // Written out: GCC compiles constructors that it makes itself without the target.
    BitCounter() : sum(_mm256_setzero_si256()), bytes(_mm256_setzero_si256()) {}

    void add(BitVector a, BitVector b) {
        const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                               0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
        const __m256i half = _mm256_set1_epi8(15), x = _mm256_xor_si256(a, b);
        const __m256i low = _mm256_and_si256(x, half), high = _mm256_and_si256(_mm256_srli_epi32(x, 4), half);
        bytes = _mm256_add_epi8(bytes, _mm256_add_epi8(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high)));
    }
    void flush() {
        const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        bytes = _mm256_setzero_si256();
    }
    void store(std::int32_t* to) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sum); }
    std::uint64_t below(const std::int32_t* bound) const {
        const __m256i bounds = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bound));
        return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(bounds, sum))));
    }
};

#else

constexpr int kBitLanes = 16;
using BitVector = __m512i;
inline BitVector load_bits(const std::uint32_t* from) { return _mm512_loadu_si512(from); }
inline BitVector same_bits_in_all(std::uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }

struct BitCounter {
    __m512i sum;
#if SPARSEKERN_LEVEL == 3
    BitCounter() : sum(_mm512_setzero_si512()) {}

    void add(BitVector a, BitVector b) {
        sum = _mm512_add_epi32(sum, _mm512_popcnt_epi32(_mm512_xor_si512(a, b)));
    }
    void flush() {}
#else
    __m512i bytes;

    BitCounter() : sum(_mm512_setzero_si512()), bytes(_mm512_setzero_si512()) {}

    void add(BitVector a, BitVector b) {
        const __m512i table = _mm512_set4_epi32(0x04030302, 0x03020201, 0x03020201, 0x02010100);
        const __m512i half = _mm512_set1_epi8(15), x = _mm512_xor_si512(a, b);
        const __m512i low = _mm512_and_si512(x, half), high = _mm512_and_si512(_mm512_srli_epi32(x, 4), half);
        bytes = _mm512_add_epi8(bytes, _mm512_add_epi8(_mm512_shuffle_epi8(table, low), _mm512_shuffle_epi8(table, high)));
    }
    void flush() {
        const __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi8(1));
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
        bytes = _mm512_setzero_si512();
    }
#endif
    void store(std::int32_t* to) const { _mm512_storeu_si512(to, sum); }
    std::uint64_t below(const std::int32_t* bound) const {
        return _mm512_cmplt_epi32_mask(sum, _mm512_loadu_si512(bound));
    }
};

#endif

// Rows of a, and vectors of a panel, whose counters are held in registers.
#if SPARSEKERN_LEVEL == 3
constexpr int kBitRows = 4, kBitVectors = 4;
#elif SPARSEKERN_LEVEL == 2
constexpr int kBitRows = 2, kBitVectors = 4;
#else
constexpr int kBitRows = 2, kBitVectors = 2;
#endif

// Words between two looks at whether any pair of a tile can still be of use; what the counters' bytes hold.
constexpr std::int64_t kBitWords = 31;

inline std::uint32_t word_at(const std::uint8_t* row, std::int64_t w) {
    std::uint32_t word;
    std::memcpy(&word, row + 4 * w, sizeof word);
    return word;
}

// Differences of `Rows` rows of a with a panel, count [Rows, kBitPanel], and for each row a bit for every one below its
// bound. Where no bit is set the counts are unfinished.
template <int Rows>
void count_panel(const std::uint8_t* const* a, const std::uint32_t* panel, std::int64_t words, const std::int32_t* bound,
                 std::int32_t* count, std::uint64_t* below) {
    std::fill_n(below, Rows, 0);
    constexpr int kLanes = kBitVectors * kBitLanes;
    for (int left = 0; left < kBitPanel; left += kLanes) {
        BitCounter counters[Rows][kBitVectors];
        std::uint64_t found[Rows] = {};
        std::int64_t first = 0;
        do {
            const std::int64_t last = std::min(words, first + kBitWords);
            for (std::int64_t w = first; w < last; ++w) {
                BitVector of[kBitVectors];
                for (int v = 0; v < kBitVectors; ++v) of[v] = load_bits(panel + w * kBitPanel + left + v * kBitLanes);
                for (int r = 0; r < Rows; ++r) {
                    const BitVector mine = same_bits_in_all(word_at(a[r], w));
                    for (int v = 0; v < kBitVectors; ++v) counters[r][v].add(mine, of[v]);
                }
            }
            std::uint64_t any = 0;
            for (int r = 0; r < Rows; ++r) {
                found[r] = 0;
                for (int v = 0; v < kBitVectors; ++v) {
                    counters[r][v].flush();
                    found[r] |= counters[r][v].below(bound + r * kBitPanel + left + v * kBitLanes) << (v * kBitLanes);
                }
                any |= found[r];
            }
            first = any ? last : words;  // counts only grow
        } while (first < words);
        for (int r = 0; r < Rows; ++r) {
            below[r] |= found[r] << left;
            if (found[r])
                for (int v = 0; v < kBitVectors; ++v)
                    counters[r][v].store(count + r * kBitPanel + left + v * kBitLanes);
        }
    }
}

// Rows of b in panels, a block of them at a time.
struct BitPanels {
    const BitRows& b;
    std::int64_t most_panels;  // of a block
    Workspace workspace;
    std::uint32_t* packed;  // [most_panels, words, kBitPanel]; zero where there is no row
    std::int32_t* ones;     // [most_panels * kBitPanel] bits that are set

    static constexpr std::int64_t kBytes = 64 << 20;

    explicit BitPanels(const BitRows& b) : b(b) {
        const std::int64_t all = (b.rows + kBitPanel - 1) / kBitPanel;
        most_panels = std::max<std::int64_t>(1, std::min(all, kBytes / (4 * kBitPanel * std::max<std::int64_t>(1, b.words))));
        packed = workspace.take<std::uint32_t>(most_panels * b.words * kBitPanel);
        ones = workspace.take<std::int32_t>(most_panels * kBitPanel);
    }

    const std::uint32_t* panel(std::int64_t p) const { return packed + p * b.words * kBitPanel; }

    // Packs the rows from `top` on; how many panels there are.
    std::int64_t pack(std::int64_t top, int threads) {
        const std::int64_t rows = std::min(b.rows - top, most_panels * kBitPanel);
        const std::int64_t panels = (rows + kBitPanel - 1) / kBitPanel;
        parallel_for(panels, useful_threads(4.0 * rows * b.words, threads), [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t p = begin; p < end; ++p) {
                std::uint32_t* to = packed + p * b.words * kBitPanel;
                const std::int64_t first = p * kBitPanel, here = std::min(kBitPanel, rows - first);
                if (here < kBitPanel) std::fill_n(to, b.words * kBitPanel, 0);
                // Sixteen words at a time: those of a row are one cache line.
                for (std::int64_t left = 0; left < b.words; left += 16)
                    for (std::int64_t r = 0; r < here; ++r)
                        for (std::int64_t w = left; w < std::min(left + 16, b.words); ++w)
                            to[w * kBitPanel + r] = word_at(b.row(top + first + r), w);
                for (std::int64_t r = 0; r < kBitPanel; ++r) ones[first + r] = 0;
                for (std::int64_t w = 0; w < b.words; ++w)
                    for (std::int64_t r = 0; r < kBitPanel; ++r)
                        ones[first + r] += static_cast<std::int32_t>(ones_in(to[w * kBitPanel + r]));
            }
        });
        return panels;
    }
};

inline std::int32_t count_ones(const BitRows& rows, std::int64_t i) {
    std::int32_t ones = 0;
    for (std::int64_t w = 0; w < rows.words; ++w) ones += static_cast<std::int32_t>(ones_in(word_at(rows.row(i), w)));
    return ones;
}

// What a metric makes of the bits that differ, and of those that are set in both rows together.
struct HammingMetric {
    using Distance = std::int32_t;
    static constexpr bool needs_ones = false;
    static Distance distance(std::int32_t differ, std::int32_t) { return differ; }

    // Counts from here on are no smaller than the distance `worst` of the last of `full` neighbours.
    static void bounds(bool full, Distance worst, std::int32_t, const std::int32_t*, std::int32_t* bound) {
        std::fill_n(bound, kBitPanel, full ? worst : std::numeric_limits<std::int32_t>::max());
    }
};

struct JaccardMetric {
    using Distance = float;
    static constexpr bool needs_ones = true;
    static Distance distance(std::int32_t differ, std::int32_t ones) {
        const std::int32_t together = static_cast<std::int32_t>((static_cast<std::int64_t>(ones) + differ) / 2);
        return together ? static_cast<float>(differ) / static_cast<float>(together) : 0.0f;
    }

    // differ / ((ones + differ) / 2) < worst where differ < ones * worst / (2 - worst). Rounding is allowed for. Disjoint
    // rows, at the largest distance there is, are below no bound once there are enough neighbours.
    static void bounds(bool full, Distance worst, std::int32_t mine, const std::int32_t* ones, std::int32_t* bound) {
        if (full && worst == 0) {
            std::fill_n(bound, kBitPanel, 0);
            return;
        }
        const float factor = full ? worst / (2 - worst) * (1 + 1e-6f) : 1.0f;
        for (std::int64_t i = 0; i < kBitPanel; ++i) {
            const std::int32_t sum = mine + ones[i];
            const std::int32_t reach = static_cast<std::int32_t>(factor * static_cast<float>(sum)) + 1;
            bound[i] = full ? std::min(std::max(sum, 1), reach) : sum + 1;
        }
    }
};

template <class Distance>
struct BitNeighbor {
    Distance distance;
    std::int32_t index;

    bool operator<(const BitNeighbor& other) const {
        return distance != other.distance ? distance < other.distance : index < other.index;
    }
};

// Calls each(row, panel, count, below) for rows of a, [begin, end), and all panels: `Rows` rows at a time while a panel is
// near. bounds(row, panel, bound) says below which count a pair is wanted.
template <class Bounds, class Each>
void meet_panels(const BitRows& a, std::int64_t begin, std::int64_t end, const BitPanels& panels, std::int64_t count,
                 const Bounds& bounds, const Each& each) {
    constexpr std::int64_t kNear = 256 << 10;  // bytes of a that stay in the second-level cache
    const std::int64_t words = a.words;
    const std::int64_t block = std::max<std::int64_t>(kBitRows, kNear / (4 * std::max<std::int64_t>(1, words)));
    alignas(64) std::int32_t bound[kBitRows * kBitPanel], differ[kBitRows * kBitPanel];
    for (std::int64_t top = begin; top < end; top += block)
        for (std::int64_t p = 0; p < count; ++p)
            for (std::int64_t i = top; i < std::min(top + block, end);) {
                const bool whole = i + kBitRows <= std::min(top + block, end);
                const int rows = whole ? kBitRows : 1;
                const std::uint8_t* of[kBitRows];
                std::uint64_t below[kBitRows];
                for (int r = 0; r < rows; ++r) {
                    of[r] = a.row(i + r);
                    bounds(i + r, p, bound + r * kBitPanel);
                }
                if (whole)
                    count_panel<kBitRows>(of, panels.panel(p), words, bound, differ, below);
                else
                    count_panel<1>(of, panels.panel(p), words, bound, differ, below);
                for (int r = 0; r < rows; ++r)
                    if (below[r]) each(i + r, p, differ + r * kBitPanel, below[r]);
                i += rows;
            }
}

template <class Metric>
std::vector<std::int32_t> ones_of(const BitRows& rows, int threads) {
    std::vector<std::int32_t> ones(Metric::needs_ones ? rows.rows : 0);
    parallel_for(static_cast<std::int64_t>(ones.size()), useful_threads(16.0 * rows.rows * rows.words, threads),
                 [&](std::int64_t begin, std::int64_t end) {
                     for (std::int64_t i = begin; i < end; ++i) ones[i] = count_ones(rows, i);
                 });
    return ones;
}

// Of a comparison of all pairs: a lane takes four operations a word, or more.
inline int threads_for(const BitRows& a, const BitRows& b, int threads) {
    return useful_threads(4.0 * a.rows * b.rows * a.words, threads);
}

template <class Metric>
void all_distances(const BitRows& a, const BitRows& b, typename Metric::Distance* out, int threads) {
    BitPanels panels(b);
    const std::vector<std::int32_t> ones = ones_of<Metric>(a, threads);
    threads = threads_for(a, b, threads);
    for (std::int64_t top = 0; top < b.rows; top += panels.most_panels * kBitPanel) {
        const std::int64_t count = panels.pack(top, threads);
        parallel_for(a.rows, threads, 8 * threads, [&](std::int64_t begin, std::int64_t end) {
            const auto all = [](std::int64_t, std::int64_t, std::int32_t* bound) {
                std::fill_n(bound, kBitPanel, std::numeric_limits<std::int32_t>::max());
            };
            meet_panels(a, begin, end, panels, count, all,
                        [&](std::int64_t i, std::int64_t p, const std::int32_t* differ, std::uint64_t) {
                            const std::int64_t first = top + p * kBitPanel, here = std::min(kBitPanel, b.rows - first);
                            const std::int32_t* theirs = panels.ones + p * kBitPanel;
                            const std::int32_t mine = Metric::needs_ones ? ones[i] : 0;
                            for (std::int64_t c = 0; c < here; ++c)
                                out[i * b.rows + first + c] = Metric::distance(differ[c], mine + theirs[c]);
                        });
        });
    }
}

// Enters a neighbour into a heap of up to k, the farthest on top. Those met first win ties.
template <class Distance>
void meet(BitNeighbor<Distance>* heap, std::int64_t& size, std::int64_t k, const BitNeighbor<Distance>& met) {
    if (size < k) {
        heap[size++] = met;
        std::push_heap(heap, heap + size);
    } else if (met.distance < heap[0].distance) {
        std::pop_heap(heap, heap + k);
        heap[k - 1] = met;
        std::push_heap(heap, heap + k);
    }
}

// Out of full heaps.
template <class Distance>
void write_neighbors(std::vector<BitNeighbor<Distance>>& found, std::int64_t k, Distance* distance, std::int32_t* index,
                     int threads) {
    const std::int64_t all = static_cast<std::int64_t>(found.size());
    parallel_for(all / k, useful_threads(20.0 * all, threads), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            std::sort_heap(found.data() + i * k, found.data() + (i + 1) * k);
            for (std::int64_t j = i * k; j < (i + 1) * k; ++j) {
                distance[j] = found[j].distance;
                index[j] = found[j].index;
            }
        }
    });
}

template <class Metric>
void nearest(const BitRows& a, const BitRows& b, std::int64_t k, bool itself, typename Metric::Distance* distance,
             std::int32_t* index, int threads) {
    BitPanels panels(b);
    const std::vector<std::int32_t> ones = ones_of<Metric>(a, threads);
    std::vector<BitNeighbor<typename Metric::Distance>> found(a.rows * k);  // of each row a heap, the worst on top
    std::vector<std::int64_t> size(a.rows, 0);
    threads = threads_for(a, b, threads);
    for (std::int64_t top = 0; top < b.rows; top += panels.most_panels * kBitPanel) {
        const std::int64_t count = panels.pack(top, threads);
        parallel_for(a.rows, threads, 8 * threads, [&](std::int64_t begin, std::int64_t end) {
            const auto bounds = [&](std::int64_t i, std::int64_t p, std::int32_t* bound) {
                const bool full = size[i] == k;
                Metric::bounds(full, full ? found[i * k].distance : 0, Metric::needs_ones ? ones[i] : 0,
                               panels.ones + p * kBitPanel, bound);
            };
            meet_panels(a, begin, end, panels, count, bounds,
                        [&](std::int64_t i, std::int64_t p, const std::int32_t* differ, std::uint64_t below) {
                BitNeighbor<typename Metric::Distance>* heap = found.data() + i * k;
                const std::int64_t first = top + p * kBitPanel;
                const std::int32_t mine = Metric::needs_ones ? ones[i] : 0;
                for (int c = 0; below; ++c, below >>= 1) {  // by rising index, so that a tie changes nothing
                    if (!(below & 1)) continue;
                    const std::int64_t j = first + c;
                    if (j >= b.rows) break;
                    if (j == i && !itself) continue;
                    const auto far = Metric::distance(differ[c], mine + panels.ones[p * kBitPanel + c]);
                    meet(heap, size[i], k, {far, static_cast<std::int32_t>(j)});
                }
            });
        });
    }
    write_neighbors(found, k, distance, index, threads);
}

}  // namespace
}  // namespace sparsekern

#include "bit_slices.inl"

namespace sparsekern {
namespace {

void bit_distances(const BitRows& a, const BitRows& b, BitMetric metric, void* out, int threads) {
    if (metric == BitMetric::hamming)
        all_distances<HammingMetric>(a, b, static_cast<std::int32_t*>(out), threads);
    else
        all_distances<JaccardMetric>(a, b, static_cast<float*>(out), threads);
}

void bit_neighbors(const BitRows& a, const BitRows& b, std::int64_t k, BitMetric metric, bool itself, void* distance,
                   std::int32_t* index, int threads) {
    if (metric == BitMetric::hamming && slices_pay(a, b, k))
        nearest_by_slices<8>(a, b, k, itself, static_cast<std::int32_t*>(distance), index, threads);
    else if (metric == BitMetric::hamming)
        nearest<HammingMetric>(a, b, k, itself, static_cast<std::int32_t*>(distance), index, threads);
    else
        nearest<JaccardMetric>(a, b, k, itself, static_cast<float*>(distance), index, threads);
}

}  // namespace

const BitKernels* SPARSEKERN_JOIN(bit_kernels_, SPARSEKERN_ISA)() {
    static const BitKernels kernels = {bit_distances, bit_neighbors};
    return &kernels;
}

}  // namespace sparsekern
