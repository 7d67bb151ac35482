// The launch API of the native ops: no torch, no Python. Pointers are borrowed for the call, sizes
// and strides count elements, arguments have been validated by the caller (subzero_kernels/ops.py).
//
// The ops are documented where users meet them, in subzero_kernels/ops.py; every function here has
// the op's own name. A call writes nothing unless it returns ok.
#pragma once

#include <cstdint>

namespace subzero {

enum class Dtype : int32_t { float32, bfloat16, float16 };
enum class Rounding : int32_t { nearest, stochastic };

struct Status {
  bool ok = true;
  char message[248] = {};
};

// Row-major with contiguous rows, `stride` elements from row to row. A tensor of any other number
// of dimensions is contiguous and comes as one row.
struct Matrix {
  void* data;
  int64_t rows;
  int64_t columns;
  int64_t stride;
  Dtype dtype;
};

// (groups, rows, columns) with contiguous columns; strides from group to group and row to row.
struct Slabs {
  void* data;
  int64_t groups;
  int64_t rows;
  int64_t columns;
  int64_t group_stride;
  int64_t row_stride;
  Dtype dtype;
};

// Where and how to run. CPU: at most `threads` threads. CUDA: `stream`, a cudaStream_t of `device`.
struct Launch {
  int32_t threads = 1;
  int32_t device = 0;
  void* stream = nullptr;
};

struct Philox4x32 {
  const int64_t* counter;  // (count, 4), the low 32 bits of each
  const int64_t* key;      // (2,)
  int64_t* words;          // (count, 4)
  int64_t count;
};

struct Normal {
  Matrix out;
  const int64_t* rng;  // [seed, draw], as everywhere below
  uint32_t stream;
};

// K coefficients, one for each query: query k draws its noise at draw + k.
struct Queries {
  const float* coeff;
  int64_t count;
  const int64_t* rng;
};

// W, read row-major as (u.rows, v.rows), and its two bases.
struct LowRank {
  Matrix w;
  Matrix u;
  Matrix v;
  uint32_t stream;
};

struct Perturb {
  LowRank item;
  Queries queries;
  Rounding rounding;
};

struct PerturbMany {
  const LowRank* items;
  int64_t count;
  Queries queries;
  Rounding rounding;
};

struct Dense {
  Matrix w;
  uint32_t stream;
};

struct PerturbDense {
  const Dense* items;
  int64_t count;
  Queries queries;
  Rounding rounding;
};

struct Core {
  float* out;         // (groups, rank, rank)
  const float* base;  // (rank, rank); for one group it may be `out`
  int64_t rank;
  uint32_t stream;
  float mu;
};

struct CoreNoise {
  const Core* items;
  int64_t count;
  int64_t groups;
  Queries queries;  // coeff (groups, count)
};

struct Fold {
  LowRank item;
  const float* core;  // (rank, rank)
  double decay;
  Rounding rounding;
  const int64_t* rng;  // null unless the rounding is stochastic
};

struct AddNoise {
  Slabs y;
  const float* scale;    // (groups, rows)
  const int64_t* query;  // (groups,)
  const int64_t* row;    // (rows,), of the noise
  const int64_t* rng;
  uint32_t stream;
};

struct NoiseOuter {
  Matrix out;          // (c, r), fp32
  Matrix a;            // (N, r)
  Queries queries;     // coeff (K, N), the weights
  const int64_t* row;  // (N,), of the noise
  uint32_t stream;
  double beta;
};

struct LowRankEmbedding {
  const void* ids;  // (groups, tokens)
  bool ids_wide;    // int64, else int32
  int64_t groups;
  int64_t tokens;     // of a group
  Matrix w;           // (entries, n)
  Matrix u;           // (entries, r)
  Matrix v;           // (n, r)
  const float* core;  // (groups, r, r)
  void* out;          // (groups, tokens, n), of w's dtype
};

// 16-bit numbers throughout but for the core and perhaps the bias; bases and rows of x and W at
// multiples of 16 bytes, a rank that is a multiple of 8.
struct LowRankLinear {
  Matrix x;           // (groups rows, n)
  Matrix w;           // (m, n)
  Matrix bias;        // (1 or groups, m) of x's dtype or float32, data null: none
  Matrix u;           // (m, r)
  Matrix v;           // (n, r)
  const float* core;  // (groups, r, r)
  int64_t groups;
  void* scratch;  // lowrank_linear_scratch_bytes of it, at a multiple of 16 bytes
  void* y;        // (groups rows, m), contiguous
};

// What is left to do natively where `a` is too wide for the CUDA noise_outer_: of consecutive rows
// sum (rows, columns) = sum_k weight[k, i] z_(draw + k).
struct NoiseOuterSum {
  float* sum;             // contiguous
  Queries queries;        // coeff: weight[0, first of the rows]
  int64_t weight_stride;  // from query to query
  const int64_t* row;     // (rows,), of the noise
  int64_t rows;
  int64_t columns;
  uint32_t stream;
};

namespace cpu {

Status philox4x32(const Philox4x32& args, const Launch& launch);
Status normal_(const Normal& args, const Launch& launch);
Status perturb_(const Perturb& args, const Launch& launch);
Status perturb_many_(const PerturbMany& args, const Launch& launch);
Status perturb_dense_(const PerturbDense& args, const Launch& launch);
Status core_noise_(const CoreNoise& args, const Launch& launch);
Status fold_(const Fold& args, const Launch& launch);
Status add_noise_(const AddNoise& args, const Launch& launch);
Status noise_outer_(const NoiseOuter& args, const Launch& launch);

// ln of u for words first << 8, (first + 1) << 8, ...; sin and cos of 2 pi t likewise: for tests.
Status ln(int64_t first, int64_t count, float* out);
Status sincos_turns(int64_t first, int64_t count, float* sin, float* cos);

}  // namespace cpu

namespace cuda {

class UpdatePlan;

// perturb_, perturb_many_ and fold_: the matrices are sorted into launches once, and updated as
// often as wanted. Ranks up to 256.
class LowRankPlan {
 public:
  LowRankPlan();
  ~LowRankPlan();
  LowRankPlan(const LowRankPlan&) = delete;
  LowRankPlan& operator=(const LowRankPlan&) = delete;

