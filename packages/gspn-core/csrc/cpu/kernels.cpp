// One instruction set's kernels. CMake compiles this file once per set, with GSPN_ISA naming it.
#include "kernels.hpp"

#include "backward.hpp"
#include "forward.hpp"
#include "low_rank_backward.hpp"

namespace {

// Calls run(S()) with the storage type of a dtype.
template <class Run>
void for_dtype(gspn::Dtype dtype, const Run& run) {
  switch (dtype) {
    case gspn::Dtype::kFloat32: return run(float());
    case gspn::Dtype::kFloat64: return run(double());
    case gspn::Dtype::kBFloat16: return run(BFloat16());
    case gspn::Dtype::kFloat16: return run(Float16());
  }
}
void forward(const Params& p) {
  for_dtype(p.dtype, [&](auto s) { forward_all<decltype(s)>(p); });
}
void backward(const Params& p) {
  for_dtype(p.dtype, [&](auto s) { backward_all<decltype(s)>(p); });
}
void low_rank_forward(const Params& p, const LowRank& f) {
  for_dtype(p.dtype, [&](auto s) { forward_low_rank<decltype(s)>(p, f); });
}
void low_rank_backward(const Params& p, const LowRank& f) {
  for_dtype(p.dtype, [&](auto s) { backward_low_rank<decltype(s)>(p, f); });
}

}  // namespace

#define GSPN_NAME_(a, b) a##b
#define GSPN_NAME(a, b) GSPN_NAME_(a, b)
#define GSPN_STRING_(a) #a
#define GSPN_STRING(a) GSPN_STRING_(a)

namespace gspn::cpu {

bool GSPN_NAME(supported_, GSPN_ISA)();

extern const Kernels GSPN_NAME(kernels_, GSPN_ISA);
const Kernels GSPN_NAME(kernels_, GSPN_ISA) = {
    GSPN_STRING(GSPN_ISA), GSPN_NAME(supported_, GSPN_ISA), forward, backward, low_rank_forward, low_rank_backward};

}  // namespace gspn::cpu
