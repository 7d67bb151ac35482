// Rows E[id] + (U[id] C_g) V^T in one pass: E's rows are read where the sums of the tensor cores
// are, and the result is written from there.
//
// A warp has kBlocks times 16 tokens. It makes P = U[id] C once, (tokens x r), keeps it in
// registers as operand A, and walks over its columns, 32 at a time: four mma wide, of which mma j
// takes the columns 8 i + 2 j and the next, so that lane 4 q + t holds columns 8t .. 8t + 7.
// Operands along r are dealt out such that a lane reads 8 neighbours: two steps of 16 take 32 of r,
// and lane t those from 8t on. Everything is a sum of bf16 parts (mma.cuh): hi hi + hi lo + lo hi.
#include <algorithm>
#include <type_traits>

#include "batch.cuh"
#include "storage.cuh"

namespace subzero::cuda {
namespace {

constexpr int kWarps = 4;

// What the host finds out about layouts.
struct Layout {
  int64_t tiles;  // of a group's tokens
  int64_t chunk;  // columns of a thread block, a multiple of 32
  bool basis_vectors;
  bool weight_vectors;
};

// 8 neighbours of a row of U or V, in two parts, two to a register; zero from `left` on.
struct Eight {
  uint32_t part[2][4];

  __device__ __forceinline__ void load(const Matrix& basis, int64_t row, int64_t column,
                                       bool vectors) {
    const int64_t at = row * basis.stride + column, left = basis.columns - column;
    float value[8] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) part[0][i] = part[1][i] = 0;
    if (left <= 0) return;
    if (basis.dtype == Dtype::float32) {
      const float* const from = static_cast<const float*>(basis.data) + at;
      if (vectors) {
        const float4 a = __ldg(reinterpret_cast<const float4*>(from));
        const float4 b = __ldg(reinterpret_cast<const float4*>(from) + 1);
        value[0] = a.x, value[1] = a.y, value[2] = a.z, value[3] = a.w;
        value[4] = b.x, value[5] = b.y, value[6] = b.z, value[7] = b.w;
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (i < left) value[i] = __ldg(from + i);
      }
    } else {
      const uint16_t* const from = static_cast<const uint16_t*>(basis.data) + at;
      uint32_t pair[4] = {};
      if (vectors) {
        const uint4 all = __ldg(reinterpret_cast<const uint4*>(from));
        pair[0] = all.x, pair[1] = all.y, pair[2] = all.z, pair[3] = all.w;
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (i < left) pair[i / 2] |= static_cast<uint32_t>(__ldg(from + i)) << (i % 2 * 16);
      }
      if (basis.dtype == Dtype::bfloat16) {
#pragma unroll
        for (int i = 0; i < 4; ++i) part[0][i] = pair[i];
        return;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 both = unpack_f16(pair[i]);
        value[2 * i] = both.x, value[2 * i + 1] = both.y;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t parts[2];
      split(value[2 * i], value[2 * i + 1], parts);
      part[0][i] = parts[0], part[1][i] = parts[1];
    }
  }
};

__device__ __forceinline__ int64_t id_of(const LowRankEmbedding& args, int64_t token) {
  if (args.ids_wide) return static_cast<const int64_t*>(args.ids)[token];
  return static_cast<const int32_t*>(args.ids)[token];
}

template <class T>
struct Shape {
  static constexpr int kVec = 16 / sizeof(T);
  static constexpr int kParts = sizeof(T) == 4 ? 2 : 1;  // of P
};

// The P of a warp's tokens: operand A of step s of 16 along r, block by block, in parts.
template <class T, int kRank, int kBlocks>
struct Projection {
  FragmentA step[kBlocks][kRank / 16][Shape<T>::kParts];

