// The host's side of updates: which kernel, which thread blocks, in which launch.
#include "lowrank_update.cuh"

#include <algorithm>
#include <cmath>
#include <cstdlib>
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

// What the device lets a thread block have.
struct Room {
  int64_t processors;
  int64_t block_bytes;      // of shared memory
  int64_t processor_bytes;  // of all blocks on a multiprocessor
  int64_t reserved_bytes;   // of these, by each

  // Left for P in a block of this kernel.
  int64_t of(const UpdateKernel& kernel) const {
    return std::min(block_bytes, processor_bytes / kernel.resident - reserved_bytes) -
           kernel.fixed_bytes;
  }
};

// Bytes of P for a strip.
int64_t strip_bytes(const UpdateItem& item, const UpdateKernel& kernel) {
  return 512 * item.strip + (kernel.scaled ? 16 : 0);
}

int64_t left_bytes(const UpdateItem& item, const UpdateKernel& kernel) {
  return ceil_div(item.rows, 16) * strip_bytes(item, kernel);
}

// What depends on the kernel: how P is stored, how warps lie.
void arrange(UpdateItem& item, const UpdateKernel& kernel, const Kind& kind, const Room& room) {
  item.steps = static_cast<uint8_t>(kind.rank == 16 ? 1 : 2 * ceil_div(item.rank, 32));
  item.strip = static_cast<uint8_t>(kernel.parts * item.steps);
  const int64_t most = room.of(kernel) / (kernel.stages * strip_bytes(item, kernel));
  while (
      kernel.warps >> item.across > 1 &&
      (item.columns > int64_t{kernel.columns} << item.across || kernel.warps >> item.across > most))
    ++item.across;
  item.chunks =
      static_cast<uint32_t>(ceil_div(item.columns, int64_t{kernel.columns} << item.across));
}

// How many tiles a unit of this item has if others have `tiles`.
int64_t tiles_of(const UpdateItem& item, const UpdateKernel& kernel, int64_t tiles) {
  return std::min(tiles, ceil_div(item.rows, 16 * (kernel.warps >> item.across)));
}

int64_t phases_of(const UpdateItem& item, const UpdateKernel& kernel, int64_t tiles) {
  return ceil_div(item.rows, 16 * (kernel.warps >> item.across) * tiles);
}

int64_t units_of(const UpdateItem& item, const UpdateKernel& kernel, int64_t tiles) {
  return phases_of(item, kernel, tiles) * item.chunks;
}

// How many tiles a thread block takes one after another. Many, because each block reads V first;
// but so few that blocks follow each other through memory closely, and that all multiprocessors end
// together.
int64_t best_tiles(const std::vector<UpdateItem>& items, const UpdateKernel& kernel,
                   const Kind& kind, const Room& room) {
  const bool quick = kind.rank <= 64;      // to read V
  const double start = quick ? 1.0 : 4.0;  // tiles
  const auto resident = room.processors * kernel.resident;
  int64_t most =
      (quick ? 256 << 10 : 1 << 20) / (16 * kernel.warps * kernel.columns * size_of(kind.weight));
#if defined(SUBZERO_TUNE)
  if (const char* const given = std::getenv("SUBZERO_TUNE_TILES")) most = std::atoi(given);
#endif
  int64_t best = 1;
  double best_time = INFINITY;
  for (int64_t tiles = most; tiles > 0; --tiles) {
    int64_t units = 0;
    double work = 0;
    for (const UpdateItem& item : items) {
      const int64_t count = units_of(item, kernel, tiles_of(item, kernel, tiles));
      units += count;
      work += static_cast<double>(units_of(item, kernel, 1)) + start * static_cast<double>(count);
    }
    // Rounds of resident blocks. Where few are left each is faster, up to twice, but a first round
    // that is not full leaves memory idle.
    const double rest = static_cast<double>(units % resident) / static_cast<double>(resident);
    const double least = units < resident ? 0.95 : 0.5;
    const double rounds =
        static_cast<double>(units / resident) + (rest > 0 ? std::max(rest, least) : 0.0);
    const double time = work / static_cast<double>(units) * rounds;
    if (time < best_time) best_time = time, best = tiles;
  }
  return best;
}

constexpr int64_t kMostScratch = 1 << 20;

