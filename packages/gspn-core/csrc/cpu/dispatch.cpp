// The instruction sets that were compiled, and which of them this machine supports.
#include "kernels.hpp"

namespace gspn::cpu {

#ifdef GSPN_HAVE_X86_KERNELS
bool supported_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
bool supported_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
extern const Kernels kernels_avx512, kernels_avx2;
#endif
bool supported_baseline() { return true; }
extern const Kernels kernels_baseline;

const Kernels* const kernel_table[] = {
#ifdef GSPN_HAVE_X86_KERNELS
    &kernels_avx512, &kernels_avx2,
#endif
    &kernels_baseline};
const int kernel_count = sizeof(kernel_table) / sizeof(kernel_table[0]);

}  // namespace gspn::cpu
