#include "launch.cuh"

template struct gspn::cuda::Typed<gspn::cuda::BFloat16>;
