// The screened encoders in CSR form against plain loops. Scores are whole numbers and so exact in any order.
#include "cpu/csr_encode.h"

#include "cpu/topk_encode.h"
#include "native_test.h"

using namespace sparsekern;
using namespace sparsekern::test;

namespace {

struct Case {
    std::int64_t rows, n, d, k, gap;
    bool bias, copy, huge;  // a row 300 times the others
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
    return out << "rows " << c.rows << ", n " << c.n << ", d " << c.d << ", k " << c.k << ", gap " << c.gap << ", bias "
               << c.bias << ", copy " << c.copy << ", huge " << c.huge;
}

struct Entry {
    std::int64_t row;
    std::int32_t latent;
    float value;
};

// What an encoder left: entries by row and latent.
struct Result {
    Buffer<std::int64_t> crow;
    Buffer<std::int32_t> col;
    Buffer<float> values;

    Result(std::int64_t rows, std::int64_t size) : crow(rows + 1), col(size), values(size) {}

    void check(const std::vector<Entry>& expected, const std::string& where, const Case& c) const {
        CHECK(col.size() == static_cast<std::int64_t>(expected.size()),
              where << ": " << col.size() << " entries, expected " << expected.size() << "; " << c);
        CHECK(crow[0] == 0 && crow[c.rows] == col.size(), where << ": rows from " << crow[0] << " to " << crow[c.rows]);
        for (std::int64_t b = 0, e = 0; b < c.rows; ++b)
            for (; e < crow[b + 1]; ++e)
                CHECK(expected[e].row == b && expected[e].latent == col[e] && expected[e].value == values[e],
                      where << ", entry " << e << " is row " << b << ", latent " << col[e] << ", value " << values[e]
                            << "; expected " << expected[e].row << ", " << expected[e].latent << ", "
                            << expected[e].value << "; " << c);
    }
};

void check_case(const Case& c, int most_threads) {
    Random random(7);
    Matrix<float> weight(c.n, c.d, c.d + c.gap), x(c.rows, c.d, c.d + 2 * c.gap);
    Buffer<float> bias(c.n), threshold(c.n), scores(c.rows * c.n);
    fill(weight, random, Numbers::whole);
    fill(x, random, Numbers::whole);
    fill(bias, random, Numbers::whole);
    for (std::int64_t i = 0; i < c.n; ++i) threshold[i] = static_cast<float>(10 * draw(random, Numbers::whole));
    if (c.huge)
        for (std::int64_t j = 0; j < c.d; ++j) x.row(c.rows / 2)[j] *= 300;

    std::vector<Entry> all, above, largest;
    for (std::int64_t b = 0; b < c.rows; ++b)
        for (std::int64_t i = 0; i < c.n; ++i) {
            double score = c.bias ? bias[i] : 0;
            for (std::int64_t j = 0; j < c.d; ++j) score += double(weight.row(i)[j]) * x.row(b)[j];
            scores[b * c.n + i] = static_cast<float>(score);
            all.push_back({b, static_cast<std::int32_t>(i), static_cast<float>(score)});
            if (score > threshold[i]) above.push_back(all.back());
        }
    std::stable_sort(all.begin(), all.end(), [](const Entry& a, const Entry& b) { return a.value > b.value; });
    largest.assign(all.begin(), all.begin() + c.rows * c.k);
    std::sort(largest.begin(), largest.end(), [](const Entry& a, const Entry& b) {
        return a.row < b.row || (a.row == b.row && a.latent < b.latent);
    });
    for (Entry& entry : largest) entry.value = std::max(entry.value, 0.0f);

    const auto encoders = runnable(topk_encode_generic(), topk_encode_avx2(), topk_encode_avx512());
    const auto tables = runnable(csr_encode_generic(), csr_encode_avx2(), csr_encode_avx512());
    for (std::size_t t = 0; t < tables.size(); ++t) {
        const Weights weights{weight.data(), weight.stride, c.n, c.d};
        Buffer<std::uint8_t> packed(padded_latents(c.n) * padded_width(c.d));
        Buffer<float> scale(padded_latents(c.n)), error(padded_latents(c.n)), norm(padded_latents(c.n));
        const Quantized copy{packed.data(), scale.data(), error.data(), norm.data()};
        encoders[t].second->quantize(weights, copy, 0, padded_latents(c.n));
        for (int threads = 1; threads <= most_threads; ++threads) {
            const std::string where = tables[t].first + ", threads " + std::to_string(threads);
            const EncoderInput input{
                weights, c.copy ? &copy : nullptr, c.bias ? bias.data() : nullptr, x.data(), x.stride, c.rows, threads};
            // Rows that are not certain are added in full; so are all of them, to see that this makes no difference.
            for (bool in_full : {false, true}) {
                Buffer<std::uint8_t> certain(c.rows);
                ThresholdEntries found(c.rows);
                BatchLargest best(input, c.rows * c.k);
                if (!in_full) tables[t].second->threshold(input, threshold.data(), found, certain.data());
                for (std::int64_t b = 0; b < c.rows; ++b)
                    if (in_full || !certain[b])
                        found.add_rows(&b, 1, scores.data() + b * c.n, c.n, threshold.data(), threads);
                Result passing(c.rows, found.size());
                found.copy(passing.crow.data(), passing.col.data(), passing.values.data(), threads);
                passing.check(above, where + ", threshold", c);

                if (in_full)
                    best.bound_weights(norm.data());
                else
                    tables[t].second->batch_topk(input, best, certain.data());
                for (std::int64_t b = 0; b < c.rows; ++b)
                    if (in_full || !certain[b])
                        CHECK(best.add_rows(&b, 1, scores.data() + b * c.n), where << "; " << c);
                Result kept(c.rows, c.rows * c.k);
                best.copy(kept.crow.data(), kept.col.data(), kept.values.data());
                kept.check(largest, where + ", batch", c);
            }
        }
    }
}

}  // namespace

