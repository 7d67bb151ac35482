// One pass over W, cache block by cache block:
//
//   wave    consecutive matrices whose cores fit kWaveCore; their cores are made first, in parallel
//   task    columns x rows of one W: columns_of_task(r) columns wide, and as many rows as make it
//   worth a
//           thread's while
//   right   for the task's columns: (V C^T)^T or V^T, packed in panels of kPanel columns
//   left    for left_rows(r) rows: U or U C
//   tile    kRows x kPanel of left times right in registers, added to W there
//
// C is multiplied into the side that has fewer rows to compute, which depends on the shape alone.
//
// Rounding: the factor that holds C is accumulated in double and rounded once. The product over the
// rank runs in fp32 chains of kChain, whose sums are added up: the error grows with sqrt(kChain),
// not with the rank. Then one rounding at the store. An element's sequence of operations is
// the same in every tile, task, wave and thread.
#include "lowrank_update.h"

#include "noise.h"
#include "schedule.h"

namespace subzero::cpu::SUBZERO_ISA {

constexpr int kRows = 6;
constexpr int kPanel = kVectors * kLanes;
constexpr int kChain = 32;
constexpr int kSpan = kBatch;    // columns whose sums are finished at once where tiles cannot do it
constexpr int64_t kWidest = 64;  // columns; a multiple of kPanel in every variant
constexpr int64_t kWaveCore = 4 << 20;      // floats
constexpr int64_t kRightFloats = 96 << 10;  // 384 KiB: a good part of a core's L2
constexpr int64_t kLeftFloats = 32 << 10;
constexpr int64_t kTaskElements = 2 << 20;
constexpr int64_t kTaskElementsLeast = 64 << 10;

// r rounded up, so that rows of factors are whole vectors; what is past r is zero.
static inline int64_t padded(int64_t rank) {
  return round_up(rank, 16);
}
static inline int64_t columns_of_task(int64_t rank) {
  return most(kWidest, kRightFloats / rank / kWidest * kWidest);
}
static inline int64_t left_rows(int64_t rank) {
  return most(kRows, kLeftFloats / padded(rank) / kRows * kRows);
}

// Rows to multiply by C: left once per block of columns unless it is kept, right once.
static bool core_left(const Update& update) {
  const int64_t rows = update.rows(), rank = update.rank();
  const int64_t blocks = ceil_div(update.columns(), columns_of_task(rank));
  return rows * (rows <= left_rows(rank) ? 1 : blocks) < update.columns();
}

// What one worker keeps between tasks.
struct Scratch {
  float* left;                              // left_rows x padded(r)
  float* right;                             // panels of r x kPanel
  float* product;                           // kWidest x padded(r)
  double* wide;                             // kWidest x r
  int64_t left_item, left_row, left_count;  // what `left` and `right` hold
  int64_t right_item, right_column;
};

// out (count x padded(r)) = rows first .. of a factor, times `core` unless that is null.
template <class T>
static inline void factor_rows(const Matrix& factor, int64_t first, int64_t count,
                               const float* core, double* wide, float* out) {
  const int64_t rank = factor.columns, width = padded(rank);
  const T* const data = static_cast<const T*>(factor.data);
  constexpr int64_t kStep = kWidest / kRows * kRows;
  for (int64_t start = 0; start < count; start += kStep) {
    const int64_t rows = least(count - start, kStep);
    float* const block = out + start * width;
    for (int64_t i = 0; i < rows; ++i) {
      load_row(data + (first + start + i) * factor.stride, block + i * width, rank);
      for (int64_t l = rank; l < width; ++l) block[i * width + l] = 0.0f;
    }
    if (core == nullptr) continue;
    for (int64_t i = 0; i < round_up(rows, kRows); ++i)
      for (int64_t l = 0; l < rank; ++l) wide[i * rank + l] = i < rows ? block[i * width + l] : 0.0;
    for (int64_t i = 0; i < rows; i += kRows) {
      const double* const a = wide + i * rank;
      for (int64_t j = 0; j < width; j += 2 * kDoubleLanes) {
        DoubleVec sum[kRows][2];
        for (int row = 0; row < kRows; ++row) sum[row][0] = sum[row][1] = broadcast(0.0);
        for (int64_t l = 0; l < rank; ++l) {
          const DoubleVec b0 = load_double(core + l * width + j);
          const DoubleVec b1 = load_double(core + l * width + j + kDoubleLanes);
#pragma GCC unroll 6
          for (int row = 0; row < kRows; ++row) {
            const DoubleVec x = broadcast(a[row * rank + l]);
            sum[row][0] = add_exact_product(x, b0, sum[row][0]);
            sum[row][1] = add_exact_product(x, b1, sum[row][1]);
          }
        }
        for (int row = 0; row < kRows && i + row < rows; ++row) {
          store_rounded(block + (i + row) * width + j, sum[row][0]);
          store_rounded(block + (i + row) * width + j + kDoubleLanes, sum[row][1]);
        }
      }
    }
  }
}

static inline void factor_rows(const Matrix& factor, int64_t first, int64_t count,
                               const float* core, double* wide, float* out) {
  with_dtype(factor.dtype, [&](auto dtype) {
    factor_rows<typename decltype(dtype)::type>(factor, first, count, core, wide, out);
  });
}

// panel (r x kPanel) = the transpose of rows (kPanel x padded(r)); writes whole groups of 4 rows.
static inline void pack_panel(const float* rows, int64_t rank, float* panel) {
  const int64_t width = padded(rank);
  for (int64_t j = 0; j < kPanel; j += 4) {
    const float* const in = rows + j * width;
    for (int64_t k = 0; k < rank; k += 4) {
      float* const out = panel + k * kPanel + j;
#if defined(__SSE__)
      __m128 a = _mm_loadu_ps(in + k), b = _mm_loadu_ps(in + width + k);
      __m128 c = _mm_loadu_ps(in + 2 * width + k), d = _mm_loadu_ps(in + 3 * width + k);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(out, a), _mm_storeu_ps(out + kPanel, b);
      _mm_storeu_ps(out + 2 * kPanel, c), _mm_storeu_ps(out + 3 * kPanel, d);
#else
      for (int x = 0; x < 4; ++x)
        for (int y = 0; y < 4; ++y) out[x * kPanel + y] = in[y * width + k + x];
#endif
    }
  }
}

// left times the panel, kRows x kPanel of which kUsed vectors hold columns of W. Either W += it
// right here, fetching the tile at `next` meanwhile, or it goes to `sum` (rows kSpan apart) for
// finish_row. `sum` also holds the running total of the chains.
template <int kUsed, bool kDirect>
static inline void tile(const float* left, const float* panel, int64_t rank, float* sum, float* w,
                        int64_t stride, const float* next) {
  const int64_t width = padded(rank);
  // One line of the next tile with each k: all at once would stall on the few that may be in
  // flight.
  int64_t lines = kDirect ? kRows * kPanel / 16 : 0;
  int next_row = 0;
  const auto fetch = [&] {
    __builtin_prefetch(next, 1);
    next += stride;
    if (++next_row == kRows) next_row = 0, next += 16 - kRows * stride;
    --lines;
  };
  while (lines > rank) fetch();
  for (int64_t start = 0;; start += kChain) {
    const int64_t end = least(start + kChain, rank);
    Vec acc[kRows][kUsed];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kUsed; ++j) acc[i][j] = broadcast(0.0f);
    for (int64_t k = start; k < end; ++k) {
      if (kDirect && lines > 0) fetch();
      Vec b[kUsed];
#pragma GCC unroll 4
      for (int j = 0; j < kUsed; ++j) b[j] = in_register(load(panel + k * kPanel + j * kLanes));
#pragma GCC unroll 6
      for (int i = 0; i < kRows; ++i) {
        const Vec a = broadcast(left[i * width + k]);
#pragma GCC unroll 4
        for (int j = 0; j < kUsed; ++j) acc[i][j] = fma_(a, b[j], acc[i][j]);
      }
    }
    const bool last = end == rank;
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kUsed; ++j) {
        float* const total = sum + i * kSpan + j * kLanes;
        Vec value = acc[i][j];
        if (start > 0) value = load(total) + value;
        if (kDirect && last) {
          float* const out = w + i * stride + j * kLanes;
          store(out, load(out) + value);
        } else {
          store(total, value);
        }
      }
    if (last) return;
  }
}

