// The kernels of one storage type, each instantiated in its own translation unit.
#pragma once

#include <cstddef>

#include "gspn/params.hpp"

namespace gspn::cuda {

template <class T>
struct Typed {
  static size_t forward_workspace(const Params& p);
  static size_t backward_workspace(const Params& p);
  static void forward(const Params& p, void* workspace, void* stream);
  static void backward(const Params& p, void* workspace, void* stream);
};

}  // namespace gspn::cuda