template <class Batch>
std::shared_ptr<const Batch> batch_of(const std::vector<UpdateItem>& items,
                                      const std::vector<uint32_t>& first_unit,
                                      const std::vector<uint32_t>& first_block, int64_t turns) {
  auto batch = std::make_shared<Batch>();
  batch->left_turns = static_cast<int32_t>(turns);
  std::copy(items.begin(), items.end(), batch->items);
  std::copy(first_unit.begin(), first_unit.end(), batch->first_unit);
  std::copy(first_block.begin(), first_block.end(), batch->first_block);
  batch->count = static_cast<int32_t>(items.size());
  return batch;
}

// The first `rows` rows of an item, which loses them.
UpdateItem cut(UpdateItem& item, int64_t rows, const Kind& kind) {
  UpdateItem top = item;
  top.rows = rows;
  item.rows -= rows;
  item.first += rows * item.columns;
  item.u = static_cast<const char*>(item.u) +
           rows * item.u_stride * (item.u_wide ? 4 : size_of(kind.weight));
  if (item.w_columns == 0)
    item.w = static_cast<char*>(item.w) + rows * item.w_stride * size_of(kind.weight);
  return top;
}

// A launch from the items at `at` on, which it passes; P and the cores within `scratch` bytes.
Status next_launch(const Kind& kind, std::vector<UpdateItem>& all, size_t& at, const Room& room,
                   int64_t scratch, UpdateLaunch& out) {
  out.kernel[0] = kernel_of(kind, Rounding::nearest);
  out.kernel[1] = kernel_of(kind, Rounding::stochastic);
  const UpdateKernel& kernel = out.kernel[0];
  std::vector<UpdateItem> items;
  while (at < all.size() && items.size() < kManyItems) {
    UpdateItem& next = all[at];
    arrange(next, kernel, kind, room);
    const int64_t floats = int64_t{next.rank} * next.rank;
    const int64_t left = scratch - out.left_bytes - 4 * (out.core_floats + floats);
    const bool whole = left_bytes(next, kernel) <= left;
    const int64_t rows = left / strip_bytes(next, kernel) * 16;
    if (!whole && !items.empty()) break;
    if (!whole && rows < 16) return failure("no room for the scratch of a single strip of rows");
    UpdateItem item = whole ? next : cut(next, rows, kind);
    if (whole) ++at;
    item.left = static_cast<uint32_t>(out.left_bytes / 16);
    item.core = static_cast<uint32_t>(out.core_floats);
    out.left_bytes += left_bytes(item, kernel);
    out.core_floats += floats;
    out.most_rank = std::max<int>(out.most_rank, item.rank);
    items.push_back(item);
  }
  const int64_t tiles = best_tiles(items, kernel, kind, room);
  std::vector<uint32_t> first_unit, first_block;
  int64_t units = 0, blocks = 0, bytes = 0;
  // Where P is much work its blocks save themselves some of the time that C takes.
  for (const UpdateItem& item : items)
    blocks += ceil_div(item.rows, 16 * kLeftWarps) * item.panels();
  const int64_t turns = blocks > 16 * room.processors ? 4 : blocks > room.processors ? 2 : 1;
  blocks = 0;
  for (UpdateItem& item : items) {
    const int64_t phases = phases_of(item, kernel, tiles_of(item, kernel, tiles));
    item.phases = static_cast<uint32_t>(phases);
    first_unit.push_back(static_cast<uint32_t>(units));
    first_block.push_back(static_cast<uint32_t>(blocks));
    units += phases * item.chunks;
    blocks += ceil_div(item.rows, 16 * kLeftWarps * turns) * item.panels();
    bytes =
        std::max(bytes, kernel.stages * (kernel.warps >> item.across) * strip_bytes(item, kernel));
    if (units > INT32_MAX) return failure("too many elements for one launch");
  }
  out.units = static_cast<uint32_t>(units);
  out.blocks = static_cast<uint32_t>(blocks);
  out.count = static_cast<int64_t>(items.size());
  out.shared_bytes = static_cast<int>(kernel.fixed_bytes + bytes);
  if (out.shared_bytes > room.block_bytes) return failure("too little shared memory for this rank");
  if (kernel.few != nullptr && items.size() <= kFewItems)
    out.few = batch_of<FewItems>(items, first_unit, first_block, turns);
  else
    out.many = batch_of<ManyItems>(items, first_unit, first_block, turns);
  for (const UpdateKernel& each : out.kernel) {
    // All that there is: other launches of the same kernel may need more than this one.
    const cudaError_t error = cudaFuncSetAttribute(out.few ? each.few : each.many,
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(room.block_bytes));
    if (error != cudaSuccess) return status_of(error);
  }
  return Status{};
}

}  // namespace

