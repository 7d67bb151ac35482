// The host's side of updates: which kernel, which thread blocks, in which launch.
#include "lowrank_update.cuh"

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>
#include <utility>

#include "../dtypes.h"

namespace subzero::cuda {

// Compiled from lowrank_kernels.cu.
#define SUBZERO_DECLARE(rank)                                            \
  extern template UpdateKernel update_kernel<float, rank>(bool, Access); \
  extern template UpdateKernel update_kernel<bf16, rank>(bool, Access);  \
  extern template UpdateKernel update_kernel<f16, rank>(bool, Access)
SUBZERO_DECLARE(16);
SUBZERO_DECLARE(32);
SUBZERO_DECLARE(64);
SUBZERO_DECLARE(128);
SUBZERO_DECLARE(256);
#undef SUBZERO_DECLARE

namespace {

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : 2;
}

// What decides the kernel of a matrix.
struct Kind {
  Dtype weight;
  bool wide;
  int rank;  // that of the kernel
  bool elements;

  bool operator<(const Kind& other) const {
    return std::tie(weight, wide, rank, elements) <
           std::tie(other.weight, other.wide, other.rank, other.elements);
  }
};

template <int kRank>
UpdateKernel kernel_of(const Kind& kind, Access access) {
  switch (kind.weight) {
    case Dtype::bfloat16:
      return update_kernel<bf16, kRank>(kind.wide, access);
    case Dtype::float16:
      return update_kernel<f16, kRank>(kind.wide, access);
    default:
      return update_kernel<float, kRank>(kind.wide, access);
  }
}

UpdateKernel kernel_of(const Kind& kind, Rounding rounding) {
  const Access access = kind.elements                      ? Access::elements
                        : rounding == Rounding::stochastic ? Access::stochastic
                                                           : Access::nearest;
  switch (kind.rank) {
    case 16:
      return kernel_of<16>(kind, access);
    case 32:
      return kernel_of<32>(kind, access);
    case 64:
      return kernel_of<64>(kind, access);
    case 128:
      return kernel_of<128>(kind, access);
    default:
      return kernel_of<256>(kind, access);
  }
}

// W as (m', n') and the kernel it takes.
std::pair<Kind, UpdateItem> describe(const LowRank& in) {
  const Matrix& w = in.w;
  UpdateItem item{};
  item.w = w.data, item.u = in.u.data, item.v = in.v.data;
  item.rows = in.u.rows, item.columns = in.v.rows;
  // Rows of (m', n') that begin at even distances, or else W's own.
  if (w.rows == 1 || w.stride == w.columns)
    item.w_stride = item.columns;
  else if (w.columns == item.columns)
    item.w_stride = w.stride;
  else
    item.w_stride = w.stride, item.w_columns = w.columns;
  item.u_stride = in.u.stride, item.v_stride = in.v.stride;
  item.stream = in.stream;
  item.rank = static_cast<uint16_t>(in.u.columns);
  item.u_wide = in.u.dtype == Dtype::float32, item.v_wide = in.v.dtype == Dtype::float32;
  const double size = static_cast<double>(item.rows) * static_cast<double>(item.columns);
  item.mu = static_cast<float>(std::sqrt(size) / static_cast<double>(item.rank));

  const int64_t bytes = size_of(w.dtype), vector = 16 / bytes;
  const bool whole = item.w_columns == 0 && item.columns % vector == 0 &&
                     (item.rows == 1 || item.w_stride % vector == 0) &&
                     reinterpret_cast<uintptr_t>(w.data) % 16 == 0;
  Kind kind{w.dtype, item.u_wide || item.v_wide, 16, !whole};
  while (kind.rank < item.rank) kind.rank *= 2;
  return {kind, item};
}

// How many tiles a thread block takes one after another. Many, because each block makes P first,
// which takes the time of about one tile; but so few that all multiprocessors end together.
int64_t tiles_of_block(const UpdateItem* items, int64_t count, const UpdateKernel& kernel,
                       int64_t resident) {
  int64_t longest = 1;
  for (int64_t i = 0; i < count; ++i)
    longest = std::max(longest, ceil_div(items[i].columns, kernel.tile_columns));
  constexpr int64_t kMost = 512;
  constexpr double kStart = 1.0;  // tiles
  int64_t best = 1;
  double best_time = INFINITY;
  for (int64_t tiles = std::min(longest, kMost); tiles > 0;
       tiles = std::min(tiles - 1, tiles * 15 / 16)) {
    int64_t blocks = 0;
    double work = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t strips = ceil_div(items[i].rows, kernel.tile_rows);
      const int64_t steps = ceil_div(items[i].columns, kernel.tile_columns);
      const int64_t chunks = ceil_div(steps, tiles);
      blocks += strips * chunks;
      work += static_cast<double>(strips) *
              (static_cast<double>(steps) + kStart * static_cast<double>(chunks));
    }
    // Rounds of resident blocks. The memory is busy with most of them, and when few are left each
    // is faster, up to twice.
    const double rest = static_cast<double>(blocks % resident) / static_cast<double>(resident);
    const double least = blocks < resident ? 0.8 : 0.5;
    const double rounds =
        static_cast<double>(blocks / resident) + (rest > 0 ? std::max(rest, least) : 0.0);
    const double time = work / static_cast<double>(blocks) * rounds;
    if (time < best_time) best_time = time, best = tiles;
  }
  return best;
}

constexpr int64_t kMostScratch = 1 << 20;

// Thread blocks make their own core where that takes each thread a few quads of noise.
bool own_cores(int rank, int64_t queries) {
  return rank <= kMostOwnRank && (rank * rank / 4) * queries <= 8 * 256;
}

