// out^T (r x c) = a^T (r x N) D, D (N x c) being the weighted sum of the queries' noise, made where
// the tensor cores want it.
//
// A warp takes 32 columns of D and steps through rows, 16 at a time. Lane 4 q + t makes rows
// 4t .. 4t + 3 of columns 4q .. 4q + 3: a block of the generator a row. Those are what the lane
// holds of operand B of four mma, if mma j takes the columns j, j + 4, ..., and if its rows 2t,
// 2t + 1, 2t + 8, 2t + 9 are the lane's four; so no noise ever moves between lanes. Rows of a^T are
// dealt out such that a lane reads neighbours: row q of block m is 2 kM q + 2m, row q + 8 the next.
//
// Both operands are sums of bf16 parts, hi hi + hi lo + lo hi (a bf16 `a` is one part). A thread
// block adds up its warps' sums, and thread blocks of the same columns add theirs to one place in
// the order of their rows, each waiting for its turn: deterministic, with little memory.
#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "mma.cuh"
#include "noise.cuh"

namespace subzero::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kColumns = 32;  // of a thread block
constexpr int kStep = 16;     // rows
constexpr int kMostWidth = 128;

struct Plan {
  int64_t blocks;  // of columns
  int64_t splits;  // of rows
  int32_t steps;   // of a warp
};

// Where sums are until the last turn: in out if beta is 0, so that out is rounded once.
struct Partial {
  uint32_t* turns;  // how many thread blocks have started, then for each block of columns its turn
  float* sums;
  int64_t stride;
  float beta;
  float beta_rest;  // what fp32 loses of it
};

// By the shapes alone, as the order of sums depends on it. Long ones for few turns, but enough for
// all multiprocessors.
Plan plan_of(int64_t rows, int64_t columns) {
  constexpr int64_t kEnough = 512;
  Plan plan{(columns + kColumns - 1) / kColumns, 1, 16};
  do {
    plan.steps /= 2;
    plan.splits = (rows + kWarps * kStep * plan.steps - 1) / (kWarps * kStep * plan.steps);
  } while (plan.steps > 1 && plan.blocks * plan.splits < kEnough);
  plan.splits = std::max<int64_t>(plan.splits, 1);
  return plan;
}

// How a lane's rows of `a` arrive: 2 kM neighbours of each of four rows.
template <class A, int kM>
struct Rows {
  A value[4][2 * kM];

  // Vectors: rows are as wide as the tile and aligned.
  __device__ __forceinline__ void load(const Matrix& a, int64_t row, int column, bool vectors) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const A* const from = static_cast<const A*>(a.data) + (row + j) * a.stride + column;
      if (vectors && row + j < a.rows) {
        constexpr int kBytes = sizeof value[j] < 16 ? sizeof value[j] : 16;
        struct alignas(kBytes) Chunk {
          A part[kBytes / sizeof(A)];
        };
#pragma unroll
        for (int i = 0; i < 2 * kM; i += kBytes / sizeof(A)) {
          const Chunk chunk = *reinterpret_cast<const Chunk*>(from + i);
#pragma unroll
          for (int n = 0; n < kBytes / static_cast<int>(sizeof(A)); ++n)
            value[j][i + n] = chunk.part[n];
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2 * kM; ++i)
          value[j][i] = row + j < a.rows && column + i < a.columns ? from[i] : A{};
      }
    }
  }

  // Operand A of block m, in parts.
  static constexpr int kParts = std::is_same_v<A, bf16> ? 1 : 2;
  __device__ __forceinline__ void fragment(int m, FragmentA (&out)[kParts]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const A first = value[i / 2 * 2][2 * m + i % 2], second = value[i / 2 * 2 + 1][2 * m + i % 2];
      if constexpr (kParts == 1) {
        out[0][i] = static_cast<uint32_t>(second.bits) << 16 | first.bits;
      } else {
        uint32_t parts[kParts];
        if constexpr (std::is_same_v<A, f16>) {
          const float2 both = unpack_f16(static_cast<uint32_t>(second.bits) << 16 | first.bits);
          split(both.x, both.y, parts);
        } else {
          split(first, second, parts);
        }
        out[0][i] = parts[0], out[1][i] = parts[1];
      }
    }
  }
};

// Four neighbouring normals from any element on.
__device__ __forceinline__ Normals normals_from(const RoundKeys& keys, uint32_t stream,
                                                uint32_t draw, uint64_t element) {
  const auto block = [&](uint64_t number) {
    return Blocks(keys, stream, draw, static_cast<uint32_t>(number >> 32))
        .normals(keys, static_cast<uint32_t>(number));
  };
  const Normals first = block(element / 4);
  const auto skip = static_cast<uint32_t>(element % 4);
  if (skip == 0) return first;
  const Normals next = block(element / 4 + 1);
  const float all[7] = {first.z[0], first.z[1], first.z[2], first.z[3],
                        next.z[0],  next.z[1],  next.z[2]};
  Normals z;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    z.z[j] = skip == 1 ? all[j + 1] : skip == 2 ? all[min(j + 2, 6)] : all[min(j + 3, 6)];
  return z;
}

