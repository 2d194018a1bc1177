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
#include "cuda/candidates.h"
#include "cuda/device.h"
#include "cuda/row_adam.h"
#include "cuda/row_topk.h"
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
    throw std::invalid_argument("no kernel has elements of type " + name);
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

// Streaming top-k of rows.
ElementType key_type(const std::string& name) {
    if (name == "float32") return ElementType::float32;
    if (name == "float16") return ElementType::float16;
    if (name == "bfloat16") return ElementType::bfloat16;
    throw std::invalid_argument("row_topk: keys must be float32, bfloat16 or float16, not " + name);
}

void bind_row_topk(py::module_& m) {
    py::class_<RowTopkPlan>(m, "RowTopkPlan", py::module_local(), "How a row_topk is carried out.")
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
    py::register_local_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);

    m.def(
        "record_launches",
        [](const py::function& calls) {
            std::vector<Launch> launches;
            struct Recording {
                explicit Recording(std::vector<Launch>& to) { recorded_launches = &to; }
                ~Recording() { recorded_launches = nullptr; }
            } recording(launches);
            calls();
            py::list found;
            for (const Launch& one : launches)
                found.append(py::make_tuple(one.name, one.shape.blocks, one.shape.threads, one.shape.shared_bytes,
                                            one.shape.cluster));
            return found;
        },
        "What `calls()` would launch: name, blocks, threads, bytes of shared memory, blocks of a cluster. Nothing runs.");
    m.def("device_info", &device_info,
          "What the kernels were compiled for and by, the CUDA runtime in them, and the driver or why there is none.");

    candidates_of::define(m);

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

    bind_updates(m);
    bind_row_topk(m);
}
