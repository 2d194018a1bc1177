// Python bindings of the CUDA kernels: sparsekern._cuda, or, from a plain C++ compiler, _cuda_emulated.
//
// No libtorch: functions take addresses, sizes, strides and the handle of a stream, so one build serves every torch
// version. Arguments are checked in Python, where the tensors are; every call releases the GIL, and none waits for the
// device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/by_latent.h"
#include "cuda/device.h"
#include "cuda/row_adam.h"

namespace py = pybind11;
using namespace sparsekern::cuda;

#if defined(__CUDACC__)
#define SPARSEKERN_MODULE _cuda
#else
#define SPARSEKERN_MODULE _cuda_emulated
#endif

// What the build was asked for: 80,90a.
#if !defined(SPARSEKERN_CUDA_ARCHS)
#define SPARSEKERN_CUDA_ARCHS
#endif
#define SPARSEKERN_TEXT(...) #__VA_ARGS__
#define SPARSEKERN_EXPANDED_TEXT(...) SPARSEKERN_TEXT(__VA_ARGS__)

namespace {

template <class T>
[[maybe_unused]] T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

[[maybe_unused]] Stream stream_at(std::uintptr_t handle) { return reinterpret_cast<Stream>(handle); }

using Released = py::call_guard<py::gil_scoped_release>;

std::vector<std::string> architectures() {
    std::istringstream list(SPARSEKERN_EXPANDED_TEXT(SPARSEKERN_CUDA_ARCHS));
    std::vector<std::string> all;
    for (std::string one; std::getline(list, one, ',');) all.push_back(one);
    return all;
}

#if defined(__CUDACC__)

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// The driver's version and how many devices it has, or why there are none.
std::string driver() {
    int number = 0, devices = 0;
    if (cudaDriverGetVersion(&number) != cudaSuccess || number == 0) return "no driver";
    const cudaError_t status = cudaGetDeviceCount(&devices);
    (void)cudaGetLastError();  // of the call above, if it failed
    const std::string here = status == cudaSuccess ? std::to_string(devices) + (devices == 1 ? " device" : " devices")
                                                   : std::string("no device (") + cudaGetErrorString(status) + ")";
    return "driver for CUDA " + version(number) + ", " + here;
}

py::dict device_info() {
    using namespace py::literals;
    const std::string nvcc = std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
    return py::dict("architectures"_a = architectures(), "nvcc"_a = nvcc, "runtime"_a = version(CUDART_VERSION),
                    "driver"_a = driver());
}

#else

py::dict device_info() {
    using namespace py::literals;
    return py::dict("architectures"_a = architectures(), "nvcc"_a = "none", "runtime"_a = "emulator",
                    "driver"_a = "emulator");
}

#endif

// The update of the weights

// Addresses of values and vectors, the stride of these, start, order, row_of, piece_start, pieces; k.
using ProductArgs = std::tuple<std::uintptr_t, std::uintptr_t, std::int64_t, std::uintptr_t, std::uintptr_t,
                               std::uintptr_t, std::uintptr_t, std::uintptr_t, std::int32_t>;

// Sums, entries of a piece, n, d, slice; the address of the weight, whether its rows are unit rows, and the addresses
// of `needed` and `squares`.
using GradientArgs = std::tuple<std::vector<ProductArgs>, std::int32_t, std::int64_t, std::int32_t, std::int32_t,
                                std::uintptr_t, bool, std::uintptr_t, std::uintptr_t>;

// ElementType and address of the rounded rows, limit, addresses of scales, norms and errors.
using CopyArgs = std::tuple<int, std::uintptr_t, float, std::uintptr_t, std::uintptr_t, std::uintptr_t>;

OuterProducts product_of(const ProductArgs& args) {
    const auto& [values, vectors, stride, start, order, row_of, piece_start, pieces, k] = args;
    return {at<const float>(values),
            at<const float>(vectors),
            stride,
            at<const std::int32_t>(start),
            at<const std::int32_t>(order),
            at<const std::int32_t>(row_of),
            at<const std::int32_t>(piece_start),
            at<const float>(pieces),
            k};
}

RowGradient gradient_of(const GradientArgs& args) {
    const auto& [sums, split, n, d, slice, weight, unit_rows, needed, squares] = args;
    if (sums.size() > kMostSums) throw std::invalid_argument("at most 4 sums of outer products");
    RowGradient gradient{};
    gradient.count = static_cast<std::int32_t>(sums.size());
    for (std::size_t i = 0; i < sums.size(); ++i) gradient.sums[i] = product_of(sums[i]);
    gradient.split = split;
    gradient.n = n;
    gradient.d = d;
    gradient.slice = slice;
    gradient.weight = at<const float>(weight);
    gradient.unit_rows = unit_rows;
    gradient.needed = at<const std::uint8_t>(needed);
    gradient.squares = at<float>(squares);
    return gradient;
}

void bind_sort_by_latent(std::uintptr_t latent, std::int64_t entries, std::int64_t d_sae, std::int64_t split,
                         const std::array<std::uintptr_t, 4>& out, std::uintptr_t workspace, std::uintptr_t stream) {
    const EntriesByLatent to{at<std::int32_t>(out[0]), at<std::int32_t>(out[1]), at<std::int32_t>(out[2]),
                             at<std::int32_t>(out[3])};
    sort_by_latent(at<const std::int32_t>(latent), entries, d_sae, split, to, at<void>(workspace), stream_at(stream));
}

void bind_sum_pieces(const ProductArgs& product, std::uintptr_t piece_latent, std::int64_t pieces, std::int64_t n,
                     std::int32_t d, std::int32_t split, std::int32_t slice, std::uintptr_t sums,
                     std::uintptr_t stream) {
    sum_pieces(product_of(product), at<const std::int32_t>(piece_latent), pieces, n, d, split, slice, at<float>(sums),
               stream_at(stream));
}

void bind_bound_rows(const GradientArgs& gradient, const std::vector<std::uintptr_t>& norms, std::uintptr_t bounds,
                     std::uintptr_t stream) {
    const RowGradient of = gradient_of(gradient);
    std::vector<const float*> lengths;
    for (const std::uintptr_t norm : norms) lengths.push_back(at<const float>(norm));
    lengths.resize(kMostSums);
    bound_rows(of, lengths.data(), at<float>(bounds), stream_at(stream));
}

// `workspace`: its address, and how many rows it has.
void bind_gradient_squares(const GradientArgs& gradient, const std::tuple<std::uintptr_t, std::int64_t>& workspace,
                           std::uintptr_t stream) {
    const auto& [rows, count] = workspace;
    gradient_squares(gradient_of(gradient), {at<float>(rows), count}, stream_at(stream));
}

void bind_gradient_rows(const GradientArgs& gradient, std::uintptr_t rows, std::uintptr_t stream) {
    gradient_rows(gradient_of(gradient), at<float>(rows), stream_at(stream));
}

// `arrays`: addresses of the weight, both moments and the hyperparameters.
void bind_row_adam(const GradientArgs& gradient, const std::array<std::uintptr_t, 4>& arrays,
                   const std::array<float, 2>& rates, float eps, const std::optional<CopyArgs>& copy,
                   const std::tuple<std::uintptr_t, std::int64_t>& workspace, std::uintptr_t stream) {
    AdamStep step{at<float>(arrays[0]), at<float>(arrays[1]), at<float>(arrays[2]), at<const float>(arrays[3]),
                  rates[0], rates[1], eps, {}};
    if (copy) {
        const auto& [type, rows, limit, scale, norm, error] = *copy;
        step.copy = {static_cast<ElementType>(type), at<void>(rows), limit, at<float>(scale), at<float>(norm),
                     at<float>(error)};
    }
    const auto& [room, count] = workspace;
    row_adam(gradient_of(gradient), step, {at<float>(room), count}, stream_at(stream));
}

void bind_updates(py::module_& m) {
    m.def("most_pieces", &most_pieces);
    m.def("sort_workspace", &sort_workspace);
    m.def("sort_by_latent", &bind_sort_by_latent, Released());
    m.def("sum_pieces", &bind_sum_pieces, Released());
    m.def("bound_rows", &bind_bound_rows, Released());
    m.def("gradient_squares", &bind_gradient_squares, Released());
    m.def("gradient_rows", &bind_gradient_rows, Released());
    m.def("row_adam", &bind_row_adam, Released());
}

}  // namespace

PYBIND11_MODULE(SPARSEKERN_MODULE, m) {
    m.doc() = "CUDA kernels of sparsekern; see the headers of csrc/cuda";
    py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);

    m.def("device_info", &device_info,
          "What the kernels were compiled for and by, the CUDA runtime in them, and the driver or why there is none.");
    bind_updates(m);
}
