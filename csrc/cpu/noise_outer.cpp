// out = beta out + D^T A, D (N x c) being the weighted sum of the queries' noise, which is made for
// as many columns at a time as the scratch memory holds:
//
//   noise   D for these columns, rows in parallel
//   task    kTaskRows x kPanel of out: chains of kChain rows of A, widened and packed, times D,
//           kRows x kPanel in registers
//
// Rounding: a chain is summed in fp32, the sums of chains are added up, and out is read and written
// once. An element's sequence of operations is the same in every tile, task and thread. (torch's
// GEMM would not do: its sums over N depend on the number of threads.)
#include "noise.h"
#include "ops.h"
#include "schedule.h"

namespace subzero::cpu::SUBZERO_ISA {

constexpr int kRows = 6;
constexpr int kPanel = kVectors * kLanes;
constexpr int64_t kTaskRows = 16 * kRows;
constexpr int64_t kChain = 256;
constexpr int64_t kNoiseFloats = 4 << 20;
constexpr int64_t kNarrowest = 64;  // columns of noise, however many rows there are

// The columns of noise in the scratch memory: `used` of them from `first`, in rows of `width`.
struct Noise {
  float* data;
  int64_t width;
  int64_t first;
  int64_t used;
};

// Row i of the noise, zero where it is wider than used.
static void weighted_row(const NoiseOuter& args, const Noise& noise, int64_t i) {
  float* const sum = noise.data + i * noise.width;
  memset(sum, 0, static_cast<size_t>(noise.width) * sizeof *sum);
  for (int64_t k = 0; k < args.queries.count; ++k) {
    const float weight = args.queries.coeff[k * args.a.rows + i];
    if (weight == 0.0f) continue;
    for_each_batch(noise_source(args.queries.rng, args.stream, k),
                   args.row[i] * args.out.rows + noise.first, noise.used,
                   [&](int64_t at, const float* z, int64_t count) {
                     for (int64_t j = 0; j < count; ++j)
                       sum[at + j] = fma_(weight, z[j], sum[at + j]);
                   });
  }
}

// total (kRows x kPanel) += the transpose of noise (count x kRows, rows `width` apart) times panel
// (count x kPanel).
static inline void tile(const float* noise, int64_t width, const float* panel, int64_t count,
                        float* total) {
  Vec sum[kRows][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[i][j] = broadcast(0.0f);
  for (int64_t n = 0; n < count; ++n) {
    Vec b[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) b[j] = in_register(load(panel + n * kPanel + j * kLanes));
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const Vec a = broadcast(noise[n * width + i]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] = fma_(a, b[j], sum[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* const at = total + i * kPanel + j * kLanes;
      store(at, load(at) + sum[i][j]);
    }
}

// panel (count x kPanel) = rows first .. of `used` columns of A from `column`, filled with zeros.
template <class T>
static void pack(const Matrix& a, int64_t first, int64_t count, int64_t column, int64_t used,
                 float* panel) {
  const T* in = static_cast<const T*>(a.data) + first * a.stride + column;
  for (int64_t n = 0; n < count; ++n, in += a.stride, panel += kPanel) {
    load_row(in, panel, used);
    for (int64_t j = used; j < kPanel; ++j) panel[j] = 0.0f;
  }
}

// Rows row .. row + rows of the noise's columns, times kPanel columns of A from `column`.
static void run_task(const NoiseOuter& args, const Noise& noise, int64_t row, int64_t rows,
                     int64_t column) {
  alignas(64) float total[kTaskRows * kPanel], panel[kChain * kPanel];
  const int64_t used = least(kPanel, args.out.columns - column);
  memset(total, 0, static_cast<size_t>(round_up(rows, kRows) * kPanel) * sizeof *total);
  for (int64_t first = 0; first < args.a.rows; first += kChain) {
    const int64_t count = least(kChain, args.a.rows - first);
    with_dtype(args.a.dtype, [&](auto dtype) {
      pack<typename decltype(dtype)::type>(args.a, first, count, column, used, panel);
    });
    for (int64_t i = 0; i < rows; i += kRows)
      tile(noise.data + first * noise.width + row + i, noise.width, panel, count,
           total + i * kPanel);
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* const out =
        static_cast<float*>(args.out.data) + (noise.first + row + i) * args.out.stride + column;
    const float* const sum = total + i * kPanel;
    if (args.beta == 0.0)
      memcpy(out, sum, static_cast<size_t>(used) * sizeof *out);
    else
      for (int64_t j = 0; j < used; ++j)
        out[j] = static_cast<float>(args.beta * static_cast<double>(out[j]) +
                                    static_cast<double>(sum[j]));
  }
}

Status noise_outer_(const NoiseOuter& args, const Launch& launch) {
  constexpr int64_t kPart = 8 * kBatch;
  const int64_t count = args.a.rows, columns = args.out.rows;
  const int64_t most_columns = kNoiseFloats / most(1, count) / kTaskRows * kTaskRows;
  const int64_t span = least(columns, most(kNarrowest, most_columns));
  const int64_t width = round_up(span, kRows);
  const int64_t work = count * columns * (args.out.columns + 16 * args.queries.count);
  const int threads = static_cast<int>(most(1, least(launch.threads, work >> 18)));
  Buffer<float> memory;
  Schedule parts;
  if (!memory.allocate(count * width) || !parts.allocate(1))
    return failure("no memory for the noise");
  for (int64_t first = 0; first < columns; first += span) {
    const Noise noise{memory.data, width, first, least(span, columns - first)};
    const int64_t step = most(1, kPart / noise.used);
    parts.clear(), parts.add(ceil_div(count, step));
    run_parallel(parts, threads, [&](int, int64_t, int64_t part) {
      const int64_t end = least(count, (part + 1) * step);
      for (int64_t i = part * step; i < end; ++i) weighted_row(args, noise, i);
    });
    const int64_t blocks = ceil_div(noise.used, kTaskRows);
    parts.clear(), parts.add(blocks * ceil_div(args.out.columns, kPanel));
    run_parallel(parts, threads, [&](int, int64_t, int64_t task) {
      const int64_t row = task % blocks * kTaskRows;
      run_task(args, noise, row, least(kTaskRows, noise.used - row), task / blocks * kPanel);
    });
  }
  return Status{};
}

}  // namespace subzero::cpu::SUBZERO_ISA
