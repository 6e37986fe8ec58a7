// Runs kernels on small parts of their shapes under the emulation, with the addresses that each warp accesses at once,
// and prints for every case two ratios as JSON:
//   l2_ratio         sectors of 32 bytes that the requests of a block read or write, per distinct sector of the block:
//   1
//                    where each is moved once. What the first-level cache would save is not counted.
//   wavefront_ratio  passes over the banks of shared memory, per pass that a request of its size takes at least.
// Counted are the accesses through load_vector, store_vector, load_shared, store_shared and copy_async.
#include <cstdio>
#include <map>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/vectors.cuh"

namespace gspn::cuda {
namespace {

struct Case {
  const char* name;
  int64_t C, H, W, G;
  bool stochastic, gated, backward;
  std::vector<int> directions;
  int multiprocessors = 132;
};

struct Tensor {
  std::vector<uint32_t> memory;
  Field field;
};

template <class T>
Field make(std::vector<Tensor>& tensors, int64_t d, int64_t c, int64_t k, const Case& shape, std::mt19937& random) {
  Tensor t;
  const int64_t plane = shape.H * shape.W, count = d * c * k * plane;
  t.memory.resize(size_t(count) * sizeof(T) / 4 + 64);
  std::normal_distribution<float> normal;
  T* const aligned = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(t.memory.data()) + 127) / 128 * 128);
  for (int64_t i = 0; i < count; ++i) narrow(0.1f * normal(random), aligned[i]);
  t.field = Field{aligned, c, d * c * k * plane, c * k * plane, k * plane, plane, shape.W, 1};
  tensors.push_back(std::move(t));
  return tensors.back().field;
}

// Block, warp, synchronisation points before, place in the code, how often there since the last of these points.
using Request = std::tuple<unsigned, int, int, const void*, int>;

struct Ratios {
  int64_t sectors = 0, distinct = 0, wavefronts = 0, least = 0;

  void add_shared(const std::vector<emulator::Access>& lanes) {
    const size_t bytes = lanes[0].bytes, at_once = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
    std::map<size_t, std::map<uintptr_t, std::set<uintptr_t>>> passes;  // pass, bank: words
    for (const emulator::Access& a : lanes)
      for (uintptr_t word = a.address / 4; word <= (a.address + bytes - 1) / 4; ++word)
        passes[size_t(a.thread % 32) / at_once][word % 32].insert(word);
    for (const auto& [pass, banks] : passes) {
      size_t most = 0;
      for (const auto& [bank, words] : banks) most = std::max(most, words.size());
      wavefronts += int64_t(most), ++least;
    }
  }
};

Ratios count(const std::vector<emulator::Access>& accesses) {
  std::map<Request, std::vector<emulator::Access>> requests;
  std::map<std::tuple<unsigned, int, int, const void*>, int> before;
  for (const emulator::Access& a : accesses) {
    const int turn = before[{a.block, a.thread, a.meetings, a.site}]++;
    requests[{a.block, a.thread / 32, a.meetings, a.site, turn}].push_back(a);
  }
  Ratios ratios;
  std::set<std::tuple<unsigned, emulator::Memory, uintptr_t>> distinct;
  for (const auto& [request, lanes] : requests) {
    if (lanes[0].memory == emulator::Memory::kShared) {
      ratios.add_shared(lanes);
      continue;
    }
    std::set<uintptr_t> sectors;
    for (const emulator::Access& a : lanes)
      for (uintptr_t s = a.address / 32; s <= (a.address + a.bytes - 1) / 32; ++s) sectors.insert(s);
    ratios.sectors += int64_t(sectors.size());
    for (const uintptr_t s : sectors) distinct.insert({std::get<0>(request), lanes[0].memory, s});
  }
  ratios.distinct = int64_t(distinct.size());
  return ratios;
}

