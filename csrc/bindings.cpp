// Python bindings of the CPU kernels: sparsekern._native.
//
// No libtorch: functions take addresses, sizes and strides, so one build serves every torch version. Arguments are
// checked in Python, where the tensors are; every call releases the GIL.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/sparse_products.h"

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

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
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
        [](int itemsize, std::uintptr_t index, std::uintptr_t values, std::uintptr_t weight, std::int64_t weight_stride,
           std::uintptr_t bias, std::uintptr_t out, std::int64_t rows, std::int64_t k, std::int64_t d_sae,
           std::int64_t d, int threads) {
            with_type(itemsize, [&](auto zero) {
                using T = decltype(zero);
                products<T>().sparse_decode({at<const std::int32_t>(index), rows, k, d_sae}, at<const T>(values),
                                            at<const T>(weight), weight_stride, at<const T>(bias), at<T>(out), d,
                                            threads);
            });
        },
        py::call_guard<py::gil_scoped_release>());

    m.def(
        "gather_dot",
        [](int itemsize, std::uintptr_t index, std::uintptr_t weight, std::int64_t weight_stride, std::uintptr_t grad,
           std::int64_t grad_stride, std::uintptr_t out, std::int64_t rows, std::int64_t k, std::int64_t d_sae,
           std::int64_t d, int threads) {
            with_type(itemsize, [&](auto zero) {
                using T = decltype(zero);
                products<T>().gather_dot({at<const std::int32_t>(index), rows, k, d_sae}, at<const T>(weight),
                                         weight_stride, at<const T>(grad), grad_stride, at<T>(out), d, threads);
            });
        },
        py::call_guard<py::gil_scoped_release>());

    m.def(
        "scatter_outer",
        [](int itemsize, std::uintptr_t index, std::uintptr_t values, std::uintptr_t grad, std::int64_t grad_stride,
           std::uintptr_t out, std::int64_t rows, std::int64_t k, std::int64_t d_sae, std::int64_t d, int threads) {
            with_type(itemsize, [&](auto zero) {
                using T = decltype(zero);
                products<T>().scatter_outer({at<const std::int32_t>(index), rows, k, d_sae}, at<const T>(values),
                                            at<const T>(grad), grad_stride, at<T>(out), d, threads);
            });
        },
        py::call_guard<py::gil_scoped_release>());
}
