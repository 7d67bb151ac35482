// lowrank_linear on Hopper in 16 bits: h = (x V) C_g^T, then y = x W^T + h U^T + b in one product.
// Other GPUs, dtypes and layouts go through torch's GEMMs (backends/_gemms.py).
#include <algorithm>

#include "lowrank_linear_gemm.cuh"
#include "lowrank_linear_inner.cuh"

namespace subzero::cuda {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, without linking to the driver: machines without a GPU have none.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<EncodeTiled>(found)
               : nullptr;
  }();
  return function;
}

// Boxes of box_rows rows and 64 columns of a matrix of 16-bit numbers, zero beyond it.
bool map_tiles(CUtensorMap& map, const Matrix& matrix, int box_rows) {
  const EncodeTiled encode = encode_tiled();
  if (!encode) return false;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(matrix.columns),
                               static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(matrix.stride) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, ones[2] = {1, 1};
  const CUtensorMapDataType type = matrix.dtype == Dtype::float16
                                       ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode(&map, type, 2, matrix.data, sizes, stride, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

constexpr char kNoMaps[] = "the driver makes no tensor maps of these layouts";

// Of h, to the next multiple of 16.
int64_t inner_bytes(int64_t rows, int64_t rank) {
  return (rows * rank * 2 + 15) / 16 * 16;
}

int ceil_div(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

cudaLaunchAttribute cluster_of(unsigned blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {blocks, 1, 1};
  return attribute;
}

cudaLaunchConfig_t config_of(dim3 grid, int threads, int shared, cudaLaunchAttribute* attributes,
                             int count, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return config;
}

// ---- h in a kernel of its own

template <int kRank, bool kHalf>
Status launch_inner(const LowRankLinear& args, int multiprocessors, cudaStream_t stream) {
  using Shape = InnerShape<kRank>;
  CUtensorMap x_map, v_map;
  if (!map_tiles(x_map, args.x, Shape::kRows) || !map_tiles(v_map, args.v, Shape::kDepth))
    return failure(kNoMaps);
  const auto kernel = lowrank_linear_inner_kernel<Shape, kHalf>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kShared);
  if (error != cudaSuccess) return status_of(error);
  const LinearInner inner{args.core, args.scratch, args.x.rows / args.groups,
                          ceil_div(args.x.columns, Shape::kDepth),
                          static_cast<int>(args.u.columns)};
  const int tiles = ceil_div(inner.group_rows, Shape::kRows);
  unsigned splits = 1;
  while (splits < 8 && tiles * args.groups * splits <= multiprocessors) splits *= 2;
  cudaLaunchAttribute attributes[1] = {cluster_of(splits)};
  const dim3 grid(splits, tiles, static_cast<unsigned>(args.groups));
  const cudaLaunchConfig_t config =
      config_of(grid, Shape::kThreads, Shape::kShared, attributes, 1, stream);
  return status_of(cudaLaunchKernelEx(&config, kernel, x_map, v_map, inner));
}

template <bool kHalf>
Status launch_inner_of_rank(const LowRankLinear& args, int multiprocessors, cudaStream_t stream) {
  if (args.u.columns <= 64) return launch_inner<64, kHalf>(args, multiprocessors, stream);
  if (args.u.columns <= 128) return launch_inner<128, kHalf>(args, multiprocessors, stream);
  return launch_inner<256, kHalf>(args, multiprocessors, stream);
}

// ---- y

template <class Shape>
LinearTiles tiles_of(const LowRankLinear& args, bool inside) {
  const int rows = static_cast<int>(args.x.rows);
  const int64_t groups = inside ? args.groups : std::max<int64_t>(args.bias.rows, 1);
  LinearTiles tiles;
  tiles.group_rows = rows / static_cast<int>(groups);
  tiles.group_blocks = ceil_div(tiles.group_rows, Shape::kRows);
  tiles.row_blocks = static_cast<int>(groups) * tiles.group_blocks;
  tiles.row_clusters = ceil_div(tiles.row_blocks, Shape::kCluster);
  tiles.columns = ceil_div(args.w.rows, Shape::kColumns);
  tiles.steps = ceil_div(args.x.columns, Shape::kDepth);
  tiles.rank = static_cast<int>(args.u.columns);
  return tiles;
}

template <class Shape, bool kHalf, bool kInside>
Status launch_product(const LowRankLinear& args, int multiprocessors, cudaStream_t stream) {
  const int64_t rank = args.u.columns, h_bytes = inner_bytes(args.x.rows, rank);
  const Matrix h{args.scratch, args.x.rows, rank, rank, args.x.dtype};
  LinearMaps maps{};
  if (!map_tiles(maps.x, args.x, Shape::kRows) || !map_tiles(maps.w, args.w, Shape::kColumns / 2) ||
      !map_tiles(maps.h, h, Shape::kRows) || !map_tiles(maps.u, args.u, Shape::kColumns / 2) ||
      (kInside && !map_tiles(maps.v, args.v, Shape::kDepth / 2)))
    return failure(kNoMaps);
  const auto kernel = lowrank_linear_kernel<Shape, kHalf, kInside>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kShared);
  if (error != cudaSuccess) return status_of(error);
  const LinearTiles tiles = tiles_of<Shape>(args, kInside);
  const LinearOut y{args.y, static_cast<int>(args.x.rows), static_cast<int>(args.w.rows)};
  const LinearBias bias{args.bias.data, args.bias.stride, args.bias.dtype == Dtype::float32,
                        args.bias.rows > 1};
  int* const ready = reinterpret_cast<int*>(static_cast<char*>(args.scratch) + h_bytes);
  if (kInside) {
    error = cudaMemsetAsync(ready, 0, tiles.row_blocks * sizeof(int), stream);
    if (error != cudaSuccess) return status_of(error);
  }
  const int clusters =
      std::min(tiles.row_clusters * (tiles.columns + kInside), multiprocessors / Shape::kCluster);
  cudaLaunchAttribute attributes[2] = {cluster_of(Shape::kCluster), {}};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = kInside;  // blocks that wait for each other are all there at once
  const cudaLaunchConfig_t config = config_of(dim3(clusters * Shape::kCluster), Shape::kThreads,
                                              Shape::kShared, attributes, kInside ? 2 : 1, stream);
  return status_of(cudaLaunchKernelEx(&config, kernel, maps, tiles, y, bias,
                                      LinearInside{args.core, args.scratch, ready}));
}

template <class Shape, bool kHalf>
Status launch(const LowRankLinear& args, bool inside, int multiprocessors, cudaStream_t stream) {
  if (inside) {
    const Status status = launch_product<Shape, kHalf, true>(args, multiprocessors, stream);
    if (status.ok) return status;
    cudaGetLastError();  // not all of the GPU is ours: no later call takes it for its own error
  }
  const Status status = launch_inner_of_rank<kHalf>(args, multiprocessors, stream);
  return status.ok ? launch_product<Shape, kHalf, false>(args, multiprocessors, stream) : status;
}

// ---- the choice

// Microseconds that a call takes, about: what an H100 took for 1,024 to 8,192 rows and layers 1,024
// to 20,480 wide, which it tells apart.
template <class Shape>
double estimate(const LowRankLinear& args, bool inside, int multiprocessors) {
  const LinearTiles tiles = tiles_of<Shape>(args, inside);
  const int64_t count = int64_t{tiles.row_clusters} * (tiles.columns + inside);
  const int waves = ceil_div(count * Shape::kCluster, multiprocessors);
  const double depth = static_cast<double>(args.x.columns) + 64;
  const double products = depth * Shape::kRows * Shape::kColumns / (Shape::kSmall ? 2.4e6 : 2.8e6);
  const double bytes = static_cast<double>(args.x.rows) * args.x.columns * 2;
  const double before = inside ? 6 : 9 + bytes / 2.7e6;
  return before + waves * (products + 1.5);
}

using Tall128 = LinearShape<2, 128>;
using Tall160 = LinearShape<2, 160>;
using Low128 = LinearShape<1, 128>;
using Low256 = LinearShape<1, 256>;
constexpr int kShapes = 4;

template <bool kHalf>
Status launch_best(const LowRankLinear& args, int choice, int multiprocessors,
                   cudaStream_t stream) {
  const bool fits = args.u.columns <= Tall128::kInner;
  if (choice < 0) {
    const double times[2 * kShapes] = {
        estimate<Tall128>(args, false, multiprocessors),
        estimate<Tall160>(args, false, multiprocessors),
        estimate<Low128>(args, false, multiprocessors),
        estimate<Low256>(args, false, multiprocessors),
        estimate<Tall128>(args, true, multiprocessors),
        estimate<Tall160>(args, true, multiprocessors),
        estimate<Low128>(args, true, multiprocessors),
        estimate<Low256>(args, true, multiprocessors),
    };
    choice = static_cast<int>(std::min_element(times, times + (fits ? 2 : 1) * kShapes) - times);
  }
  const bool inside = choice >= kShapes && fits;
  switch (choice % kShapes) {
    case 0:
      return launch<Tall128, kHalf>(args, inside, multiprocessors, stream);
    case 1:
      return launch<Tall160, kHalf>(args, inside, multiprocessors, stream);
    case 2:
      return launch<Low128, kHalf>(args, inside, multiprocessors, stream);
    default:
      return launch<Low256, kHalf>(args, inside, multiprocessors, stream);
  }
}

}  // namespace

int64_t lowrank_linear_scratch_bytes(int64_t rows, int64_t rank, int64_t groups) {
  return inner_bytes(rows, rank) + (rows / Low128::kRows + groups) * sizeof(int);
}

Status lowrank_linear(const LowRankLinear& args, const Launch& launch, int choice) {
  if (args.x.rows * args.w.rows == 0) return Status{};
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  int multiprocessors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, launch.device);
  if (error != cudaSuccess) return status_of(error);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  return args.x.dtype == Dtype::float16 ? launch_best<true>(args, choice, multiprocessors, stream)
                                        : launch_best<false>(args, choice, multiprocessors, stream);
}

}  // namespace subzero::cuda