// The lane's four rows and four columns of D for one step; false if no row of the step has a
// weight.
__device__ __forceinline__ bool weighted_noise(const NoiseOuter& args, const RoundKeys& keys,
                                               uint32_t draw, int64_t row, int64_t column,
                                               float (&sum)[4][4]) {
  const int64_t count = args.a.rows, columns = args.out.rows;
  const auto element = [&](int j) {
    const auto of = static_cast<uint64_t>(row + j < count ? args.row[row + j] : 0);
    return of * static_cast<uint64_t>(columns) + static_cast<uint64_t>(column);
  };
  const auto block = [&](int j) { return element(j) / 4; };
  const auto blocks = [&](uint64_t number) {
    return Blocks(keys, args.stream, draw, static_cast<uint32_t>(number >> 32));
  };
  const uint64_t number[4] = {block(0), block(1), block(2), block(3)};
  const Blocks of_row[4] = {blocks(number[0]), blocks(number[1]), blocks(number[2]),
                            blocks(number[3])};
  const auto add = [&](int j, float weight, const Normals& z) {
#pragma unroll
    for (int n = 0; n < 4; ++n) sum[j][n] = fma_(weight, z.z[n], sum[j][n]);
  };
  bool any = false;
  const float* weights = args.queries.coeff + row;
#pragma unroll 1
  for (int64_t k = 0; k < args.queries.count; ++k, weights += count) {
    float weight[4];
    uint32_t drawn = 0;  // rows of any lane, as bits
#pragma unroll
    for (int j = 0; j < 4; ++j) weight[j] = row + j < count ? weights[j] : 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) drawn |= __any_sync(~0u, weight[j] != 0.0f) ? 1u << j : 0u;
    if (drawn == 0) continue;
    any = true;
    const uint32_t now = draw + static_cast<uint32_t>(k);
    if (drawn == 15 && columns % 4 == 0) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        add(j, weight[j],
            of_row[j].at_draw(keys, now).normals(keys, static_cast<uint32_t>(number[j])));
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (weight[j] != 0.0f) add(j, weight[j], normals_from(keys, args.stream, now, element(j)));
    }
  }
  return any;
}

// Waits until it is turn `turn`, and sees what those before have written.
__device__ __forceinline__ void wait_for_turn(const uint32_t* now, uint32_t turn) {
  if (threadIdx.x == 0) {
    uint32_t value;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(now) : "memory");
    } while (value != turn);
  }
  __syncthreads();
}

__device__ __forceinline__ void end_turn(uint32_t* now, uint32_t turn) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(now), "r"(turn + 1) : "memory");
}

template <class A, int kM>
__global__ void __launch_bounds__(32 * kWarps, kM == 8 ? 2 : 3)
    noise_outer_kernel(const __grid_constant__ NoiseOuter args, const __grid_constant__ Plan plan,
                       const __grid_constant__ Partial partial, bool vectors) {
  constexpr int kGroup = kM < 4 ? kM : 4;  // blocks of a^T summed over warps at a time
  __shared__ float shared[kWarps][8 * 2 * kGroup][32];
  __shared__ uint32_t started;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane / 4, t = lane % 4;
  // Units of work go out in order, so that whoever waits does so for one that runs already.
  uint32_t unit = blockIdx.x;
  if (plan.splits > 1) {
    if (threadIdx.x == 0) started = atomicAdd(partial.turns, 1u);
    __syncthreads();
    unit = started;
  }
  const int64_t turn = unit / plan.blocks, block = unit % plan.blocks;
  const RoundKeys keys(static_cast<uint64_t>(args.queries.rng[0]));
  const uint32_t draw = static_cast<uint32_t>(args.queries.rng[1]);
  const int64_t column = block * kColumns;

  float sum[kM][4][4] = {};  // of mma j and block m
  const int64_t first = (turn * kWarps + warp) * plan.steps * kStep;
#pragma unroll 1
  for (int step = 0; step < plan.steps; ++step) {
    const int64_t row = first + step * kStep + 4 * t;
    if (row - 4 * t >= args.a.rows) break;
    float noise[4][4] = {};
    if (!weighted_noise(args, keys, draw, row, column + 4 * q, noise)) continue;
    Rows<A, kM> a;
    a.load(args.a, row, 2 * kM * q, vectors);
    uint32_t b[4][2][2];  // mma, rows, part
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      split(noise[0][j], noise[1][j], b[j][0]);
      split(noise[2][j], noise[3][j], b[j][1]);
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      FragmentA fragment[Rows<A, kM>::kParts];
      a.fragment(m, fragment);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        mma<false>(sum[m][j], fragment[0], b[j][0][1], b[j][1][1]);
        if constexpr (Rows<A, kM>::kParts == 2)
          mma<false>(sum[m][j], fragment[1], b[j][0][0], b[j][1][0]);
        mma<false>(sum[m][j], fragment[0], b[j][0][0], b[j][1][0]);
      }
    }
  }

  // Lane 4 q + t holds columns 8t .. 8t + 7 and rows 2 kM q .. 2 kM (q + 1) of out^T; warp w adds
  // up columns 2w and 2w + 1 of those.
  float total[kM / kGroup][2][2 * kGroup];