template <class Batch>
std::shared_ptr<const Batch> batch_of(const std::vector<UpdateItem>& items,
                                      const std::vector<uint32_t>& first) {
  auto batch = std::make_shared<Batch>();
  std::copy(items.begin(), items.end(), batch->items);
  std::copy(first.begin(), first.end(), batch->first);
  batch->count = static_cast<int32_t>(items.size());
  return batch;
}

// A launch from the items at `at` on, which it passes.
Status next_launch(const Kind& kind, const std::vector<UpdateItem>& all, size_t& at,
                   int64_t processors, UpdateLaunch& out) {
  out.kernel[0] = kernel_of(kind, Rounding::nearest);
  out.kernel[1] = kernel_of(kind, Rounding::stochastic);
  const UpdateKernel& kernel = out.kernel[0];
  std::vector<UpdateItem> items;
  int64_t basis_bytes = 0;
  for (; at < all.size() && items.size() < kManyItems; ++at) {
    UpdateItem item = all[at];
    const int64_t floats = int64_t{item.rank} * item.rank;
    basis_bytes += item.rows * item.rank * (item.u_wide ? 4 : 2);
    if (!items.empty() && (out.core_floats + floats) * 4 > kMostScratch + basis_bytes) break;
    item.core = static_cast<uint32_t>(out.core_floats);
    out.core_floats += floats;
    out.most_rank = std::max<int>(out.most_rank, item.rank);
    items.push_back(item);
  }
  const int64_t tiles = tiles_of_block(items.data(), static_cast<int64_t>(items.size()), kernel,
                                       processors * kernel.resident);
  std::vector<uint32_t> first;
  int64_t blocks = 0;
  for (UpdateItem& item : items) {
    const int64_t steps = ceil_div(item.columns, kernel.tile_columns);
    const int64_t chunks = ceil_div(steps, tiles);
    item.chunk = static_cast<uint32_t>(ceil_div(steps, chunks) * kernel.tile_columns);
    item.chunks = static_cast<uint32_t>(ceil_div(item.columns, item.chunk));
    first.push_back(static_cast<uint32_t>(blocks));
    blocks += ceil_div(item.rows, kernel.tile_rows) * item.chunks;
    if (blocks > INT32_MAX) return failure("too many elements for one launch");
  }
  out.blocks = static_cast<uint32_t>(blocks);
  out.count = static_cast<int64_t>(items.size());
  if (kernel.few != nullptr && items.size() <= kFewItems)
    out.few = batch_of<FewItems>(items, first);
  else
    out.many = batch_of<ManyItems>(items, first);
  for (const UpdateKernel& each : out.kernel) {
    if (each.shared_bytes <= 48 << 10) continue;
    const cudaError_t error =
        cudaFuncSetAttribute(out.few ? each.few : each.many,
                             cudaFuncAttributeMaxDynamicSharedMemorySize, each.shared_bytes);
    if (error != cudaSuccess) return status_of(error);
  }
  return Status{};
}

}  // namespace

Status UpdatePlan::prepare(const LowRank* items, int64_t count, int device) {
  device_ = device;
  const DeviceGuard guard(device);
  int processors = 0, generation = 0, driver = 0;
  cudaError_t error = guard.error();
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&generation, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return status_of(error);
  overlap_ = generation >= 9 && driver >= 12030;  // older drivers cannot capture it in a graph
  std::map<Kind, std::vector<UpdateItem>> kinds;
  for (int64_t i = 0; i < count; ++i) {
    if (items[i].u.columns > kMostRank) return failure("no kernel for a rank above 256");
    const auto [kind, item] = describe(items[i]);
    kinds[kind].push_back(item);
  }
  for (auto& [kind, list] : kinds) {
    // Large ones first: the multiprocessors end together on the small ones.
    std::stable_sort(list.begin(), list.end(), [](const UpdateItem& a, const UpdateItem& b) {
      return a.rows * a.columns > b.rows * b.columns;
    });
    for (size_t at = 0; at < list.size();) {
      launches_.emplace_back();
      const Status status = next_launch(kind, list, at, processors, launches_.back());
      if (!status.ok) return status;
    }
  }
  return Status{};
}

int64_t UpdatePlan::scratch_bytes(int64_t queries) const {
  int64_t most = 0;
  for (const UpdateLaunch& launch : launches_)
    if (!own_cores(launch.most_rank, queries)) most = std::max(most, launch.core_floats * 4);
  return most;
}

cudaError_t launch_kernel(const void* kernel, dim3 blocks, int threads, int shared_bytes,
                          void** arguments, const Place& place) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = place.stream;
  config.attrs = &overlap;
  config.numAttrs = place.overlap ? 1 : 0;
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

Status UpdatePlan::run(UpdateCall call, void* scratch, cudaStream_t stream) const {
  const DeviceGuard guard(device_);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const Place place{stream, overlap_};
  const float* const given = call.cores;
  for (const UpdateLaunch& launch : launches_) {
    call.cores = given;
    call.cores_made = given == nullptr && !own_cores(launch.most_rank, call.queries);
    if (call.cores_made) {
      float* const cores = static_cast<float*>(scratch);
      const cudaError_t error = make_cores(launch, call, cores, place);
      if (error != cudaSuccess) return status_of(error);
      call.cores = cores;
    }
    const UpdateKernel& kernel = launch.kernel[call.stochastic ? 1 : 0];
    void* arguments[] = {launch.batch(), &call};
    const cudaError_t error =
        launch_kernel(launch.few ? kernel.few : kernel.many, dim3(launch.blocks), kernel.threads,
                      kernel.shared_bytes, arguments, place);
    if (error != cudaSuccess) return status_of(error);
  }
  return Status{};
}

}  // namespace subzero::cuda
