#include "launch.cuh"

template struct gspn::cuda::Typed<float>;
