// The three sparse products against plain loops in double.
#include "cpu/sparse_products.h"

#include "cpu/parallel.h"
#include "native_test.h"

using namespace sparsekern;
using namespace sparsekern::test;

namespace {

// Which latents the slots name: any, or all the last one, which leaves the others empty.
enum class Latents { any, last };

// k slots in every row; or in CSR form as many in all, in lengths from none to 2k, or all in the last row but one.
enum class Rows { even, uneven, one };

struct Case {
    std::int64_t rows, k, d_sae, d;
    std::int64_t weight_stride, grad_stride;
    Latents latents;
    Numbers numbers;
    Rows form = Rows::even;
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
    return out << "rows " << c.rows << ", k " << c.k << ", d_sae " << c.d_sae << ", d " << c.d << ", strides "
               << c.weight_stride << " and " << c.grad_stride
               << (c.latents == Latents::any ? ", any latents" : ", the last latent")
               << (c.numbers == Numbers::whole ? ", whole numbers" : ", real numbers")
               << (c.form == Rows::even ? "" : c.form == Rows::uneven ? ", uneven rows" : ", one row has all");
}

// Runs product(out, threads) on 1 to 4 threads, each into fresh memory: the first result must be what was expected, the
// others the same bits.
template <class T, class Product>
void check_product(const std::string& name, const Case& c, const std::vector<Sum>& expected, Product product) {
    Buffer<T> alone(static_cast<std::int64_t>(expected.size()));
    product(alone.data(), 1);
    for (std::size_t i = 0; i < expected.size(); ++i) {
        const Sum& sum = expected[i];
        // Written so that NaN fails.
        CHECK(std::fabs(alone[i] - sum.value) <= sum.bound<T>(c.numbers),
              name << ", " << type_name<T>() << ", element " << i << " is " << alone[i] << ", expected " << sum.value
                   << " +- " << sum.bound<T>(c.numbers) << "; " << c);
    }
    for (int threads = 2; threads <= 4; ++threads) {
        Buffer<T> shared(alone.size());
        product(shared.data(), threads);
        CHECK(same_bits(alone, shared),
              name << ", " << type_name<T>() << ", other bits on " << threads << " threads than on one; " << c);
    }
}

template <class T>
void check_case(const Case& c) {
    Random random(20261122);
    const std::int64_t slots = c.rows * c.k;
    Buffer<std::int32_t> index(slots);
    Buffer<T> values(slots), bias(c.d);
    Matrix<T> weight(c.d_sae, c.d, c.weight_stride), grad(c.rows, c.d, c.grad_stride);
    for (std::int64_t s = 0; s < slots; ++s)
        index[s] = static_cast<std::int32_t>(c.latents == Latents::any ? random.below(c.d_sae) : c.d_sae - 1);
    fill(values, random, c.numbers);
    fill(bias, random, c.numbers);
    fill(weight, random, c.numbers);
    fill(grad, random, c.numbers);

    Buffer<std::int64_t> crow(c.rows + 1);
    std::vector<std::int64_t> row_of;
    for (std::int64_t b = 0; b < c.rows; ++b) {
        crow[b] = static_cast<std::int64_t>(row_of.size());
        const std::int64_t length = c.form == Rows::even           ? c.k
                                    : c.form == Rows::one          ? (b == std::max<std::int64_t>(0, c.rows - 2)) * slots
                                    : b + 1 < c.rows ? random.below(std::min(2 * c.k, slots - crow[b]) + 1)
                                                     : slots - crow[b];
        row_of.insert(row_of.end(), length, b);
    }
    crow[c.rows] = slots;

    std::vector<Sum> decoded(c.rows * c.d), dots(slots), outer(c.d_sae * c.d);
    for (std::int64_t s = 0; s < slots; ++s) {
        Sum* out = decoded.data() + row_of[s] * c.d;
        Sum* dw = outer.data() + index[s] * c.d;
        const T* w = weight.row(index[s]);
        const T* g = grad.row(row_of[s]);
        const double v = values[s];
        Sum dv;
        for (std::int64_t col = 0; col < c.d; ++col) {
            out[col].add(v * w[col]);
            dv.add(double(w[col]) * g[col]);
            dw[col].add(v * g[col]);
        }
        dots[s] = dv;
    }
    std::vector<Sum> with_bias = decoded;
    for (std::int64_t i = 0; i < c.rows * c.d; ++i) with_bias[i].add(bias[i % c.d]);

    const bool even = c.form == Rows::even;
    const Codes codes = {index.data(), c.rows, even ? c.k : -1, c.d_sae, even ? nullptr : crow.data()};
    const auto tables =
        runnable(sparse_products_generic<T>(), sparse_products_avx2<T>(), sparse_products_avx512<T>());
    for (const auto& [isa, table_] : tables) {
        const SparseProducts<T>& table = *table_;
        check_product<T>(isa + " sparse_decode", c, decoded, [&](T* out, int threads) {
            table.sparse_decode(codes, values.data(), weight.data(), c.weight_stride, nullptr, out, c.d, threads);
        });
        check_product<T>(isa + " sparse_decode with bias", c, with_bias, [&](T* out, int threads) {
            table.sparse_decode(codes, values.data(), weight.data(), c.weight_stride, bias.data(), out, c.d, threads);
        });
        check_product<T>(isa + " gather_dot", c, dots, [&](T* out, int threads) {
            table.gather_dot(codes, weight.data(), c.weight_stride, grad.data(), c.grad_stride, out, c.d, threads);
        });
        check_product<T>(isa + " scatter_outer", c, outer, [&](T* out, int threads) {
            table.scatter_outer(codes, values.data(), grad.data(), c.grad_stride, out, c.d, threads);
        });
    }
}

void check_types(Case c) {
    for (Rows form : {Rows::even, Rows::uneven, Rows::one}) {
        c.form = form;
        check_case<float>(c);
        check_case<double>(c);
    }
}

}  // namespace

