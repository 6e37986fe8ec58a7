// Stands in for the kernels of 16-bit types that a build leaves out, since each takes a quarter of the time to compile:
// float16, whose code is that of bfloat16 except for conversions, of which the emulation has its own; and under
// ThreadSanitizer, which only watches barriers, bfloat16 too.
#include <stdexcept>

#include "device.cuh"
#include "typed.hpp"

#define GSPN_UNBUILT(T)                                                 \
  template <>                                                           \
  size_t Typed<T>::forward_workspace(const Params&) {                   \
    throw std::invalid_argument("the emulation was built without " #T); \
  }                                                                     \
  template <>                                                           \
  size_t Typed<T>::backward_workspace(const Params& p) {                \
    return forward_workspace(p);                                        \
  }                                                                     \
  template <>                                                           \
  void Typed<T>::forward(const Params&, void*, void*) {}                \
  template <>                                                           \
  void Typed<T>::backward(const Params&, void*, void*) {}

namespace gspn::cuda {

GSPN_UNBUILT(Float16)
#ifdef GSPN_WITHOUT_BFLOAT16
GSPN_UNBUILT(BFloat16)
#endif

}  // namespace gspn::cuda
