// The project's own threads: no OpenMP, so that no second runtime joins the one torch brings.
#pragma once

#include <cstdint>

namespace subzero::cpu {

// Runs task 0 .. tasks - 1 on at most `threads` threads, the caller being worker 0, and returns
// when all are done. Tasks are handed out in order; `worker` < threads is never shared by two
// running tasks, so it can index scratch memory.
void parallel_for(int64_t tasks, int threads, void (*run)(void* context, int worker, int64_t task),
                  void* context);

}  // namespace subzero::cpu
