// Adam over factored gradients against plain loops in double.
#include "cpu/row_adam.h"

#include "cpu/topk_encode.h"

#include "native_test.h"

using namespace sparsekern;
using namespace sparsekern::test;

namespace {

// `uneven`: slots belong to rows by chance, as the entries of codes in CSR form do, and none to some rows.
struct Part {
    Buffer<std::int32_t> index, start, order, row;
    Buffer<float> values;
    Matrix<float> vectors;
    std::int64_t k;

    bool uneven;

    Part(std::int64_t rows, std::int64_t k, std::int64_t n, std::int64_t d, Random& random, bool uneven = false)
        : index(rows * k),
          start(n + 1),
          order(rows * k),
          row(rows * k),
          values(rows * k),
          vectors(rows, d, d + 3),
          k(k),
          uneven(uneven) {
        for (std::int64_t s = 0; s < rows * k; ++s) {
            index[s] = static_cast<std::int32_t>(random.below((n + 1) / 2));
            row[s] = static_cast<std::int32_t>(uneven ? random.below(rows) : s / k);
        }
        std::sort(row.data(), row.data() + rows * k);
        fill(values, random, Numbers::real);
        fill(vectors, random, Numbers::real);
        sort_slots(index.data(), rows * k, n, {start.data(), order.data()});
    }
    OuterProducts view() {
        return {{start.data(), order.data()}, values.data(), uneven ? 0 : k,       vectors.data(),
                vectors.stride,               uneven ? row.data() : nullptr};
    }
};

void check_case(std::int64_t rows, std::int64_t k, std::int64_t n, std::int64_t d, bool unit_rows, int most_threads,
                bool uneven = false) {
    Random random(11);
    Part first(rows, k, n, d, random, uneven), second(2, 1, n, d, random);
    const std::vector<OuterProducts> parts = {first.view(), second.view()};
    std::vector<float> weight(n * d), mean(n * d), square(n * d);
    for (float& w : weight) w = static_cast<float>(draw(random, Numbers::real));
    for (float& m : mean) m = static_cast<float>(draw(random, Numbers::real));
    for (float& v : square) v = static_cast<float>(random.unit() + 0.1);

    const double beta1 = 0.9, beta2 = 0.99, eps = 1e-3, scale = 0.5, rate = 0.1, root = 0.7;
    std::vector<double> expected(n * d);
    double total = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        std::vector<double> g(d, 0);
        double along = 0, norm = 0;
        for (Part* part : {&first, &second})
            for (std::int64_t s = 0; s < part->index.size(); ++s)
                if (part->index[s] == i)
                    for (std::int64_t c = 0; c < d; ++c)
                        g[c] += double(part->values[s]) * part->vectors.row(part->row[s])[c];
        for (std::int64_t c = 0; c < d; ++c) along += g[c] * weight[i * d + c];
        for (std::int64_t c = 0; c < d; ++c) {
            if (unit_rows) g[c] -= along * weight[i * d + c];
            total += g[c] * g[c];
            const double m = beta1 * mean[i * d + c] + (1 - beta1) * scale * g[c];
            const double v = beta2 * square[i * d + c] + (1 - beta2) * scale * scale * g[c] * g[c];
            expected[i * d + c] = weight[i * d + c] - rate * m / (std::sqrt(v) / root + eps);
            norm += expected[i * d + c] * expected[i * d + c];
        }
        if (unit_rows)
            for (std::int64_t c = 0; c < d; ++c) expected[i * d + c] /= std::sqrt(norm);
    }

