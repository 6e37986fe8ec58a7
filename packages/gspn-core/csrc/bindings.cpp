// pybind11 module gspn_core._C: runs kernels on pointers, sizes and strides. Independent of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/kernels.hpp"
#ifdef GSPN_HAVE_CUDA
#include "cuda/kernels.hpp"
#endif
#ifdef GSPN_EMULATED_CUDA
#include "cuda/device.cuh"
#endif

namespace py = pybind11;

namespace {

using gspn::Dtype;
using gspn::Field;
using gspn::LowRank;
using gspn::Params;
using gspn::cpu::Kernels;

std::atomic<const Kernels*> selected_kernels{nullptr};

void select_isa(const std::string& name) {
  for (int i = 0; i < gspn::cpu::kernel_count; ++i) {
    const Kernels* kernels = gspn::cpu::kernel_table[i];
    if (!kernels->supported() || (name != "auto" && name != kernels->isa)) continue;
    selected_kernels = kernels;
    return;
  }
  throw std::invalid_argument("isa must be auto or one of supported_isas(), got " + name);
}

std::vector<std::string> isas(bool only_supported) {
  std::vector<std::string> names;
  for (int i = 0; i < gspn::cpu::kernel_count; ++i)
    if (!only_supported || gspn::cpu::kernel_table[i]->supported()) names.push_back(gspn::cpu::kernel_table[i]->isa);
  return names;
}

// Reads Python tuples directly: on small images pybind11's conversions would take longer than the kernel.
int64_t integer(PyObject* value) {
  const long long number = PyLong_AsLongLong(value);
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

py::tuple item(const py::tuple& tensor, int i) {
  if (tensor.size() != 3 || !PyTuple_Check(PyTuple_GET_ITEM(tensor.ptr(), i)))
    throw std::invalid_argument("a tensor must be given as (pointer, shape, strides)");
  return py::reinterpret_borrow<py::tuple>(PyTuple_GET_ITEM(tensor.ptr(), i));
}

// (data pointer, shape, strides in elements), or None.
using TensorArg = std::optional<py::tuple>;

// `dimensions` are those the tensor has, of n d c k h w in this order.
Field field(const TensorArg& tensor, const char* dimensions) {
  Field f;
  if (!tensor) return f;
  const py::tuple shape = item(*tensor, 1), strides = item(*tensor, 2);
  const std::size_t rank = std::strlen(dimensions);
  if (shape.size() != rank || strides.size() != rank) throw std::invalid_argument("a tensor has the wrong rank");
  f.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(tensor->ptr(), 0));
  bool empty = false;
  for (std::size_t i = 0; i < rank; ++i) {
    const int64_t stride = integer(PyTuple_GET_ITEM(strides.ptr(), i));
    empty = empty || integer(PyTuple_GET_ITEM(shape.ptr(), i)) == 0;
    switch (dimensions[i]) {
      case 'n': f.n = stride; break;
      case 'd': f.d = stride; break;
      case 'c':
        f.c = stride;
        f.channels = integer(PyTuple_GET_ITEM(shape.ptr(), i));
        break;
      case 'k': f.k = stride; break;
      case 'h': f.row = stride; break;
      case 'w': f.col = stride; break;
    }
  }
  // As if it were absent: torch takes the memory of a tensor away, when parameters are sharded for example.
  if (f.data == nullptr && !empty) throw std::invalid_argument("a tensor has no memory");
  return f;
}

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "float64") return Dtype::kFloat64;
  if (name == "bfloat16") return Dtype::kBFloat16;
  if (name == "float16") return Dtype::kFloat16;
  throw std::invalid_argument("no kernel for dtype " + name);
}

// What the planes of a task may fill of a core's own cache: half of it, where the system tells its size.
int64_t second_level_bytes() {
  long size = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
  size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  return std::clamp<int64_t>(size > 0 ? size / 2 : 512 * 1024, 128 * 1024, 512 * 1024);
}

struct Call {
  std::string dtype;
  bool stochastic;
  std::vector<int> directions;
  int64_t chunk, interval;
  int threads;
};

// What every call has.
Params image_params(const Call& call, const TensorArg& x, std::uintptr_t checkpoints) {
  Params p;
  p.dtype = dtype_of(call.dtype);
  p.stochastic = call.stochastic;
  p.x = field(x, "nchw");
  const py::tuple shape = item(x.value(), 1);
  p.N = integer(PyTuple_GET_ITEM(shape.ptr(), 0)), p.C = p.x.channels;
  p.H = integer(PyTuple_GET_ITEM(shape.ptr(), 2)), p.W = integer(PyTuple_GET_ITEM(shape.ptr(), 3));
  if (call.directions.empty() || call.directions.size() > gspn::kMaxDirections || call.interval < 1)
    throw std::invalid_argument("one to four directions and a positive interval are needed");
  p.D = int(call.directions.size());
  for (int d = 0; d < p.D; ++d) p.directions[d] = static_cast<gspn::Direction>(call.directions[d]);
  static const int64_t cache = second_level_bytes();
  p.chunk = call.chunk, p.interval = call.interval, p.threads = call.threads, p.second_level_bytes = cache;
  p.checkpoints = reinterpret_cast<void*>(checkpoints);
  return p;
}

