// Python bindings of the CUDA kernels: sparsekern._cuda, or, from a plain C++ compiler, _cuda_emulated.
//
// No libtorch: functions take addresses, sizes, strides and the handle of a stream, so one build serves every torch
// version. Arguments are checked in Python, where the tensors are; every call releases the GIL, and none waits for the
// device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/candidates.h"
#include "cuda/device.h"
#include "cuda/screen.h"

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

// By torch's names.
ElementType element_type(const std::string& name) {
    if (name == "float32") return ElementType::float32;
    if (name == "float16") return ElementType::float16;
    if (name == "bfloat16") return ElementType::bfloat16;
    if (name == "float8_e4m3fn") return ElementType::float8_e4m3;
    throw std::invalid_argument("there are no kernels for " + name);
}

// Order, offsets, first_tile, tile_expert, n_active, n_experts.
using Slots = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::int32_t, std::int32_t>;

void screen_at(const std::string& type, std::uintptr_t x, std::int64_t x_stride, std::uintptr_t x_scale,
               std::uintptr_t weight, std::int64_t weight_stride, std::uintptr_t weight_scale, std::uintptr_t bias,
               const std::string& bias_type, std::uintptr_t keys, std::int64_t rows, std::int64_t d,
               std::int64_t n_real, std::int64_t n_buckets, std::int64_t n_members, int keep, bool absolute,
               int cluster, const std::optional<Slots>& slots, std::uintptr_t stream) {
    ScreenArgs args{element_type(type), at<void>(x), x_stride, at<float>(x_scale), at<void>(weight), weight_stride,
                    at<float>(weight_scale), at<void>(bias), element_type(bias_type), at<float>(keys), rows, d, n_real,
                    n_buckets, n_members, keep, absolute, cluster, nullptr};
    ScreenSlots tables{};
    if (slots) {
        const auto [order, offsets, first_tile, tile_expert, n_active, n_experts] = *slots;
        tables = {at<std::int32_t>(order), at<std::int32_t>(offsets), at<std::int32_t>(first_tile),
                  at<std::int32_t>(tile_expert), n_active, n_experts};
        args.slots = &tables;
    }
    screen(args, stream_at(stream));
}

void gather_rows_at(std::uintptr_t x, std::int64_t stride_bytes, std::uintptr_t order, std::int32_t n_active,
                    std::uintptr_t out, std::int64_t rows, std::int64_t row_bytes, std::uintptr_t stream) {
    gather_rows(at<void>(x), stride_bytes, at<std::int32_t>(order), n_active, at<void>(out), rows, row_bytes,
                stream_at(stream));
}

