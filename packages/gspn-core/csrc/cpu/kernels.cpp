// One instruction set's kernels. CMake compiles this file once per set, with GSPN_ISA naming it.
#include "kernels.hpp"

#include "backward.hpp"
#include "forward.hpp"

namespace {

template <template <class> class Run>
void for_dtype(const Params& p) {
  switch (p.dtype) {
    case gspn::Dtype::kFloat32: return Run<float>::run(p);
    case gspn::Dtype::kFloat64: return Run<double>::run(p);
    case gspn::Dtype::kBFloat16: return Run<BFloat16>::run(p);
    case gspn::Dtype::kFloat16: return Run<Float16>::run(p);
  }
}
template <class S>
struct Forward {
  static void run(const Params& p) { forward_all<S>(p); }
};
template <class S>
struct Backward {
  static void run(const Params& p) { backward_all<S>(p); }
};

}  // namespace

#define GSPN_NAME_(a, b) a##b
#define GSPN_NAME(a, b) GSPN_NAME_(a, b)
#define GSPN_STRING_(a) #a
#define GSPN_STRING(a) GSPN_STRING_(a)

namespace gspn::cpu {

bool GSPN_NAME(supported_, GSPN_ISA)();

extern const Kernels GSPN_NAME(kernels_, GSPN_ISA);
const Kernels GSPN_NAME(kernels_, GSPN_ISA) = {GSPN_STRING(GSPN_ISA), GSPN_NAME(supported_, GSPN_ISA),
                                               for_dtype<Forward>, for_dtype<Backward>};

}  // namespace gspn::cpu
