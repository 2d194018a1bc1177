// Python bindings of the CPU kernels: sparsekern._native.
//
// No libtorch: functions take addresses, sizes and strides, so one build serves every torch version. Arguments are
// checked in Python, where the tensors are; every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/bits.h"
#include "cpu/cooccurrence.h"
#include "cpu/csr_encode.h"
#include "cpu/isa.h"
#include "cpu/largest.h"
#include "cpu/parallel.h"
#include "cpu/row_adam.h"
#include "cpu/sparse_products.h"
#include "cpu/topk_encode.h"

namespace py = pybind11;
using namespace sparsekern;

namespace {

// The widest instruction set of this machine, or the one that SPARSEKERN_CPU_ISA names.
std::string choose_isa() {
    if (const char* forced = std::getenv("SPARSEKERN_CPU_ISA")) {
        const std::string isa = forced;
        if (isa != "generic" && isa != "avx2" && isa != "avx512")
            throw std::runtime_error("SPARSEKERN_CPU_ISA=" + isa + ": must be generic, avx2 or avx512");
        if (!machine_has(isa)) throw std::runtime_error("SPARSEKERN_CPU_ISA=" + isa + ": this machine has no " + isa);
        return isa;
    }
    for (const char* isa : {"avx512", "avx2"})
        if (machine_has(isa)) return isa;
    return "generic";
}

std::string chosen_isa;  // set once, when the module is imported

template <class T>
const SparseProducts<T>& products() {
    if (chosen_isa == "avx512") return *sparse_products_avx512<T>();
    if (chosen_isa == "avx2") return *sparse_products_avx2<T>();
    return *sparse_products_generic<T>();
}

const TopkEncode& topk() {
    if (chosen_isa == "avx512") return *topk_encode_avx512();
    if (chosen_isa == "avx2") return *topk_encode_avx2();
    return *topk_encode_generic();
}

const CsrEncode& csr() {
    if (chosen_isa == "avx512") return *csr_encode_avx512();
    if (chosen_isa == "avx2") return *csr_encode_avx2();
    return *csr_encode_generic();
}

const RowUpdates& row_updates() {
    if (chosen_isa == "avx512") return *row_updates_avx512();
    if (chosen_isa == "avx2") return *row_updates_avx2();
    return *row_updates_generic();
}

const BitKernels& bits() {
    if (chosen_isa == "avx512") return machine_has("avx512popcnt") ? *bit_kernels_avx512popcnt() : *bit_kernels_avx512();
    if (chosen_isa == "avx2") return *bit_kernels_avx2();
    return *bit_kernels_generic();
}

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// index, rows, k, crow: see Codes.
using Entries = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::uintptr_t>;

Codes codes_at(const Entries& entries, std::int64_t d_sae) {
    const auto [index, rows, k, crow] = entries;
    return {at<const std::int32_t>(index), rows, k, d_sae, at<const std::int64_t>(crow)};
}

// Addresses, or 0 for none: packed, scale, error, norm.
Quantized quantized_at(const std::array<std::uintptr_t, 4>& a) {
    return {at<std::uint8_t>(a[0]), at<float>(a[1]), at<float>(a[2]), at<float>(a[3])};
}

// weight, weight_stride, n, d, quantized, bias, x, x_stride, rows, threads: see EncoderInput.
using Input = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t, std::array<std::uintptr_t, 4>,
                         std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t, int>;

// Calls f with an EncoderInput, whose quantised copy lives as long as the call.
template <class F>
auto with_input(const Input& input, F f) {
    const auto& [weight, weight_stride, n, d, quantized, bias, x, x_stride, rows, threads] = input;
    const Quantized given = quantized_at(quantized);
    return f(EncoderInput{{at<const float>(weight), weight_stride, n, d},
                          given.packed ? &given : nullptr,
                          at<const float>(bias),
                          at<const float>(x),
                          x_stride,
                          rows,
                          threads});
}

// count, active, order, offsets, apart, screened: see Experts; a count of 0 for none.
using Routed = std::tuple<std::int64_t, std::int64_t, std::uintptr_t, std::uintptr_t, bool, bool>;

// start, order, values, k, vectors, stride, row: see OuterProducts.
using Part = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::int64_t, std::uintptr_t, std::int64_t,
                        std::uintptr_t>;

std::vector<OuterProducts> outer_products(const std::vector<Part>& parts) {
    std::vector<OuterProducts> found;
    for (const auto& [start, order, values, k, vectors, stride, row] : parts)
        found.push_back({{at<std::int32_t>(start), at<std::int32_t>(order)}, at<const float>(values), k,
                         at<const float>(vectors), stride, at<const std::int32_t>(row)});
    return found;
}

// bits, rows, words: see BitRows.
using Bits = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;

BitRows bit_rows_at(const Bits& rows) {
    return {at<const std::uint8_t>(std::get<0>(rows)), std::get<1>(rows), std::get<2>(rows)};
}

// Calls f with a value of the element type; `itemsize` is 4 for float32 and 8 for float64.
template <class F>
void with_type(int itemsize, F f) {
    if (itemsize == 4)
        f(float{});
    else if (itemsize == 8)
        f(double{});
    else
        throw std::invalid_argument("itemsize must be 4 (float32) or 8 (float64)");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "CPU kernels. Private: call sparsekern's ops instead.";
    chosen_isa = choose_isa();
    m.def("isa", [] { return chosen_isa; }, "The instruction set that the kernels use.");
    m.def("use_openmp", &use_openmp, "Borrow the threads of the OpenMP library at this path, if it is loaded.");

    m.def(
        "sparse_decode",
        [](int itemsize, const Entries& entries, std::uintptr_t values, std::uintptr_t weight, std::int64_t weight_stride,
           std::uintptr_t bias, std::uintptr_t out, std::int64_t d_sae, std::int64_t d, int threads) {
            with_type(itemsize, [&](auto zero) {
                using T = decltype(zero);
                products<T>().sparse_decode(codes_at(entries, d_sae), at<const T>(values),
                                            at<const T>(weight), weight_stride, at<const T>(bias), at<T>(out), d,
                                            threads);
            });
        },
        py::call_guard<py::gil_scoped_release>());

    m.def(
        "gather_dot",
        [](int itemsize, const Entries& entries, std::uintptr_t weight, std::int64_t weight_stride, std::uintptr_t grad,
           std::int64_t grad_stride, std::uintptr_t out, std::int64_t d_sae, std::int64_t d, int threads) {
            with_type(itemsize, [&](auto zero) {
                using T = decltype(zero);
                products<T>().gather_dot(codes_at(entries, d_sae), at<const T>(weight),
                                         weight_stride, at<const T>(grad), grad_stride, at<T>(out), d, threads);
            });
        },
        py::call_guard<py::gil_scoped_release>());

    m.def(
        "scatter_outer",
        [](int itemsize, const Entries& entries, std::uintptr_t values, std::uintptr_t grad, std::int64_t grad_stride,
           std::uintptr_t out, std::int64_t d_sae, std::int64_t d, int threads) {
            with_type(itemsize, [&](auto zero) {
                using T = decltype(zero);
                products<T>().scatter_outer(codes_at(entries, d_sae), at<const T>(values),
                                            at<const T>(grad), grad_stride, at<T>(out), d, threads);
            });
        },
        py::call_guard<py::gil_scoped_release>());

    m.def("padded_latents", &padded_latents, "Latents that the arrays of a quantised copy cover.");
    m.def("padded_width", &padded_width, "Bytes of a latent in a quantised copy.");

    m.def(
        "quantize",
        [](std::uintptr_t weight, std::int64_t weight_stride, std::int64_t n, std::int64_t d,
           const std::array<std::uintptr_t, 4>& quantized, int threads) {
            const Weights weights{at<const float>(weight), weight_stride, n, d};
            const Quantized out = quantized_at(quantized);
            parallel_for(padded_latents(n) / kGroup, threads, [&](std::int64_t begin, std::int64_t end) {
                topk().quantize(weights, out, begin * kGroup, end * kGroup);
            });
        },
        py::call_guard<py::gil_scoped_release>());

    m.def(
        "topk_encode",
        [](const Input& input, const Routed& routed, std::int64_t k, bool absolute, std::uintptr_t values,
           std::uintptr_t index, std::uintptr_t certain) {
            const auto [count, active, order, offsets, apart, screened] = routed;
            const Experts experts{count,  active, at<const std::int32_t>(order), at<const std::int32_t>(offsets),
                                  apart, screened};
            return with_input(input, [&, some = count != 0](const EncoderInput& given) {
                return topk().encode({given, some ? &experts : nullptr, k, absolute, at<float>(values),
                                      at<std::int32_t>(index), at<std::uint8_t>(certain)});
            });
        },
        py::call_guard<py::gil_scoped_release>(), "Returns the number of candidates rescored.");

    py::class_<ThresholdEntries>(m, "ThresholdEntries", "Entries above a threshold, collected until all are known.")
        .def(py::init<std::int64_t>())
        .def("__len__", &ThresholdEntries::size)
        .def(
            "add_rows",
            [](ThresholdEntries& found, std::uintptr_t rows, std::int64_t count, std::uintptr_t scores, std::int64_t n,
               std::uintptr_t threshold, int threads) {
                found.add_rows(at<const std::int64_t>(rows), count, at<const float>(scores), n,
                               at<const float>(threshold), threads);
            },
            py::call_guard<py::gil_scoped_release>())
        .def(
            "copy",
            [](const ThresholdEntries& found, std::uintptr_t crow, std::uintptr_t col, std::uintptr_t values,
               int threads) {
                found.copy(at<std::int64_t>(crow), at<std::int32_t>(col), at<float>(values), threads);
            },
            py::call_guard<py::gil_scoped_release>());

    m.def(
        "threshold_encode",
        [](const Input& input, std::uintptr_t threshold, ThresholdEntries& found, std::uintptr_t certain) {
            return with_input(input, [&](const EncoderInput& given) {
                return csr().threshold(given, at<const float>(threshold), found, at<std::uint8_t>(certain));
            });
        },
        py::call_guard<py::gil_scoped_release>(), "Returns the number of candidates rescored.");

    py::class_<BatchLargest>(m, "BatchLargest", "The largest scores of a batch, collected until all are known.")
        .def(py::init([](const Input& input, std::int64_t count) {
            return with_input(input, [&](const EncoderInput& given) { return std::make_unique<BatchLargest>(given, count); });
        }))
        .def(
            "add_rows",
            [](BatchLargest& found, std::uintptr_t rows, std::int64_t count, std::uintptr_t scores) {
                return found.add_rows(at<const std::int64_t>(rows), count, at<const float>(scores));
            },
            py::call_guard<py::gil_scoped_release>())
        .def(
            "copy",
            [](BatchLargest& found, std::uintptr_t crow, std::uintptr_t col, std::uintptr_t values) {
                found.copy(at<std::int64_t>(crow), at<std::int32_t>(col), at<float>(values));
            },
            py::call_guard<py::gil_scoped_release>());

    m.def(
        "batch_topk_encode",
        [](const Input& input, BatchLargest& found, std::uintptr_t certain) {
            return with_input(input, [&](const EncoderInput& given) {
                return csr().batch_topk(given, found, at<std::uint8_t>(certain));
            });
        },
        py::call_guard<py::gil_scoped_release>(), "Returns the number of candidates rescored.");

    m.def(
        "largest",
        [](int itemsize, std::uintptr_t values, std::int64_t rows, std::int64_t n, std::int64_t k, std::uintptr_t index,
           int threads) {
            with_type(itemsize, [&](auto zero) {
                using T = decltype(zero);
                largest(at<const T>(values), rows, n, k, at<std::int32_t>(index), threads);
            });
        },
        py::call_guard<py::gil_scoped_release>());

    m.def(
        "sort_slots",
        [](std::uintptr_t index, std::int64_t slots, std::int64_t n, std::uintptr_t start, std::uintptr_t order) {
            sort_slots(at<const std::int32_t>(index), slots, n, {at<std::int32_t>(start), at<std::int32_t>(order)});
        },
        py::call_guard<py::gil_scoped_release>());

    m.def(
        "gradient_squares",
        [](const std::vector<Part>& parts, std::int64_t n, std::int64_t d, std::uintptr_t weight, bool unit_rows,
           std::uintptr_t squares, int threads) {
            const std::vector<OuterProducts> factors = outer_products(parts);
            row_updates().gradient_squares({factors.data(), static_cast<std::int64_t>(factors.size()), n, d,
                                            at<const float>(weight), unit_rows},
                                           at<float>(squares), threads);
        },
        py::call_guard<py::gil_scoped_release>());

    m.def(
        "row_adam",
        [](const std::vector<Part>& parts, std::int64_t n, std::int64_t d, std::uintptr_t weight, bool unit_rows,
           std::uintptr_t mean, std::uintptr_t square, float scale, float rate, float beta1, float beta2, float eps,
           float root, std::uintptr_t last, std::uintptr_t active, std::int32_t step, std::int32_t rest_after,
           const std::array<std::uintptr_t, 4>& quantized, std::uintptr_t squares, int threads) {
            const std::vector<OuterProducts> factors = outer_products(parts);
            const Quantized copy = quantized_at(quantized);
            row_updates().adam({{factors.data(), static_cast<std::int64_t>(factors.size()), n, d,
                                 at<const float>(weight), unit_rows},
                                at<float>(weight), at<float>(mean), at<float>(square), scale, rate, beta1, beta2, eps,
                                root, at<std::int32_t>(last), at<std::int32_t>(active), step, rest_after,
                                copy.packed ? &copy : nullptr, at<float>(squares)},
                               threads);
        },
        py::call_guard<py::gil_scoped_release>());

    m.def(
        "bit_distances",
        [](const Bits& a, const Bits& b, bool jaccard, std::uintptr_t out, int threads) {
            bits().distances(bit_rows_at(a), bit_rows_at(b), jaccard ? BitMetric::jaccard : BitMetric::hamming,
                             at<void>(out), threads);
        },
        py::call_guard<py::gil_scoped_release>());

    m.def(
        "bit_neighbors",
        [](const Bits& a, const Bits& b, std::int64_t k, bool jaccard, bool itself, std::uintptr_t distance,
           std::uintptr_t index, int threads) {
            bits().neighbors(bit_rows_at(a), bit_rows_at(b), k, jaccard ? BitMetric::jaccard : BitMetric::hamming,
                             itself, at<void>(distance), at<std::int32_t>(index), threads);
        },
        py::call_guard<py::gil_scoped_release>());

    py::class_<Cooccurrences>(m, "Cooccurrences", "Pairs of latents, collected until all are known.")
        .def(py::init([](const Entries& entries, std::int64_t d_sae, std::int64_t at_least, int threads) {
                 return std::make_unique<Cooccurrences>(codes_at(entries, d_sae), at_least, threads);
             }),
             py::call_guard<py::gil_scoped_release>())
        .def("__len__", &Cooccurrences::size)
        .def(
            "copy",
            [](const Cooccurrences& found, std::uintptr_t crow, std::uintptr_t col, std::uintptr_t counts, int threads) {
                found.copy(at<std::int64_t>(crow), at<std::int32_t>(col), at<std::int32_t>(counts), threads);
            },
            py::call_guard<py::gil_scoped_release>());
}
