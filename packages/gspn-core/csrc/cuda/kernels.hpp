// The CUDA kernels as the bindings see them. Pointers in Params are the device's; calls return at once.
#pragma once

#include <cstddef>
#include <string>

#include "gspn/params.hpp"

namespace gspn::cuda {

// Bytes of scratch that a call needs on the device.
size_t forward_workspace(const Params& p);
size_t backward_workspace(const Params& p);

// On the current device's given stream (a cudaStream_t). Throw std::invalid_argument for what no kernel serves, and
// std::runtime_error with CUDA's own words where a launch fails.
void forward(const Params& p, void* workspace, void* stream);
void backward(const Params& p, void* workspace, void* stream);

// Makes a device the current one, until the end of the scope.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();  // an error here shows in the next call
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
};

// For tests and measurements: "auto", or one of "resident", "strip" and "cluster", taken wherever it is possible.
void select_path(const std::string& name);

}  // namespace gspn::cuda
