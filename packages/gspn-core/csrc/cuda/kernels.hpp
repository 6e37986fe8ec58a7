// The interface of the CUDA kernels. Pointers in Params are device pointers; calls are asynchronous.
#pragma once

#include <cstddef>
#include <string>

#include "gspn/params.hpp"

namespace gspn::cuda {

// Bytes of scratch that a call needs on the device.
size_t forward_workspace(const Params& p);
size_t backward_workspace(const Params& p);

// On a stream (a cudaStream_t) of the current device. Throw std::invalid_argument for calls that no kernel supports,
// and std::runtime_error with CUDA's message if a launch fails.
void forward(const Params& p, void* workspace, void* stream);
void backward(const Params& p, void* workspace, void* stream);

// Whether there are kernels for the current device.
bool is_supported();

// Makes a device current until the end of the scope.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();  // ignores errors, which the next call reports
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
};

// For tests and benchmarks: "auto", or "resident", "strip" or "cluster", used wherever possible.
void select_path(const std::string& name);

}  // namespace gspn::cuda