Params make_params(const Call& call, const TensorArg& x, const TensorArg& weights, const TensorArg& lam,
                   const TensorArg& u, std::uintptr_t checkpoints) {
  Params p = image_params(call, x, checkpoints);
  const bool has_directions = item(weights.value(), 1).size() == 6;
  const char* gate = has_directions ? "ndchw" : "nchw";
  p.weights = field(weights, has_directions ? "ndckhw" : "nckhw");
  p.lam = field(lam, gate);
  p.u = field(u, gate);
  return p;
}

bool is_empty(const Params& p) { return p.N == 0 || p.C == 0 || p.H == 0 || p.W == 0; }

void check_checkpoints(const Params& p) {
  if (p.checkpoints == nullptr && gspn::checkpoint_offset(p, p.D) > 0 && !is_empty(p))
    throw std::invalid_argument("the checkpoints have no memory");
}

Params forward_params(const Call& call, const TensorArg& x, const TensorArg& weights, const TensorArg& lam,
                      const TensorArg& u, const TensorArg& y, std::uintptr_t checkpoints) {
  Params p = make_params(call, x, weights, lam, u, checkpoints);
  p.y = field(y, "nchw");
  return p;
}

Params backward_params(const Call& call, const TensorArg& dy, const TensorArg& x, const TensorArg& weights,
                       const TensorArg& lam, const TensorArg& u, std::uintptr_t checkpoints, const TensorArg& dx,
                       const TensorArg& dweights, const TensorArg& dlam, const TensorArg& du) {
  Params p = make_params(call, x, weights, lam, u, checkpoints);
  const bool has_directions = item(weights.value(), 1).size() == 6;
  const char* gate = has_directions ? "ndchw" : "nchw";
  p.dy = field(dy, "nchw");
  p.dx = field(dx, "nchw");
  p.dweights = field(dweights, has_directions ? "ndckhw" : "nckhw");
  p.dlam = field(dlam, gate);
  p.du = field(du, gate);
  if (p.dweights || p.du) check_checkpoints(p);
  return p;
}

// args are those of forward_params or backward_params, after `call`.
template <class... Args>
void forward(const Call& call, Args... args) {
  const Params p = forward_params(call, args...);
  if (is_empty(p)) return;
  py::gil_scoped_release unlocked;
  selected_kernels.load()->forward(p);
}

template <class... Args>
void backward(const Call& call, Args... args) {
  const Params p = backward_params(call, args...);
  if (is_empty(p)) return;
  py::gil_scoped_release unlocked;
  selected_kernels.load()->backward(p);
}

// r, the projection (D, 5, C, R) and the bias (D, 5, C).
LowRank low_rank(const TensorArg& r, const TensorArg& projection, const TensorArg& bias) {
  LowRank f;
  f.R = integer(PyTuple_GET_ITEM(item(r.value(), 1).ptr(), 1));
  f.r = field(r, "nchw"), f.projection = field(projection, "dkcw"), f.bias = field(bias, "dkc");
  return f;
}

void low_rank_forward(const Call& call, const TensorArg& x, const TensorArg& r, const TensorArg& projection,
                      const TensorArg& bias, const TensorArg& y, std::uintptr_t checkpoints) {
  Params p = image_params(call, x, checkpoints);
  p.y = field(y, "nchw");
  const LowRank f = low_rank(r, projection, bias);
  if (is_empty(p)) return;
  py::gil_scoped_release unlocked;
  selected_kernels.load()->low_rank_forward(p, f);
}

void low_rank_backward(const Call& call, const TensorArg& dy, const TensorArg& x, const TensorArg& r,
                       const TensorArg& projection, const TensorArg& bias, std::uintptr_t checkpoints,
                       const TensorArg& dx, const TensorArg& dr, const TensorArg& dprojection, const TensorArg& dbias) {
  Params p = image_params(call, x, checkpoints);
  p.dy = field(dy, "nchw"), p.dx = field(dx, "nchw");
  LowRank f = low_rank(r, projection, bias);
  f.dr = field(dr, "nchw"), f.dprojection = field(dprojection, "dkcw"), f.dbias = field(dbias, "dkc");
  check_checkpoints(p);
  if (is_empty(p)) return;
  py::gil_scoped_release unlocked;
  selected_kernels.load()->low_rank_backward(p, f);
}

