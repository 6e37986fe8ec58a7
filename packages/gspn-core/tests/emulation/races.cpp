// Runs every kernel on small shapes under the emulation, to be built with AddressSanitizer or ThreadSanitizer. Results
// are tested elsewhere; here allocations are exactly as large as the tensors, so that an access beyond them is
// detected.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/kernels.hpp"

namespace {

using gspn::Direction;
using gspn::Dtype;
using gspn::Field;
using gspn::Params;

// float32 and float64 values; for 16 bits their bfloat16 bits.
struct Tensor {
  std::unique_ptr<unsigned char[]> data;
  Field field;
};

int size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// lanes: channels last in memory.
Tensor make(Dtype dtype, int64_t n, int64_t d, int64_t c, int64_t k, int64_t h, int64_t w, bool lanes,
            std::mt19937* random) {
  Tensor t;
  const int64_t count = n * d * c * k * h * w;
  t.data.reset(new unsigned char[size_t(count * size_of(dtype))]);
  std::memset(t.data.get(), 0xFF, size_t(count * size_of(dtype)));
  std::normal_distribution<float> normal;
  for (int64_t i = 0; random != nullptr && i < count; ++i) {
    const float value = normal(*random);
    if (dtype == Dtype::kFloat64) {
      const double wide = value;
      std::memcpy(t.data.get() + i * 8, &wide, 8);
    } else if (dtype == Dtype::kFloat32) {
      std::memcpy(t.data.get() + i * 4, &value, 4);
    } else {
      gspn::cuda::BFloat16 narrow;
      gspn::cuda::narrow(value, narrow);
      std::memcpy(t.data.get() + i * 2, &narrow, 2);
    }
  }
  t.field = lanes ? Field{t.data.get(), c, d * c * k * h * w, k * c, 1, c, w * d * k * c, d * k * c}
                  : Field{t.data.get(), c, d * c * k * h * w, c * k * h * w, k * h * w, h * w, w, 1};
  return t;
}

struct Case {
  const char* path;  // of select_path, or lanes
  Dtype dtype;
  int64_t N, C, H, W, G, gates, chunk;
  bool stochastic;
  std::vector<int> directions;
};

void run(const Case& c) {
  std::mt19937 random(1);
  Params p;
  p.dtype = c.dtype, p.stochastic = c.stochastic;
  p.N = c.N, p.C = c.C, p.H = c.H, p.W = c.W;
  p.D = int(c.directions.size());
  for (int d = 0; d < p.D; ++d) p.directions[d] = Direction(c.directions[size_t(d)]);
  p.chunk = c.chunk, p.interval = 16;
  const bool lanes = std::strcmp(c.path, "lanes") == 0;
  std::vector<Tensor> kept;
  const auto tensor = [&](int64_t d, int64_t channels, int64_t k, bool filled) {
    kept.push_back(make(c.dtype, c.N, d, channels, k, c.H, c.W, lanes, filled ? &random : nullptr));
    return kept.back().field;
  };
  p.x = tensor(1, c.C, 1, true), p.weights = tensor(p.D, c.G, 3, true);
  p.lam = tensor(p.D, c.gates, 1, true), p.u = tensor(p.D, c.gates, 1, true);
  p.y = tensor(1, c.C, 1, false);
  const int64_t state = c.dtype == Dtype::kFloat64 ? 8 : 4;
  std::vector<double> checkpoints(size_t(c.N * c.C * gspn::checkpoint_offset(p, p.D) * state / 8 + 1));
  p.checkpoints = checkpoints.data();
  gspn::cuda::select_path(lanes ? "auto" : c.path);
  const auto scratch = [](size_t bytes) {
    std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes > 0 ? bytes : 1]);
    std::memset(memory.get(), 0xFF, bytes > 0 ? bytes : 1);
    return memory;
  };
  gspn::cuda::forward(p, scratch(gspn::cuda::forward_workspace(p)).get(), nullptr);
  p.dy = tensor(1, c.C, 1, true), p.dx = tensor(1, c.C, 1, false);
  p.dweights = tensor(p.D, c.G, 3, false), p.dlam = tensor(p.D, c.gates, 1, false),
  p.du = tensor(p.D, c.gates, 1, false);
  gspn::cuda::backward(p, scratch(gspn::cuda::backward_workspace(p)).get(), nullptr);
}

}  // namespace

// With the argument float32, runs the cases of that type only.
int main(int count, char** arguments) {
  const bool only_float32 = count > 1 && std::string(arguments[1]) == "float32";
  const std::vector<int> all{0, 1, 2, 3};
  const Dtype f32 = Dtype::kFloat32, f64 = Dtype::kFloat64;
  const Case cases[] = {
      {"auto", f32, 1, 6, 7, 7, 2, 6, 0, true, all},           // four channels side by side
      {"auto", f32, 1, 3, 14, 9, 3, 1, 0, true, all},          // two
      {"auto", f32, 2, 5, 20, 33, 1, 5, 5, true, all},         // resident, weights shared by four warps, a ragged group
      {"auto", f32, 1, 2, 40, 70, 2, 2, 0, true, {1, 2, 0}},   // resident, one direction without its opposite
      {"strip", f32, 1, 5, 33, 20, 1, 1, 0, true, all},        // shared weights
      {"strip", f32, 1, 2, 21, 150, 2, 2, 0, true, {2, 3}},    // two strips of a block
      {"strip", f32, 1, 2, 150, 21, 1, 1, 7, false, {0}},      // shared weights of line_scan, two strips, chunks
      {"cluster", f32, 1, 2, 19, 260, 1, 2, 0, true, {3, 2}},  // strips in several blocks
      {"strip", f32, 1, 2, 32, 28, 2, 2, 0, true, {0, 1}},     // rows of sectors, the last one of half a sector
      {"cluster", f32, 1, 1, 132, 24, 1, 1, 0, false, {1}},    // the same, strips in two blocks
      {"auto", f32, 1, 3, 8, 12, 3, 3, 5, true, all},          // fused, a ragged group of channels
      {"auto", f32, 1, 17, 7, 10, 1, 1, 4, true, all},         // weights and gates of all channels, normalised once
      {"cluster", f32, 1, 1, 132, 32, 1, 1, 0, true, {0, 1}},  // gradients of rows, strips in two blocks
      {"strip", f32, 1, 1, 20, 132, 1, 1, 7, true, {2, 3}},    // and of columns
      {"lanes", f32, 1, 20, 9, 20, 20, 20, 0, true, all},      // channels last, three warps
      {"lanes", f32, 1, 36, 20, 17, 1, 36, 7, true, {0, 3}},   // shared weights, two blocks of channels
      {"lanes", f32, 1, 16, 3, 20, 16, 16, 1, true, {2}},      // chunks of one line
      {"auto", f64, 1, 2, 20, 75, 1, 1, 0, true, {2, 1}},
  };
  for (const Case& c : cases) {
    if (only_float32 && c.dtype != f32) continue;
    run(c);
    std::printf("%s %dx%d done\n", c.path, int(c.H), int(c.W));
    std::fflush(stdout);
  }
  gspn::cuda::emulated_limits = {8, 108, 163 * 1024};  // no clusters: a long line in one block
  run({"auto", f32, 1, 1, 18, 1100, 1, 1, 0, true, {2}});
  std::printf("all done\n");
  return 0;
}