  __device__ __forceinline__ void make(const LowRankEmbedding& args, const Layout& layout,
                                       const float* core, const int64_t (&id)[kBlocks][2], int q,
                                       int t) {
    const int64_t rank = args.u.columns;
    // Eight columns of P at a time, as 8 of 32: those 8 i + 2 c and the next, c = 0 .. 3.
#pragma unroll
    for (int wide = 0; wide < kRank / 32; ++wide) {
      float sum[kBlocks][4][4] = {};
#pragma unroll 1
      for (int p = 0; p < kRank / 32 && 32 * p < rank; ++p) {
        Eight u[kBlocks][2];
#pragma unroll
        for (int m = 0; m < kBlocks; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            u[m][h].load(args.u, id[m][h], 32 * p + 8 * t, layout.basis_vectors);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int64_t column = 32 * wide + q / 2 * 8 + 2 * c + q % 2;
          uint32_t part[4][2];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int64_t row = 32 * p + 8 * t + 2 * i;
            const float* const from = core + row * rank + column;
            const bool real = column < rank;
            split(real && row < rank ? __ldg(from) : 0.0f,
                  real && row + 1 < rank ? __ldg(from + rank) : 0.0f, part[i]);
          }
#pragma unroll
          for (int m = 0; m < kBlocks; ++m)
#pragma unroll
            for (int s = 0; s < 2; ++s) {
              const auto operand = [&](int kind, FragmentA& a) {
                a[0] = u[m][0].part[kind][2 * s], a[1] = u[m][1].part[kind][2 * s];
                a[2] = u[m][0].part[kind][2 * s + 1], a[3] = u[m][1].part[kind][2 * s + 1];
              };
              FragmentA high, low;
              operand(0, high), operand(1, low);
              mma<false>(sum[m][c], high, part[2 * s][1], part[2 * s + 1][1]);
              if (args.u.dtype != Dtype::bfloat16)
                mma<false>(sum[m][c], low, part[2 * s][0], part[2 * s + 1][0]);
              mma<false>(sum[m][c], high, part[2 * s][0], part[2 * s + 1][0]);
            }
        }
      }
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float (&from)[4] = sum[m][2 * s + i / 2];
            uint32_t parts[Shape<T>::kParts];
            split(from[i % 2 * 2], from[i % 2 * 2 + 1], parts);
#pragma unroll
            for (int k = 0; k < Shape<T>::kParts; ++k) step[m][2 * wide + s][k][i] = parts[k];
          }
    }
  }
};

// out = w + sum for 8 neighbours of a row, of which `left` are there.
template <class T>
__device__ __forceinline__ void add_eight(const T* w, T* out, int64_t left, const float (&sum)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < left) round_nearest(to_float(w[i]) + sum[i], out[i]);
}

template <class T, int kRank, int kBlocks>
__global__ void __launch_bounds__(32 * kWarps, kRank == 128 ? 2 : 3)
    lowrank_embedding_kernel(const __grid_constant__ LowRankEmbedding args,
                             const __grid_constant__ Layout layout) {
  constexpr int kVec = Shape<T>::kVec, kParts = Shape<T>::kParts, kVectors = 8 / kVec;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, q = lane / 4, t = lane % 4;
  const int64_t group = blockIdx.x / layout.tiles;
  const int64_t first = (blockIdx.x % layout.tiles * kWarps + warp) * 16 * kBlocks;
  if (first >= args.tokens) return;
  const int64_t columns = args.w.columns, rank = args.u.columns;

  // Tokens q and q + 8 of each block: bit 2 m + h of `real` says whether they are there, and of
  // `wrong` whether the id is out of range, which gives NaN.
  int64_t id[kBlocks][2];
  uint32_t real = 0, wrong = 0;
  const int64_t row = group * args.tokens + first + q;
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      id[m][h] = 0;
      if (first + 16 * m + 8 * h + q >= args.tokens) continue;
      real |= 1u << (2 * m + h);
      id[m][h] = id_of(args, row + 16 * m + 8 * h);
      if (id[m][h] >= 0 && id[m][h] < args.w.rows) continue;
      wrong |= 1u << (2 * m + h);
      id[m][h] = 0;
    }
  Projection<T, kRank, kBlocks> p;
  p.make(args, layout, args.core + group * rank * rank, id, q, t);

  const int64_t end = min(columns, (blockIdx.y + int64_t{1}) * layout.chunk);
#pragma unroll 1
  for (int64_t column = blockIdx.y * layout.chunk; column < end; column += 32) {
    const int64_t mine = column + 8 * t;
    Bytes16 w[kBlocks][2][kVectors];
    if (layout.weight_vectors) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int v = 0; v < kVectors; ++v)
            if ((real >> (2 * m + h) & 1) && mine + v * kVec < columns)
              w[m][h][v] = load16<LoadHint::none>(static_cast<const T*>(args.w.data) +
                                                  id[m][h] * args.w.stride + mine + v * kVec);
    }
    float sum[kBlocks][4][4] = {};