Status UpdatePlan::prepare(const LowRank* items, int64_t count, int device) {
  device_ = device;
  const DeviceGuard guard(device);
  int generation = 0, driver = 0, block = 0, processor = 0, reserved = 0;
  const std::pair<int*, cudaDeviceAttr> attributes[] = {
      {&processors_, cudaDevAttrMultiProcessorCount},
      {&generation, cudaDevAttrComputeCapabilityMajor},
      {&block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {&reserved, cudaDevAttrReservedSharedMemoryPerBlock},
  };
  cudaError_t error = guard.error();
  for (const auto& [value, attribute] : attributes)
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return status_of(error);
  overlap_ = generation >= 9 && driver >= 12030;  // older drivers cannot capture it in a graph
#if defined(SUBZERO_TUNE)
  if (std::getenv("SUBZERO_TUNE_NO_OVERLAP") != nullptr) overlap_ = false;
#endif
  const Room room{processors_, block, processor, reserved};
  std::map<Kind, std::vector<UpdateItem>> kinds;
  int64_t scratch = kMostScratch;
  for (int64_t i = 0; i < count; ++i) {
    if (items[i].u.columns > kMostRank) return failure("no kernel for a rank above 256");
    const auto [kind, item] = describe(items[i]);
    kinds[kind].push_back(item);
    scratch += item.rows * item.rank * (item.u_wide ? 4 : size_of(kind.weight));
  }
  for (auto& [kind, list] : kinds) {
    // Large ones first: the multiprocessors end together on the small ones.
    std::stable_sort(list.begin(), list.end(), [](const UpdateItem& a, const UpdateItem& b) {
      return a.rows * a.columns > b.rows * b.columns;
    });
    for (size_t at = 0; at < list.size();) {
      launches_.emplace_back();
      const Status status = next_launch(kind, list, at, room, scratch, launches_.back());
      if (!status.ok) return status;
    }
  }
  return Status{};
}

bool UpdatePlan::own_cores(const UpdateLaunch& launch, int64_t queries) const {
  const int64_t panel = std::min<int64_t>(launch.most_rank, kLeftPanel);
  const int64_t quads = launch.most_rank * panel / 4 * queries;  // of a thread block
  return quads <= 8 * 32 * kLeftWarps &&
         (launch.blocks <= 4 * static_cast<uint32_t>(processors_) || quads <= 32 * kLeftWarps);
}

int64_t UpdatePlan::scratch_bytes(int64_t queries) const {
  int64_t most = 0;
  for (const UpdateLaunch& launch : launches_) {
    const bool made = queries > 0 && !own_cores(launch, queries);
    most = std::max(most, launch.left_bytes + (made ? launch.core_floats * 4 : 0));
  }
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
  call.left = static_cast<uint4*>(scratch);
  for (const UpdateLaunch& launch : launches_) {
    call.cores = given;
    if (given == nullptr && !own_cores(launch, call.queries)) {
      float* const cores =
          reinterpret_cast<float*>(static_cast<unsigned char*>(scratch) + launch.left_bytes);
      const cudaError_t error = make_cores(launch, call, cores, place);
      if (error != cudaSuccess) return status_of(error);
      call.cores = cores;
    }
    const UpdateKernel& kernel = launch.kernel[call.stochastic ? 1 : 0];
    void* arguments[] = {launch.batch(), &call};
    const cudaError_t error =
        launch_kernel(launch.few ? kernel.left_few : kernel.left_many, dim3(launch.blocks),
                      32 * kLeftWarps, 0, arguments, place);
    if (error != cudaSuccess) return status_of(error);
    const cudaError_t next =
        launch_kernel(launch.few ? kernel.few : kernel.many, dim3(launch.units), 32 * kernel.warps,
                      launch.shared_bytes, arguments, place);
    if (next != cudaSuccess) return status_of(next);
  }
  return Status{};
}

LowRankPlan::LowRankPlan() : plan_(new UpdatePlan) {}
LowRankPlan::~LowRankPlan() {
  delete plan_;
}

Status LowRankPlan::prepare(const LowRank* items, int64_t count, int device) {
  return plan_->prepare(items, count, device);
}

int64_t LowRankPlan::scratch_bytes(int64_t queries) const {
  return plan_->scratch_bytes(queries);
}

}  // namespace subzero::cuda