template <class T>
bool run(const Case& c, const char* separator) {
  std::mt19937 random(1);
  emulated_limits.multiprocessors = c.multiprocessors;
  std::vector<Tensor> tensors;
  tensors.reserve(16);
  Params p;
  p.stochastic = c.stochastic;
  p.dtype = sizeof(T) == 2 ? Dtype::kBFloat16 : Dtype::kFloat32;
  p.N = 1, p.C = c.C, p.H = c.H, p.W = c.W, p.D = int(c.directions.size()), p.interval = 16;
  for (int d = 0; d < p.D; ++d) p.directions[d] = Direction(c.directions[size_t(d)]);
  const auto tensor = [&](int64_t d, int64_t channels, int64_t k) {
    return make<T>(tensors, d, channels, k, c, random);
  };
  p.x = tensor(1, c.C, 1), p.weights = tensor(p.D, c.G, 3), p.y = tensor(1, c.C, 1);
  if (c.gated) p.lam = tensor(p.D, c.G, 1), p.u = tensor(p.D, c.G, 1);
  std::vector<double> checkpoints(size_t(c.C * checkpoint_offset(p, p.D)) + 1), workspace;
  if (c.backward) {
    p.checkpoints = checkpoints.data();
    p.dy = tensor(1, c.C, 1), p.dx = tensor(1, c.C, 1), p.dweights = tensor(p.D, c.G, 3);
    if (c.gated) p.dlam = tensor(p.D, c.G, 1), p.du = tensor(p.D, c.G, 1);
  }
  const Limits device = device_limits();
  std::vector<emulator::Access> accesses;
  emulator::recorder() = &accesses;
  bool serves = true;
  if (c.backward) {
    for (int d = 0; d < p.D; ++d) serves = serves && launch_vector_backward<T>(p, d, device, nullptr, nullptr);
  } else if (fused<T>(p, device)) {
    launch_fused<T>(p, nullptr);
  } else if (const int warps = shared_warps<T>(p, device)) {
    workspace.resize(shared_points_bytes<T>(p) / 8 + 2);
    void* const aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 15) / 16 * 16);
    launch_shared<T>(p, warps, aligned, nullptr);
  } else {
    for (int d = 0; d < p.D; ++d)
      serves = serves &&
               (launch_rows<T>(p, d, device, nullptr, nullptr) || launch_columns<T>(p, d, device, nullptr, nullptr));
  }
  emulator::recorder() = nullptr;
  if (!serves) return std::fprintf(stderr, "no kernel of vectors serves %s\n", c.name), false;
  const Ratios r = count(accesses);
  std::printf("%s {\"case\": \"%s\", \"l2_ratio\": %.3f, \"wavefront_ratio\": %.3f}", separator, c.name,
              double(r.sectors) / double(std::max<int64_t>(r.distinct, 1)),
              double(r.wavefronts) / double(std::max<int64_t>(r.least, 1)));
  std::fflush(stdout);
  return true;
}

}  // namespace
}  // namespace gspn::cuda

int main() {
  using gspn::cuda::BFloat16;
  using gspn::cuda::Case;
  const std::vector<int> all{0, 1, 2, 3};
  bool done = true;
  const char* separator = "[\n";
  const auto floats = [&](const Case& c) { done = gspn::cuda::run<float>(c, separator) && done, separator = ",\n"; };
  const auto halves = [&](const Case& c) { done = gspn::cuda::run<BFloat16>(c, separator) && done, separator = ",\n"; };
  // Without multiprocessors to fill, the wide warps.
  floats({"A down", 1, 16, 1024, 1, false, false, false, {2}, 0});
  floats({"A down, narrow", 1, 16, 1024, 1, false, false, false, {2}});
  floats({"A right", 1, 1024, 16, 1, false, false, false, {0}});
  floats({"A left", 1, 1024, 16, 1, false, false, false, {1}});
  floats({"A from logits", 1, 16, 1024, 1, true, false, false, {2}, 0});
  floats({"A right from logits", 1, 1024, 16, 1, true, false, false, {0}});
  halves({"propagate bf16 strip", 1, 16, 512, 1, true, true, false, {2}, 0});
  halves({"propagate bf16 strip right", 1, 512, 32, 1, true, true, false, {0}});
  halves({"B", 12, 74, 74, 1, true, true, false, all, 1});
  halves({"C", 16, 16, 16, 16, true, true, false, all});
  floats({"A backward", 1, 16, 1024, 1, false, false, true, {2}, 0});
  floats({"A backward, narrow", 1, 16, 1024, 1, false, false, true, {2}});
  floats({"A backward right", 1, 1024, 32, 1, false, false, true, {0}});
  halves({"bf16 backward", 1, 32, 512, 1, true, true, true, {2}, 0});
  halves({"bf16 backward right", 1, 512, 32, 1, true, true, true, {0}});
  std::printf("\n]\n");
  return done ? 0 : 1;
}
