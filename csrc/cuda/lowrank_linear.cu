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

int ceil_div(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

// Clusters of `blocks`, and a start before the kernel before has ended.
void set_attributes(cudaLaunchAttribute (&attributes)[2], unsigned blocks) {
  attributes[0] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {blocks, 1, 1};
  attributes[1] = {};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
}

template <int kRank, bool kHalf>
Status launch_inner(const LowRankLinear& args, int multiprocessors, cudaStream_t stream) {
  using Shape = InnerShape<kRank>;
  CUtensorMap x_map, v_map;
  if (!map_tiles(x_map, args.x, Shape::kRows) || !map_tiles(v_map, args.v, Shape::kDepth))
    return failure("the driver makes no tensor maps of these layouts");
  const auto kernel = lowrank_linear_inner_kernel<Shape, kHalf>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kShared);
  if (error != cudaSuccess) return status_of(error);
  const LinearInner inner{args.core, args.h, args.x.rows / args.groups,
                          ceil_div(args.x.columns, Shape::kDepth),
                          static_cast<int>(args.u.columns)};
  const int tiles = ceil_div(inner.group_rows, Shape::kRows);
  unsigned splits = 1;
  while (splits < 8 && tiles * args.groups * splits <= multiprocessors) splits *= 2;
  cudaLaunchAttribute attributes[2];
  set_attributes(attributes, splits);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(splits, tiles, static_cast<unsigned>(args.groups));
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = Shape::kShared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return status_of(cudaLaunchKernelEx(&config, kernel, x_map, v_map, inner));
}

template <bool kHalf>
Status launch_inner_of_rank(const LowRankLinear& args, int multiprocessors, cudaStream_t stream) {
  if (args.u.columns <= 64) return launch_inner<64, kHalf>(args, multiprocessors, stream);
  if (args.u.columns <= 128) return launch_inner<128, kHalf>(args, multiprocessors, stream);
  return launch_inner<256, kHalf>(args, multiprocessors, stream);
}

template <class Shape, bool kHalf>
Status launch_linear(const LowRankLinear& args, int multiprocessors, cudaStream_t stream) {
  const int64_t rank = args.u.columns;
  const Matrix h{args.h, args.x.rows, rank, rank, args.x.dtype};
  CUtensorMap x_map, w_map, h_map, u_map;
  if (!map_tiles(x_map, args.x, Shape::kRows) || !map_tiles(w_map, args.w, Shape::kColumns / 2) ||
      !map_tiles(h_map, h, Shape::kRows) || !map_tiles(u_map, args.u, Shape::kColumns / 2))
    return failure("the driver makes no tensor maps of these layouts");
  const auto kernel = lowrank_linear_kernel<Shape, kHalf>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kShared);
  if (error != cudaSuccess) return status_of(error);
  const int rows = static_cast<int>(args.x.rows);
  const int group_rows = args.bias_groups > 1 ? rows / static_cast<int>(args.bias_groups) : rows;
  LinearTiles tiles;
  tiles.group_blocks = ceil_div(group_rows, Shape::kRows);
  tiles.row_blocks = rows / group_rows * tiles.group_blocks;
  tiles.row_clusters = ceil_div(tiles.row_blocks, Shape::kCluster);
  tiles.columns = ceil_div(args.w.rows, Shape::kColumns);
  tiles.steps = ceil_div(args.x.columns, Shape::kDepth);
  tiles.rank = static_cast<int>(rank);
  const LinearOut y{args.y, rows, static_cast<int>(args.w.rows)};
  const LinearBias bias{args.bias, args.bias_dtype == Dtype::float32, group_rows};
  cudaLaunchAttribute attributes[2];
  set_attributes(attributes, Shape::kCluster);
  cudaLaunchConfig_t config{};
  const int clusters =
      std::min(tiles.row_clusters * tiles.columns, multiprocessors / Shape::kCluster);
  config.gridDim = dim3(clusters * Shape::kCluster);
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = Shape::kShared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return status_of(cudaLaunchKernelEx(&config, kernel, x_map, w_map, h_map, u_map, tiles, y, bias));
}

// The time of a call in tiles' own unit: how many one after another, by what one takes.
template <class Shape>
double cost(const LowRankLinear& args, int multiprocessors) {
  const int64_t tiles = int64_t{ceil_div(args.x.rows, Shape::kRows * Shape::kCluster)} *
                        ceil_div(args.w.rows, Shape::kColumns);
  const int64_t waves = (tiles * Shape::kCluster + multiprocessors - 1) / multiprocessors;
  // Products, and what does not shrink with the tile: filling the ring, writing the sums.
  const double depth = static_cast<double>(args.x.columns);
  return static_cast<double>(waves) * (Shape::kRows * Shape::kColumns * (depth + 96) + 32e6);
}

using Tall128 = LinearShape<2, 128>;
using Tall160 = LinearShape<2, 160>;
using Low128 = LinearShape<1, 128>;
using Low256 = LinearShape<1, 256>;

template <bool kHalf>
Status launch_best(const LowRankLinear& args, int multiprocessors, cudaStream_t stream, int shape) {
  const double costs[] = {cost<Tall128>(args, multiprocessors),
                          cost<Tall160>(args, multiprocessors), cost<Low128>(args, multiprocessors),
                          cost<Low256>(args, multiprocessors)};
  if (shape < 0) shape = static_cast<int>(std::min_element(costs, costs + 4) - costs);
  switch (shape) {
    case 0:
      return launch_linear<Tall128, kHalf>(args, multiprocessors, stream);
    case 1:
      return launch_linear<Tall160, kHalf>(args, multiprocessors, stream);
    case 2:
      return launch_linear<Low128, kHalf>(args, multiprocessors, stream);
    default:
      return launch_linear<Low256, kHalf>(args, multiprocessors, stream);
  }
}

}  // namespace

Status lowrank_linear(const LowRankLinear& args, const Launch& launch, int shape) {
  if (args.x.rows * args.w.rows == 0) return Status{};
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  int multiprocessors = 0;
  const cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, launch.device);
  if (error != cudaSuccess) return status_of(error);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  const bool half = args.x.dtype == Dtype::float16;
  const Status inner = half ? launch_inner_of_rank<true>(args, multiprocessors, stream)
                            : launch_inner_of_rank<false>(args, multiprocessors, stream);
  if (!inner.ok) return inner;
  return half ? launch_best<true>(args, multiprocessors, stream, shape)
              : launch_best<false>(args, multiprocessors, stream, shape);
}

}  // namespace subzero::cuda