  Status prepare(const LowRank* items, int64_t count, int device);
  // Of device memory that an update by `queries` queries needs for its own; by a given core: 0.
  int64_t scratch_bytes(int64_t queries) const;
  Status perturb_(const Queries& queries, Rounding rounding, void* scratch,
                  const Launch& launch) const;
  // `args` without its item, which is the plan's only one.
  Status fold_(const Fold& args, void* scratch, const Launch& launch) const;

 private:
  UpdatePlan* plan_;
};

Status philox4x32(const Philox4x32& args, const Launch& launch);
Status normal_(const Normal& args, const Launch& launch);
Status perturb_dense_(const PerturbDense& args, const Launch& launch);
Status core_noise_(const CoreNoise& args, const Launch& launch);
Status add_noise_(const AddNoise& args, const Launch& launch);
// Up to 128 columns of `a`; the device memory that it needs for its own.
Status noise_outer_(const NoiseOuter& args, void* scratch, const Launch& launch);
int64_t noise_outer_scratch_bytes(const NoiseOuter& args);
Status noise_outer_sum(const NoiseOuterSum& args, const Launch& launch);
// Ranks up to 128.
Status lowrank_embedding(const LowRankEmbedding& args, const Launch& launch);
// Hopper only. `choice`: how it is cut, -1: as should be fastest.
Status lowrank_linear(const LowRankLinear& args, const Launch& launch, int choice = -1);
int64_t lowrank_linear_scratch_bytes(int64_t rows, int64_t rank, int64_t groups);

}  // namespace cuda

}  // namespace subzero
