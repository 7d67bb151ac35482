// Many items, each cut into parts, as one parallel loop over all parts.
#pragma once

#include "isa.h"
#include "threads.h"

namespace subzero::cpu::SUBZERO_ISA {

class Schedule {
 public:
  bool allocate(int64_t items) { return ends_.allocate(items); }
  void clear() { items_ = 0; }
  void add(int64_t parts) {
    const int64_t before = total();
    ends_.data[items_++] = before + parts;
  }
  int64_t total() const { return items_ == 0 ? 0 : ends_.data[items_ - 1]; }

  struct Place {
    int64_t item;
    int64_t part;
  };
  Place find(int64_t index) const {
    int64_t low = 0, high = items_;  // the first item whose end is past the index
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ends_.data[middle] > index)
        high = middle;
      else
        low = middle + 1;
    }
    return {low, low == 0 ? index : index - ends_.data[low - 1]};
  }

 private:
  Buffer<int64_t> ends_;
  int64_t items_ = 0;
};

// f(worker, item, part) for every part of every item.
template <class F>
static inline void run_parallel(const Schedule& schedule, int threads, F&& f) {
  struct Context {
    const Schedule& schedule;
    F& f;
  } context{schedule, f};
  parallel_for(
      schedule.total(), threads,
      [](void* opaque, int worker, int64_t index) {
        const Context& shared = *static_cast<Context*>(opaque);
        const auto place = shared.schedule.find(index);
        shared.f(worker, place.item, place.part);
      },
      &context);
}

}  // namespace subzero::cpu::SUBZERO_ISA