// The structs of candidates.h as tuples, in the order of their members; 0 for a nullptr.
namespace candidates_of {

using Address = std::uintptr_t;
using ScreenedKeys = std::tuple<Address, int, int, int, int>;
using Rows = std::tuple<Address, std::int64_t>;
using Exact = std::tuple<std::string, Rows, Rows, Address, int, bool>;
using Who = std::tuple<Address, int, int>;
using Found = std::tuple<std::int64_t, int, int, Address, Address, Address, Address, Address>;

sparsekern::cuda::Rows rows(const Rows& t) { return {at<const void>(std::get<0>(t)), std::get<1>(t)}; }

Keys keys(const ScreenedKeys& t) {
    const auto [keys, n_buckets, n_members, keep, member_bits] = t;
    return {at<const float>(keys), n_buckets, n_members, keep, member_bits};
}

Operands operands(const Exact& t) {
    const auto& [type, x, weight, bias, d, absolute] = t;
    return {element_type(type), rows(x), rows(weight), at<const void>(bias), d, absolute};
}

Owners owners(const Who& t) {
    const auto [experts, count, n] = t;
    return {at<const std::int32_t>(experts), count, n};
}

Candidates candidates(const Found& t) {
    const auto [rows, room, share, latents, scores, count, repaired, waiting] = t;
    return {rows, room, share, at<std::int32_t>(latents), at<float>(scores), at<std::int32_t>(count),
            at<std::int32_t>(repaired), at<std::int32_t>(waiting)};
}

void define(py::module_& m) {
    m.def("cast_rows",
          [](const std::string& type, const Rows& from, std::int64_t n, int d, const std::string& to, Address out,
             Address scale, Address norm, Address error, float limit, std::int64_t padded, Address stream) {
              cast_rows(element_type(type), rows(from), n, d,
                        {element_type(to), at<void>(out), at<float>(scale), at<float>(norm), at<float>(error), limit,
                         padded},
                        stream_at(stream));
          },
          Released(), "Rows rounded for the screen, with scales, norms and errors.");
    m.def("bucket_panel",
          [](const std::string& type, const Rows& scores, Address x_scale, Address weight_scale, Address bias,
             const std::string& bias_type, std::int64_t n_rows, std::int64_t n, int first_member, int members,
             bool absolute, const ScreenedKeys& out, Address stream) {
              bucket_panel({element_type(type), rows(scores), at<const float>(x_scale), at<const float>(weight_scale),
                            at<const void>(bias), element_type(bias_type), n_rows, n, first_member, members, absolute},
                           keys(out), at<float>(std::get<0>(out)), stream_at(stream));
          },
          Released(), "Merges a panel of scores into the keys.");
    m.def("select_candidates",
          [](const ScreenedKeys& from, Address slack, float relative, int k, const Who& who, const Found& out,
             Address stream) {
              select_candidates(keys(from), {at<const float>(slack), relative}, k, owners(who), candidates(out),
                                stream_at(stream));
          },
          Released(), "What could be among the k largest, by the keys.");
    m.def("rescore",
          [](const Exact& exact, const Found& of, Address check, Address stream) {
              rescore(operands(exact), candidates(of), at<const float>(check), stream_at(stream));
          },
          Released(), "Exact scores of the candidates, token by token.");
    m.def("count_by_latent",
          [](const Found& of, Address starts, Address stream) {
              count_by_latent(candidates(of), at<std::int32_t>(starts), stream_at(stream));
          },
          Released(), "How many candidates each latent has.");
    m.def("rescore_by_latent",
          [](const Exact& exact, const Found& of, Address check, Address starts, std::int64_t n, Address pairs,
             Address sums, Address stream) {
              rescore_by_latent(operands(exact), candidates(of), at<const float>(check), at<std::int32_t>(starts), n,
                                at<Pair>(pairs), at<float>(sums), stream_at(stream));
          },
          Released(), "Exact scores of the candidates, latent by latent.");
    m.def("repair",
          [](const Exact& exact, const Who& who, const Found& of, int k, Address spare, std::int64_t slots,
             Address stream) {
              repair(operands(exact), owners(who), candidates(of), k, at<std::uint64_t>(spare), slots,
                     stream_at(stream));
          },
          Released(), "The best of all latents of the rows that have no certificate.");
    m.def("take_best",
          [](const std::string& type, const Found& of, int k, bool absolute, Address spare, std::int64_t slots,
             Address values, Address indices, Address stream) {
              take_best(element_type(type), candidates(of), k, absolute, at<const std::uint64_t>(spare), slots,
                        at<void>(values), at<std::int32_t>(indices), stream_at(stream));
          },
          Released(), "The k best candidates of each row.");
}

}  // namespace candidates_of
}  // namespace

PYBIND11_MODULE(SPARSEKERN_MODULE, m) {
    m.doc() = "CUDA kernels of sparsekern; see the headers of csrc/cuda";
    py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);

    m.def("device_info", &device_info,
          "What the kernels were compiled for and by, the CUDA runtime in them, and the driver or why there is none.");

    m.def("screen", &screen_at, Released(), py::arg("type"), py::arg("x"), py::arg("x_stride"), py::arg("x_scale"),
          py::arg("weight"), py::arg("weight_stride"), py::arg("weight_scale"), py::arg("bias"), py::arg("bias_type"),
          py::arg("keys"), py::arg("rows"), py::arg("d"), py::arg("n_real"), py::arg("n_buckets"),
          py::arg("n_members"), py::arg("keep"), py::arg("absolute"), py::arg("cluster"), py::arg("slots"),
          py::arg("stream"),
          "Keys [rows, keep, n_buckets] of tokens x by latents of weight; addresses are 0 for what there is not. Slots:\n"
          "order, offsets, first_tile, tile_expert, n_active, n_experts, or None. See csrc/cuda/screen.h.");
    m.def("gather_rows", &gather_rows_at, Released(), py::arg("x"), py::arg("stride_bytes"), py::arg("order"),
          py::arg("n_active"), py::arg("out"), py::arg("rows"), py::arg("row_bytes"), py::arg("stream"),
          "out[i] = x[order[i] // n_active], rows of a multiple of 16 bytes.");
    m.def(
        "screen_tile_of",
        [](std::int32_t unit, std::int32_t token_tiles, std::int32_t bucket_tiles, std::int32_t group) {
            const ScreenTile tile = screen_tile_of(unit, token_tiles, bucket_tiles, group);
            return std::make_tuple(tile.tokens, tile.buckets);
        },
        py::arg("unit"), py::arg("token_tiles"), py::arg("bucket_tiles"), py::arg("group"),
        "The tile of tokens and the tile of buckets of a unit of work of the screen.");

    candidates_of::define(m);
}