NATIVE_TEST(sparse_products_odd_shapes) {
    for (std::int64_t d : {1, 3, 16, 37, 64, 100})
        for (std::int64_t rows : {1, 2, 7, 33})
            for (std::int64_t k : {1, 5})
                for (std::int64_t d_sae : {1, 7, 65, 300}) {
                    if (kThreadSanitizer && d_sae != 65) continue;
                    for (std::int64_t gap : {0, 3})
                        for (Latents latents : {Latents::any, Latents::last})
                            for (Numbers numbers : {Numbers::whole, Numbers::real})
                                check_types({rows, k, d_sae, d, d + gap, d + 2 * gap, latents, numbers});
                }
}

NATIVE_TEST(sparse_products_without_rows_or_slots) {
    for (std::int64_t d : {1, 37}) {
        check_types({0, 5, 7, d, d, d, Latents::any, Numbers::real});
        check_types({3, 0, 7, d, d, d, Latents::any, Numbers::real});
        check_types({0, 0, 0, d, d, d, Latents::any, Numbers::real});
    }
    check_types({3, 5, 7, 0, 0, 0, Latents::any, Numbers::real});
}

NATIVE_TEST(sparse_products_of_one_repeated_row) {
    check_types({7, 5, 65, 37, 0, 37, Latents::any, Numbers::real});
    check_types({7, 5, 65, 37, 37, 0, Latents::any, Numbers::real});
}

// Work for four threads, in many rows and in fewer rows than threads. ThreadSanitizer takes its time here, so there are
// few cases.
NATIVE_TEST(sparse_products_on_threads) {
    struct Size {
        std::int64_t rows, k, d_sae, d;
    };
    for (const Size& size : {Size{521, 21, 1501, 367}, Size{2, 20011, 65, 101}}) {
        CHECK(useful_threads(2.0 * size.rows * size.k * size.d, 4) == 4, "too small to test threads with");
        Case c = {size.rows, size.k, size.d_sae, size.d, size.d + 3, size.d + 6, Latents::any, Numbers::real};
        check_types(c);
        c.latents = Latents::last;
        c.numbers = Numbers::whole;
        for (Rows form : {Rows::even, Rows::one}) {
            c.form = form;
            check_case<float>(c);
        }
    }
}