#pragma unroll
  for (int g = 0; g < kM / kGroup; ++g) {
    if (g > 0) __syncthreads();
#pragma unroll
    for (int m = 0; m < kGroup; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          shared[warp][(4 * (i % 2) + j) * 2 * kGroup + 2 * m + i / 2][lane] =
              sum[g * kGroup + m][j][i];
    __syncthreads();
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int r = 0; r < 2 * kGroup; ++r) {
        float value = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) value += shared[w][(2 * warp + c) * 2 * kGroup + r][lane];
        total[g][c][r] = value;
      }
  }

  uint32_t* const now = partial.turns + 1 + block;
  if (turn > 0) wait_for_turn(now, static_cast<uint32_t>(turn));
  const bool last = turn == plan.splits - 1;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int64_t at = column + 8 * t + 2 * warp + c;
    if (at >= args.out.rows) continue;
    float* const out = static_cast<float*>(args.out.data) + at * args.out.stride;
    float* const sums = partial.sums + at * partial.stride;
#pragma unroll
    for (int g = 0; g < kM / kGroup; ++g)
#pragma unroll
      for (int r = 0; r < 2 * kGroup; ++r) {
        const int index = 2 * kM * q + 2 * kGroup * g + r;
        if (index >= args.out.columns) break;
        float value = total[g][c][r];
        // Past the first cache, which may hold what was there before another's turn.
        if (turn > 0) value += __ldcg(sums + index);
        if (!last) {
          __stcg(sums + index, value);
          continue;
        }
        if (partial.beta_rest != 0.0f) value = fma_(partial.beta_rest, out[index], value);
        if (partial.beta != 0.0f) value = fma_(partial.beta, out[index], value);
        out[index] = value;
      }
  }
  if (!last) end_turn(now, static_cast<uint32_t>(turn));
}

template <class A, int kM>
cudaError_t launch_kernel(const NoiseOuter& args, const Plan& plan, const Partial& partial,
                          cudaStream_t stream) {
  constexpr int64_t kBytes = std::min<int64_t>(16, 2 * kM * sizeof(A));
  const bool vectors = args.a.columns == 16 * kM &&
                       (args.a.rows == 1 || args.a.stride * sizeof(A) % kBytes == 0) &&
                       reinterpret_cast<uintptr_t>(args.a.data) % kBytes == 0;
  noise_outer_kernel<A, kM>
      <<<static_cast<unsigned>(plan.blocks * plan.splits), 32 * kWarps, 0, stream>>>(
          args, plan, partial, vectors);
  return cudaGetLastError();
}

template <class A>
cudaError_t launch_width(const NoiseOuter& args, const Plan& plan, const Partial& partial,
                         cudaStream_t stream) {
  const int64_t width = args.out.columns;
  if (width <= 16) return launch_kernel<A, 1>(args, plan, partial, stream);
  if (width <= 32) return launch_kernel<A, 2>(args, plan, partial, stream);
  if (width <= 64) return launch_kernel<A, 4>(args, plan, partial, stream);
  return launch_kernel<A, 8>(args, plan, partial, stream);
}

int64_t bytes_of_turns(const Plan& plan) {
  return (plan.blocks + 4) / 4 * 16;
}

}  // namespace

int64_t noise_outer_scratch_bytes(const NoiseOuter& args) {
  const Plan plan = plan_of(args.a.rows, args.out.rows);
  if (plan.splits == 1) return 0;
  const int64_t sums = args.beta == 0.0 ? 0 : args.out.rows * args.out.columns * 4;
  return bytes_of_turns(plan) + sums;
}

Status noise_outer_(const NoiseOuter& args, void* scratch, const Launch& launch) {
  const Matrix& out = args.out;
  if (out.rows * out.columns == 0) return Status{};
  if (out.columns > kMostWidth) return failure("no kernel for more than 128 columns");
  const Plan plan = plan_of(args.a.rows, out.rows);
  if (plan.blocks * plan.splits > INT32_MAX) return failure("too many elements for one launch");
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  Partial partial{static_cast<uint32_t*>(scratch), static_cast<float*>(out.data), out.stride,
                  static_cast<float>(args.beta), 0.0f};
  partial.beta_rest = static_cast<float>(args.beta - static_cast<double>(partial.beta));
  cudaError_t error = cudaSuccess;
  if (plan.splits > 1) {
    const int64_t bytes = bytes_of_turns(plan);
    if (args.beta != 0.0) {
      partial.sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + bytes);
      partial.stride = out.columns;
    }
    error = cudaMemsetAsync(scratch, 0, static_cast<size_t>(bytes), stream);
    if (error != cudaSuccess) return status_of(error);
  }
  switch (args.a.dtype) {
    case Dtype::bfloat16:
      error = launch_width<bf16>(args, plan, partial, stream);
      break;
    case Dtype::float16:
      error = launch_width<f16>(args, plan, partial, stream);
      break;
    default:
      error = launch_width<float>(args, plan, partial, stream);
      break;
  }
  return status_of(error);
}

}  // namespace subzero::cuda
