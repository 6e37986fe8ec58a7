// The CPU kernels, compiled once per instruction set and selected at run time.
#pragma once

#include "gspn/params.hpp"

namespace gspn::cpu {

struct Kernels {
  const char* isa;
  bool (*supported)();
  void (*forward)(const Params&);
  void (*backward)(const Params&);
  void (*low_rank_forward)(const Params&, const LowRank&);
  void (*low_rank_backward)(const Params&, const LowRank&);
};

// Best first; the last one runs on every machine this was built for.
extern const Kernels* const kernel_table[];
extern const int kernel_count;

}  // namespace gspn::cpu
