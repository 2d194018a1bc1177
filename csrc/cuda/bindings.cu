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

}  // namespace

PYBIND11_MODULE(SPARSEKERN_MODULE, m) {
    m.doc() = "CUDA kernels of sparsekern; see the headers of csrc/cuda";
    py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);

    m.def("device_info", &device_info,
          "What the kernels were compiled for and by, the CUDA runtime in them, and the driver or why there is none.");
}