NATIVE_TEST(csr_encode_odd_shapes) {
    for (std::int64_t d : {1, 3, 37, 64, 130})
        for (std::int64_t n : {1, 63, 64, 300})
            for (std::int64_t rows : {1, 7}) {
                if (kThreadSanitizer && (n != 300 || d != 37)) continue;
                for (std::int64_t k : {std::int64_t{1}, (n + 1) / 2, n})
                    for (bool copy : {false, true}) check_case({rows, n, d, k, copy ? 5 : 0, copy, !copy, copy}, 1);
            }
}

NATIVE_TEST(csr_encode_on_threads) {
    check_case({61, 1500, 70, 9, 3, true, true, true}, 4);
    check_case({61, 1500, 70, 9, 0, false, false, false}, 3);
}

// More rows than there is room for at one time, and more candidates in one than there is room for.
NATIVE_TEST(csr_encode_overflows) {
    if (!kThreadSanitizer) check_case({53000, 10, 2, 3, 0, true, false, true}, 1);
    check_case({12, 9000, 6, 600, 0, true, true, true}, 2);
}

NATIVE_TEST(csr_encode_reports_rows_that_it_cannot_answer_for) {
    const std::int64_t n = 9000, d = 8, rows = 5;
    Matrix<float> weight(n, d, d), x(rows, d, d);
    Random random(3);
    fill(weight, random, Numbers::real);
    fill(x, random, Numbers::real);
    Buffer<float> threshold(n), scores(n);
    std::fill_n(threshold.data(), n, -1e6f);  // everything passes
    std::fill_n(scores.data(), n, 0.0f);
    scores[7] = std::numeric_limits<float>::infinity();
    x.row(2)[1] = std::numeric_limits<float>::infinity();
    for (const auto& [isa, table] : runnable(csr_encode_generic(), csr_encode_avx2(), csr_encode_avx512())) {
        const EncoderInput input{{weight.data(), d, n, d}, nullptr, nullptr, x.data(), d, rows, 2};
        Buffer<std::uint8_t> certain(rows);
        ThresholdEntries found(rows);
        table->threshold(input, threshold.data(), found, certain.data());
        for (std::int64_t b = 0; b < rows; ++b) CHECK(certain[b] == 0, isa << ", row " << b);
        CHECK(found.size() == 0, isa << ": " << found.size() << " entries of rows that are not certain");
        BatchLargest best(input, rows * 3);
        table->batch_topk(input, best, certain.data());
        for (std::int64_t b = 0; b < rows; ++b) CHECK((certain[b] == 0) == (b == 2), isa << ", row " << b);
        const std::int64_t row = 2;
        CHECK(!best.add_rows(&row, 1, scores.data()), isa << ": a score that is not finite has no place in the order");
    }
}