// W = decay W + sum for `count` elements from row-major index `first`, rounded to W's dtype.
template <class T>
static inline void finish_row(const Update& update, int64_t first, int64_t count,
                              const float* sum) {
  for_each_run<T>(update.item.w, first, count, [&](T* w, int64_t element, int64_t run) {
    const float* const added = sum + (element - first);
    float value[kSpan];
    load_row(w, value, run);
    if (update.decay == 1.0)
      for (int64_t i = 0; i < run; ++i) value[i] += added[i];
    else
      for (int64_t i = 0; i < run; ++i)
        value[i] = static_cast<float>(update.decay * static_cast<double>(value[i]) +
                                      static_cast<double>(added[i]));
    if (!update.stochastic) return store_row(value, w, run);
    uint32_t words[kSpan];
    fill_words(update.rounding, element, run, words);
    store_row(value, words, w, run);
  });
}

// The whole of a group of kRows rows across the columns of a task.
template <class T>
static void row_group(const Update& update, const float* left, const float* right, int64_t row,
                      int64_t rows, int64_t column, int64_t columns) {
  const int64_t rank = update.rank(), n = update.columns();
  const Matrix& w = update.item.w;
  // Rows of W as (m', n') are `stride` apart, unless W's own rows cut through them.
  const bool flat = w.stride == w.columns || w.rows == 1;
  const int64_t stride = flat ? n : w.stride;
  const bool whole_rows = flat || w.columns == n;
  const bool direct =
      sizeof(T) == sizeof(float) && whole_rows && update.decay == 1.0 && rows == kRows;
  T* const out = static_cast<T*>(w.data) + (whole_rows ? row * stride + column : 0);
  alignas(64) float sum[kRows * kSpan];
  for (int64_t j = 0; j < columns; j += kPanel) {
    const float* const panel = right + j * padded(rank);
    const int64_t used = least(kPanel, columns - j);
    if (direct && used == kPanel) {
      float* const here = reinterpret_cast<float*>(out) + j;
      const int64_t ahead = j + kPanel < columns ? kPanel : kRows * stride - j;
      tile<kVectors, true>(left, panel, rank, sum, here, stride, here + ahead);
      continue;
    }
    for (int64_t i = 0; whole_rows && i < rows; ++i)
      for (int64_t x = 0; x < used; x += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(out + i * stride + j + x, 1);
    const int64_t at = direct ? 0 : j % kSpan;
    switch (ceil_div(used, kLanes)) {
      case 1:
        tile<1, false>(left, panel, rank, sum + at, nullptr, 0, nullptr);
        break;
      case 2:
        tile<2, false>(left, panel, rank, sum + at, nullptr, 0, nullptr);
        break;
      default:
        tile<kVectors, false>(left, panel, rank, sum + at, nullptr, 0, nullptr);
    }
    const int64_t done = at + used;
    if (done < kSpan && j + used < columns) continue;
    for (int64_t i = 0; i < rows; ++i)
      finish_row<T>(update, (row + i) * n + column + j - at, done, sum + i * kSpan);
  }
}

static void run_task(const Update& update, int64_t item, const float* core, int64_t column,
                     int64_t row, int64_t rows, Scratch& scratch) {
  const int64_t rank = update.rank(), width = padded(rank);
  const bool on_left = core_left(update);
  const int64_t columns = least(columns_of_task(rank), update.columns() - column);
  if (scratch.right_item != item || scratch.right_column != column) {
    for (int64_t j = 0; j < columns; j += kPanel) {
      const int64_t used = least(kPanel, columns - j);
      factor_rows(update.item.v, column + j, used, on_left ? nullptr : core, scratch.wide,
                  scratch.product);
      memset(scratch.product + used * width, 0,
             static_cast<size_t>((kPanel - used) * width) * sizeof(float));
      pack_panel(scratch.product, rank, scratch.right + j * width);
    }
    scratch.right_item = item, scratch.right_column = column;
  }
  for (int64_t end = row + rows; row < end; row += left_rows(rank)) {
    const int64_t count = least(left_rows(rank), end - row);
    if (scratch.left_item != item || scratch.left_row != row || scratch.left_count != count) {
      factor_rows(update.item.u, row, count, on_left ? core : nullptr, scratch.wide, scratch.left);
      memset(scratch.left + count * width, 0,
             static_cast<size_t>((round_up(count, kRows) - count) * width) * sizeof(float));
      scratch.left_item = item, scratch.left_row = row, scratch.left_count = count;
    }
    with_dtype(update.item.w.dtype, [&](auto dtype) {
      for (int64_t i = 0; i < count; i += kRows)
        row_group<typename decltype(dtype)::type>(update, scratch.left + i * width, scratch.right,
                                                  row + i, least(kRows, count - i), column,
                                                  columns);
    });
  }
}

Status update_many(const Update* updates, int64_t count, int threads, FillCore fill_core,
                   const void* context) {
  int64_t work = 0, elements = 0, widest = 0, left_floats = 0, right_floats = 0, most_core = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t rank = updates[i].rank(), width = padded(rank);
    const int64_t size = updates[i].rows() * updates[i].columns();
    work += size * rank, elements += size;
    widest = most(widest, width);
    left_floats = most(left_floats, left_rows(rank) * width);
    right_floats = most(right_floats, columns_of_task(rank) * width);
    most_core = most(most_core, rank * width);
  }
  threads = static_cast<int>(most(1, least(threads, work >> 20)));  // about 0.1 ms for each
  const int64_t core_floats = most(kWaveCore, most_core);

  Schedule parts, tasks;
  Buffer<int64_t> core_at;
  Buffer<float> cores, floats;
  Buffer<double> wides;
  Buffer<Scratch> scratch;
  const int64_t per_worker = left_floats + right_floats + kWidest * widest;
  if (!parts.allocate(count) || !tasks.allocate(count) || !core_at.allocate(count) ||
      !cores.allocate(core_floats) || !floats.allocate(per_worker * threads) ||
      !wides.allocate(kWidest * widest * threads) || !scratch.allocate(threads))
    return failure("no memory for the scratch space");
  for (int i = 0; i < threads; ++i) {
    float* const own = floats.data + per_worker * i;
    scratch.data[i] = {own,
                       own + left_floats,
                       own + left_floats + right_floats,
                       wides.data + kWidest * widest * i,
                       -1,
                       0,
                       0,
                       -1,
                       0};
  }
  const int64_t task_elements =
      most(kTaskElementsLeast, least(kTaskElements, elements / (8 * threads)));
  const auto rows_of_task = [&](const Update& update) {
    const int64_t columns = least(columns_of_task(update.rank()), update.columns());
    return round_up(most(1, least(update.rows(), task_elements / columns)), kRows);
  };

  for (int64_t first = 0, end; first < count; first = end) {
    int64_t used = 0;
    parts.clear(), tasks.clear();
    for (end = first; end < count; ++end) {
      const Update& update = updates[end];
      const int64_t rank = update.rank(), floats_of_core = rank * padded(rank);
      if (used > 0 && used + floats_of_core > core_floats) break;
      core_at.data[end] = used;
      used += floats_of_core;
      parts.add(ceil_div(rank * rank, kCorePart));
      tasks.add(ceil_div(update.columns(), columns_of_task(rank)) *
                ceil_div(update.rows(), rows_of_task(update)));
    }
    memset(cores.data, 0, static_cast<size_t>(used) * sizeof(float));
    run_parallel(parts, threads, [&](int, int64_t index, int64_t part) {
      const int64_t item = first + index, rank = updates[item].rank(), width = padded(rank);
      float* const core = cores.data + core_at.data[item];
      const int64_t start = part * kCorePart, made = least(kCorePart, rank * rank - start);
      float values[kCorePart];
      fill_core(context, item, start, made, values);
      // factor_rows multiplies from the right: U C needs C, V C^T needs C^T.
      const bool plain = core_left(updates[item]);
      for (int64_t x = 0; x < made; ++x) {
        const int64_t i = (start + x) / rank, j = (start + x) % rank;
        core[plain ? i * width + j : j * width + i] = values[x];
      }
    });
    run_parallel(tasks, threads, [&](int worker, int64_t index, int64_t task) {
      const int64_t item = first + index;
      const Update& update = updates[item];
      const int64_t chunk = rows_of_task(update), chunks = ceil_div(update.rows(), chunk);
      const int64_t row = task % chunks * chunk;
      run_task(update, item, cores.data + core_at.data[item],
               task / chunks * columns_of_task(update.rank()), row,
               least(chunk, update.rows() - row), scratch.data[worker]);
    });
  }
  return Status{};
}

}  // namespace subzero::cpu::SUBZERO_ISA
