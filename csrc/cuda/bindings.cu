// Python bindings of the CUDA kernels: sparsekern._cuda, or, from a plain C++ compiler, _cuda_emulated.
//
// No libtorch: functions take addresses, sizes, strides and the handle of a stream, so one build serves every torch
// version. Arguments are checked in Python, where the tensors are; every call releases the GIL, and none waits for the
// device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/device.h"
#include "cuda/row_topk.h"

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

// Streaming top-k of rows.
ElementType key_type(const std::string& name) {
    if (name == "float32") return ElementType::float32;
    if (name == "float16") return ElementType::float16;
    if (name == "bfloat16") return ElementType::bfloat16;
    throw std::invalid_argument("row_topk: keys must be float32, bfloat16 or float16, not " + name);
}

void bind_row_topk(py::module_& m) {
    py::class_<RowTopkPlan>(m, "RowTopkPlan", "How a row_topk is carried out.")
        .def_readwrite("sample", &RowTopkPlan::sample)
        .def_readwrite("rank", &RowTopkPlan::rank)
        .def_readwrite("parts", &RowTopkPlan::parts)
        .def_readwrite("list", &RowTopkPlan::list)
        .def_readwrite("rows_at_once", &RowTopkPlan::rows_at_once)
        .def_readonly("expected", &RowTopkPlan::expected)
        .def_readonly("failure", &RowTopkPlan::failure)
        .def_property_readonly("workspace", &row_topk_workspace);
    m.def(
        "row_topk_plan",
        [](std::int64_t rows, std::int64_t n, int k, int key_bytes) {
            return row_topk_plan(rows, n, k, key_bytes, multiprocessors());
        },
        "For the current device.");
    m.def(
        "row_topk",
        [](std::uintptr_t keys, const std::string& type, std::int64_t rows, std::int64_t n, std::int64_t stride, int k,
           std::uintptr_t values, std::uintptr_t indices, std::uintptr_t passes, std::uintptr_t workspace,
           const RowTopkPlan& plan, std::uintptr_t stream) {
            const RowTopk call{at<const void>(keys),
                               key_type(type),
                               rows,
                               n,
                               stride,
                               k,
                               at<void>(values),
                               at<std::int32_t>(indices),
                               at<std::int32_t>(passes),
                               at<void>(workspace)};
            row_topk(call, plan, stream_at(stream));
        },
        Released());
    // The plain functions of row_topk.h, for tests.
    m.def("row_topk_too_few", &too_few_probability);
    m.def("row_topk_too_many", &too_many_probability);
    m.def("row_topk_part_begin", &part_begin);
    m.def("row_topk_sample", [](int cells, int packs) {
        int bits = 0;
        while (1 << bits < cells) ++bits;
        std::vector<int> chosen;
        for (int cell = 0; cell < cells; ++cell) chosen.push_back(sampled_pack(cell, bits, packs));
        return chosen;
    });
}

}  // namespace

PYBIND11_MODULE(SPARSEKERN_MODULE, m) {
    m.doc() = "CUDA kernels of sparsekern; see the headers of csrc/cuda";
    py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);

    m.def("device_info", &device_info,
          "What the kernels were compiled for and by, the CUDA runtime in them, and the driver or why there is none.");
    bind_row_topk(m);
}