    const auto encoders = runnable(topk_encode_generic(), topk_encode_avx2(), topk_encode_avx512());
    const auto tables = runnable(row_updates_generic(), row_updates_avx2(), row_updates_avx512());
    for (std::size_t t = 0; t < tables.size(); ++t) {
        Buffer<float> alone(n * d);
        for (int threads = 1; threads <= most_threads; ++threads) {
            Buffer<float> w(n * d), m(n * d), v(n * d), squares(n), again(n);
            std::copy(weight.begin(), weight.end(), w.data());
            std::copy(mean.begin(), mean.end(), m.data());
            std::copy(square.begin(), square.end(), v.data());
            Buffer<std::uint8_t> packed(padded_latents(n) * padded_width(d));
            Buffer<float> scales(padded_latents(n)), errors(padded_latents(n)), norms(padded_latents(n));
            const Quantized copy{packed.data(), scales.data(), errors.data(), norms.data()};
            encoders[t].second->quantize({weight.data(), d, n, d}, copy, 0, padded_latents(n));
            const RowGradient gradient{parts.data(), 2, n, d, w.data(), unit_rows};
            tables[t].second->gradient_squares(gradient, squares.data(), threads);
            const std::string where = tables[t].first + ", threads " + std::to_string(threads) + ", d " +
                                      std::to_string(d) + ", n " + std::to_string(n);
            double sum = 0;
            for (std::int64_t i = 0; i < n; ++i) sum += squares[i];
            CHECK(std::fabs(sum - total) <= 1e-4 * (1 + total), where << ": squares " << sum << ", not " << total);
            tables[t].second->adam({gradient, w.data(), m.data(), v.data(), scale, rate, beta1, beta2, eps, root, nullptr,
                                    nullptr, 1, 0, &copy, again.data()},
                                   threads);
            CHECK(same_bits(squares, again), where << ": other squares with the update");
            for (std::int64_t c = 0; c < n * d; ++c)
                CHECK(std::fabs(w[c] - expected[c]) <= 1e-4, where << ", element " << c << ": " << w[c] << ", expected "
                                                                   << expected[c]);
            if (threads == 1) {
                std::copy(w.data(), w.data() + n * d, alone.data());
            } else {
                CHECK(same_bits(alone, w), where << ": other bits than on one thread");
            }
            Buffer<std::uint8_t> fresh(packed.size());
            Buffer<float> scale2(norms.size()), error2(norms.size()), norm2(norms.size());
            encoders[t].second->quantize({w.data(), d, n, d}, {fresh.data(), scale2.data(), error2.data(), norm2.data()},
                                         0, padded_latents(n));
            CHECK(same_bits(packed, fresh) && same_bits(norms, norm2), where << ": the copy is not that of the weight");
        }
    }
}

}  // namespace

NATIVE_TEST(row_adam_odd_shapes) {
    for (std::int64_t d : {1, 37, 64, 130})
        for (std::int64_t n : {1, 15, 100})
            for (bool unit_rows : {false, true})
                if (!kThreadSanitizer || n == 100)
                    for (bool uneven : {false, true}) check_case(9, 3, n, d, unit_rows, 1, uneven);
}

NATIVE_TEST(row_adam_on_threads) {
    check_case(40, 6, 200, 70, true, 4);
    check_case(40, 6, 203, 33, false, 3);
    check_case(40, 6, 203, 70, true, 4, true);
}

NATIVE_TEST(row_adam_lets_idle_rows_rest) {
    const std::int64_t n = 40, d = 5;
    for (const auto& [isa, table] : runnable(row_updates_generic(), row_updates_avx2(), row_updates_avx512())) {
        Random random(5);
        Buffer<float> w(n * d), m(n * d), v(n * d);
        fill(w, random, Numbers::real);
        std::fill_n(m.data(), n * d, 1.0f);
        std::fill_n(v.data(), n * d, 1.0f);
        Buffer<std::int32_t> last(n), active(n);
        std::fill_n(last.data(), n, 0);
        std::fill_n(active.data(), n, 0);
        for (std::int32_t step = 1; step <= 4; ++step) {
            const std::vector<float> before(w.data(), w.data() + n * d);
            Part part(3, 2, n, d, random);
            const std::vector<OuterProducts> parts = {part.view()};
            table->adam({{parts.data(), 1, n, d, w.data(), false}, w.data(), m.data(), v.data(), 1, 0.1f, 0.9f, 0.99f,
                         1e-8f, 1, last.data(), active.data(), step, 2, nullptr, nullptr},
                        2);
            for (std::int64_t i = 0; i < n; ++i) {
                const bool moved = !std::equal(before.begin() + i * d, before.begin() + (i + 1) * d, w.data() + i * d);
                CHECK(moved == (step - active[i] < 2), isa << ", step " << step << ", row " << i);
                CHECK((last[i] == step) == moved, isa << ", step " << step << ", row " << i);
            }
        }
    }
}