#pragma unroll
    for (int part = 0; part < kRank / 32; ++part) {
      if (32 * part >= rank) break;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t at = column + q / 2 * 8 + 2 * j + q % 2;
        Eight v;
        v.load(args.v, min(at, columns - 1), 32 * part + 8 * t, layout.basis_vectors);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m)
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            const FragmentA(&a)[kParts] = p.step[m][2 * part + s];
            if (args.v.dtype != Dtype::bfloat16)
              mma<false>(sum[m][j], a[0], v.part[1][2 * s], v.part[1][2 * s + 1]);
            if constexpr (kParts == 2)
              mma<false>(sum[m][j], a[1], v.part[0][2 * s], v.part[0][2 * s + 1]);
            mma<false>(sum[m][j], a[0], v.part[0][2 * s], v.part[0][2 * s + 1]);
          }
      }
    }
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (!(real >> (2 * m + h) & 1)) continue;
        T* const out = static_cast<T*>(args.out) + (row + 16 * m + 8 * h) * columns + mine;
        float added[8];
#pragma unroll
        for (int i = 0; i < 8; ++i)
          added[i] =
              wrong >> (2 * m + h) & 1 ? bits_float(0x7fc00000u) : sum[m][i / 2][2 * h + i % 2];
        if (!layout.weight_vectors) {
          const T* const from =
              static_cast<const T*>(args.w.data) + id[m][h] * args.w.stride + mine;
          add_eight(from, out, columns - mine, added);
          continue;
        }
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          if (mine + v * kVec >= columns) continue;
          Bytes16 x = w[m][h][v];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if constexpr (sizeof(T) == 4) {
              x.word[i] = float_bits(bits_float(x.word[i]) + added[4 * v + i]);
            } else {
              const float2 old = unpack(T{}, x.word[i]);
              x.word[i] = round_pair(T{}, old.x + added[2 * i], old.y + added[2 * i + 1]);
            }
          }
          store16<StoreHint::streaming>(out + v * kVec, x);
        }
      }
  }
}

bool aligned(const Matrix& matrix, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 &&
         (matrix.rows == 1 || matrix.stride * bytes % 16 == 0);
}

bool basis_vectors(const Matrix& basis) {
  return basis.columns % 8 == 0 && aligned(basis, basis.dtype == Dtype::float32 ? 4 : 2);
}

template <class T, int kRank, int kBlocks>
cudaError_t launch_kernel(const LowRankEmbedding& args, const Launch& launch) {
  constexpr int64_t kTokens = kWarps * 16 * kBlocks;
  Layout layout{};
  layout.tiles = (args.tokens + kTokens - 1) / kTokens;
  layout.basis_vectors = basis_vectors(args.u) && basis_vectors(args.v);
  layout.weight_vectors = args.w.columns % Shape<T>::kVec == 0 && aligned(args.w, sizeof(T)) &&
                          reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  const auto kernel = lowrank_embedding_kernel<T, kRank, kBlocks>;
  // Two rounds of thread blocks, if their columns are many more than those of P.
  const int64_t resident =
      resident_blocks(reinterpret_cast<const void*>(kernel), 32 * kWarps, 0, launch.device);
  const int64_t tiles = args.groups * layout.tiles, steps = (args.w.columns + 31) / 32;
  const int64_t wanted = std::max<int64_t>(1, 2 * resident / tiles);
  const int64_t each = std::max<int64_t>((steps + wanted - 1) / wanted, kRank / 16);
  layout.chunk = 32 * each;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>((steps + each - 1) / each));
  kernel<<<grid, 32 * kWarps, 0, static_cast<cudaStream_t>(launch.stream)>>>(args, layout);
  return cudaGetLastError();
}

template <class T>
Status launch_embedding(const LowRankEmbedding& args, const Launch& launch) {
  const int64_t rank = args.u.columns;
  if (rank <= 32) return status_of(launch_kernel<T, 32, 2>(args, launch));
  if (rank <= 64) return status_of(launch_kernel<T, 64, sizeof(T) == 2 ? 2 : 1>(args, launch));
  if (rank <= 128) return status_of(launch_kernel<T, 128, 1>(args, launch));
  return failure("no kernel for a rank above 128");
}

}  // namespace

Status lowrank_embedding(const LowRankEmbedding& args, const Launch& launch) {
  if (args.groups * args.tokens * args.w.columns == 0) return Status{};
  const DeviceGuard guard(launch.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  switch (args.w.dtype) {
    case Dtype::bfloat16:
      return launch_embedding<bf16>(args, launch);
    case Dtype::float16:
      return launch_embedding<f16>(args, launch);
    default:
      return launch_embedding<float>(args, launch);
  }
}

}  // namespace subzero::cuda