#ifdef GSPN_HAVE_CUDA
// Device and stream of a call on a GPU, and allocate(bytes) -> tensor for scratch memory.
struct Launch {
  int device;
  std::uintptr_t stream;
  py::function allocate;

  template <class Run>
  void operator()(std::size_t bytes, const Run& run) const {
    py::object scratch;
    void* workspace = nullptr;
    if (bytes > 0) {
      scratch = allocate(bytes);
      workspace = PyLong_AsVoidPtr(scratch.attr("data_ptr")().ptr());
    }
    py::gil_scoped_release unlocked;
    run(workspace, reinterpret_cast<void*>(stream));
  }
};

// Kernels count lines with 32 bits; a longer chunk holds the whole image anyway.
Params in_32_bits(Params p) {
  p.chunk = std::min<int64_t>(p.chunk, INT32_MAX);
  return p;
}

template <class... Args>
void cuda_forward(const Launch& launch, const Call& call, Args... args) {
  const Params p = in_32_bits(forward_params(call, args...));
  if (is_empty(p)) return;
  const gspn::cuda::OnDevice device(launch.device);
  launch(gspn::cuda::forward_workspace(p),
         [&](void* workspace, void* stream) { gspn::cuda::forward(p, workspace, stream); });
}

template <class... Args>
void cuda_backward(const Launch& launch, const Call& call, Args... args) {
  const Params p = in_32_bits(backward_params(call, args...));
  if (is_empty(p)) return;
  const gspn::cuda::OnDevice device(launch.device);
  launch(gspn::cuda::backward_workspace(p),
         [&](void* workspace, void* stream) { gspn::cuda::backward(p, workspace, stream); });
}
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = GSPN_COMPILER;
  info["build_type"] = GSPN_BUILD_TYPE;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = py::none();
#endif
  info["compiled_isas"] = isas(false);
  info["supported_isas"] = isas(true);
  info["isa"] = selected_kernels.load()->isa;
#ifdef GSPN_HAVE_CUDA
  py::dict cuda;
  cuda["compiler"] = GSPN_CUDA_COMPILER;
  cuda["architectures"] = std::string(GSPN_CUDA_ARCHITECTURES);
  info["cuda"] = cuda;
#endif
  return info;
}

}  // namespace

#ifndef GSPN_MODULE
#define GSPN_MODULE _C
#endif

// Needs no GIL: calls share nothing that changes but the two selections for tests, which are atomic.
PYBIND11_MODULE(GSPN_MODULE, m, py::mod_gil_not_used()) {
  m.doc() = "Line-scan kernels of gspn_core; private, call gspn_core.propagate and gspn_core.line_scan.";
  select_isa("auto");
  py::class_<Call>(m, "Call").def(py::init(
      [](std::string dtype, bool stochastic, std::vector<int> directions, int64_t chunk, int64_t interval,
         int threads) { return Call{std::move(dtype), stochastic, std::move(directions), chunk, interval, threads}; }));
  using Tensor = TensorArg;
  using Pointer = std::uintptr_t;
  m.def("forward", &forward<Tensor, Tensor, Tensor, Tensor, Tensor, Pointer>);
  m.def("backward", &backward<Tensor, Tensor, Tensor, Tensor, Tensor, Pointer, Tensor, Tensor, Tensor, Tensor>);
  m.def("low_rank_forward", &low_rank_forward);
  m.def("low_rank_backward", &low_rank_backward);
#ifdef GSPN_HAVE_CUDA
  py::class_<Launch>(m, "Launch").def(py::init<int, Pointer, py::function>());
  m.def("cuda_forward", &cuda_forward<Tensor, Tensor, Tensor, Tensor, Tensor, Pointer>);
  m.def("cuda_backward",
        &cuda_backward<Tensor, Tensor, Tensor, Tensor, Tensor, Pointer, Tensor, Tensor, Tensor, Tensor>);
  m.def(
      "cuda_supports",
      [](int device) {
        const gspn::cuda::OnDevice current(device);
        return gspn::cuda::is_supported();
      },
      py::arg("device"), "Whether kernels were compiled for this device.");
#ifdef GSPN_EMULATED_CUDA
  m.def("emulate_device", [](int major, int multiprocessors, std::size_t shared_bytes) {
    gspn::cuda::emulated_limits = {major, multiprocessors, shared_bytes};
  });
#endif
  m.def("cuda_select_path", &gspn::cuda::select_path, py::arg("path"),
        "Use 'resident', 'strip' or 'cluster' kernels wherever possible; 'auto' chooses the best.");
#endif
  m.def("build_info", &build_info);
  m.def("select_isa", &select_isa, py::arg("isa"), "Use the kernels of this instruction set; 'auto' is the best one.");
}
