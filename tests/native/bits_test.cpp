// Distances between rows of bits and the nearest rows, against counting bit by bit.
#include "cpu/bits.h"

#include "cpu/parallel.h"
#include "native_test.h"

#include <bitset>

using namespace sparsekern;
using namespace sparsekern::test;

namespace {

struct Case {
    std::int64_t rows, others, words;
    int percent;  // of the bits that are set
    std::int64_t k;
    bool itself;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
    return out << "rows " << c.rows << " and " << c.others << ", words " << c.words << ", percent " << c.percent << ", k "
               << c.k << (c.itself ? "" : ", not itself");
}

void fill(Buffer<std::uint8_t>& rows, Random& random, const Case& c) {
    for (std::int64_t i = 0; i < rows.size(); ++i) {
        rows[i] = 0;
        for (int bit = 0; bit < 8; ++bit) rows[i] |= static_cast<std::uint8_t>((random.below(100) < c.percent) << bit);
    }
    if (rows.size() >= 8 * c.words) {  // an empty row and two that are the same
        std::fill_n(rows.data() + 4 * c.words, 4 * c.words, std::uint8_t{0});
        std::copy_n(rows.data(), 4 * c.words, rows.data() + rows.size() - 4 * c.words);
    }
}

template <class T>
struct Expected {
    Buffer<T> distance;
    Buffer<std::int32_t> index;
    std::vector<T> all;
};

template <class T>
Expected<T> expect(const BitRows& a, const BitRows& b, const Case& c) {
    Expected<T> out{Buffer<T>(a.rows * c.k), Buffer<std::int32_t>(a.rows * c.k), {}};
    for (std::int64_t i = 0; i < a.rows; ++i) {
        std::vector<std::pair<T, std::int32_t>> found;
        for (std::int64_t j = 0; j < b.rows; ++j) {
            std::int32_t differ = 0, either = 0;
            for (std::int64_t w = 0; w < 4 * a.words; ++w) {
                const std::bitset<8> x = a.row(i)[w], y = b.row(j)[w];
                differ += static_cast<std::int32_t>((x ^ y).count());
                either += static_cast<std::int32_t>((x | y).count());
            }
            out.all.push_back(sizeof(T) && std::numeric_limits<T>::is_integer ? static_cast<T>(differ)
                              : either ? static_cast<T>(differ) / static_cast<T>(either)
                                       : T(0));
            if (c.itself || i != j) found.push_back({out.all.back(), static_cast<std::int32_t>(j)});
        }
        std::sort(found.begin(), found.end());
        for (std::int64_t j = 0; j < c.k; ++j) {
            out.distance[i * c.k + j] = found[j].first;
            out.index[i * c.k + j] = found[j].second;
        }
    }
    return out;
}

template <class T>
void check_metric(const BitRows& a, const BitRows& b, BitMetric metric, const Case& c) {
    const Expected<T> expected = expect<T>(a, b, c);
    auto tables = runnable(bit_kernels_generic(), bit_kernels_avx2(), bit_kernels_avx512());
    if (bit_kernels_avx512popcnt() && machine_has("avx512popcnt"))
        tables.push_back({"avx512popcnt", bit_kernels_avx512popcnt()});
    for (const auto& [isa, table] : tables)
        for (int threads = 1; threads <= 3; threads += 2) {
            Buffer<T> all(a.rows * b.rows), distance(a.rows * c.k);
            Buffer<std::int32_t> index(a.rows * c.k);
            table->distances(a, b, metric, all.data(), threads);
            for (std::int64_t i = 0; i < all.size(); ++i)
                CHECK(all[i] == expected.all[i], isa << ", distance " << i << " is " << all[i] << "; " << c);
            table->neighbors(a, b, c.k, metric, c.itself, distance.data(), index.data(), threads);
            for (std::int64_t i = 0; i < index.size(); ++i)
                CHECK(index[i] == expected.index[i] && distance[i] == expected.distance[i],
                      isa << ", neighbour " << i << " is " << index[i] << " at " << distance[i] << ", expected "
                          << expected.index[i] << " at " << expected.distance[i] << "; " << c);
        }
}

void check_case(const Case& c) {
    Random random(20261123);
    Buffer<std::uint8_t> a(4 * c.rows * c.words), b(4 * c.others * c.words);
    fill(a, random, c);
    fill(b, random, c);
    const BitRows mine = {a.data(), c.rows, c.words};
    const BitRows theirs = {c.itself ? b.data() : a.data(), c.itself ? c.others : c.rows, c.words};
    check_metric<std::int32_t>(mine, theirs, BitMetric::hamming, c);
    check_metric<float>(mine, theirs, BitMetric::jaccard, c);
}

}  // namespace

NATIVE_TEST(bits_odd_shapes) {
    for (std::int64_t rows : {1, 5, 33, 40})
        for (std::int64_t others : {1, 64, 600})
            for (std::int64_t words : {1, 3, 37})
                for (int percent : {1, 50}) {
                    if (kThreadSanitizer && (words != 3 || percent != 1)) continue;
                    for (std::int64_t k : {std::int64_t{1}, std::min<std::int64_t>(others, 9)})
                        check_case({rows, others, words, percent, k, true});
                }
}

NATIVE_TEST(bits_without_rows_or_words) {
    check_case({0, 5, 3, 50, 2, true});
    check_case({3, 5, 0, 50, 2, true});
    check_case({40, 70, 0, 50, 2, true});
}

NATIVE_TEST(bits_among_themselves) {
    check_case({2, 2, 3, 50, 1, false});
    check_case({90, 90, 2, 5, 89, false});
    check_case({300, 300, 33, 30, 5, false});
}

// Many long rows, for which the kernels go through slices of bits; neither count is a multiple of what they take at a time.
NATIVE_TEST(bits_in_slices) {
    check_case({517, 1030, 65, 50, 8, true});
    if (!kThreadSanitizer) check_case({33, 1030, 1000, 3, 1, true});
}
