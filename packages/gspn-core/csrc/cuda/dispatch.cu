// Dispatches a call to the kernels of its dtype, after checks that all kernels rely on.
#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.cuh"
#include "kernels.hpp"
#include "plan.hpp"
#include "typed.hpp"

namespace gspn::cuda {

namespace {

int64_t magnitude(int64_t v) { return v < 0 ? -v : v; }

// Kernels index within a plane with 32 bits, and across planes with 64.
void check_planes(const Params& p) {
  if (p.H * p.W > INT32_MAX || p.C > INT32_MAX || p.C * p.D > INT32_MAX)
    throw std::invalid_argument("gspn_core: the CUDA kernels support planes of less than 2^31 pixels, got " +
                                std::to_string(p.H) + " x " + std::to_string(p.W));
  for (const Field* f : {&p.x, &p.weights, &p.lam, &p.u, &p.y, &p.dy, &p.dx, &p.dweights, &p.dlam, &p.du})
    if (f->data != nullptr && (p.H - 1) * magnitude(f->row) + (p.W - 1) * magnitude(f->col) > INT32_MAX)
      throw std::invalid_argument(
          "gspn_core: the CUDA kernels support planes that span less than 2^31 elements of memory,"
          " got strides " +
          std::to_string(f->row) + " and " + std::to_string(f->col));
}

template <class Use>
auto with_type(Dtype dtype, const Use& use) {
  switch (dtype) {
    case Dtype::kFloat64: return use(Typed<double>());
    case Dtype::kBFloat16: return use(Typed<BFloat16>());
    case Dtype::kFloat16: return use(Typed<Float16>());
    default: return use(Typed<float>());
  }
}

}  // namespace

OnDevice::OnDevice(int device) : before_(exchange_device(device)) {}
OnDevice::~OnDevice() { restore_device(before_); }

bool is_supported() { return compiled_capability() > 0; }

size_t forward_workspace(const Params& p) {
  check_planes(p);
  return with_type(p.dtype, [&](auto typed) { return typed.forward_workspace(p); });
}

size_t backward_workspace(const Params& p) {
  check_planes(p);
  return with_type(p.dtype, [&](auto typed) { return typed.backward_workspace(p); });
}

void forward(const Params& p, void* workspace, void* stream) {
  with_type(p.dtype, [&](auto typed) { typed.forward(p, workspace, stream); });
}

void backward(const Params& p, void* workspace, void* stream) {
  with_type(p.dtype, [&](auto typed) { typed.backward(p, workspace, stream); });
}

void select_path(const std::string& name) {
  if (name == "auto")
    selected_path = Path::kAuto;
  else if (name == "resident")
    selected_path = Path::kResident;
  else if (name == "strip")
    selected_path = Path::kStrip;
  else if (name == "cluster")
    selected_path = Path::kCluster;
  else
    throw std::invalid_argument("path must be auto, resident, strip or cluster, got " + name);
}

}  // namespace gspn::cuda
