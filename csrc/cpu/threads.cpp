#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace subzero::cpu {
namespace {

// The contract's bits need subnormals and round-to-nearest, whatever the calling thread has set
// (torch.set_flush_denormal, for one).
class PlainFloatingPoint {
#if defined(__x86_64__)
 public:
  PlainFloatingPoint() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~PlainFloatingPoint() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

struct Loop {
  int64_t tasks;
  void (*run)(void*, int, int64_t);
  void* context;
  std::atomic<int64_t> next{0};

  void work(int worker) {
    [[maybe_unused]] PlainFloatingPoint plain;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      run(context, worker, task);
  }
};

class Pool {
 public:
  // False when another thread is using the pool: the caller then works alone.
  bool run(Loop& loop, int threads) {
    std::unique_lock<std::mutex> owner(busy_, std::try_to_lock);
    if (!owner) return false;
    grow(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      loop_ = &loop;
      wanted_ = static_cast<int>(workers_) < threads - 1 ? workers_ : threads - 1;
      running_ = wanted_;
      ++generation_;
    }
    wake_.notify_all();
    loop.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return running_ == 0; });
    return true;
  }

 private:
  void grow(int count) {
    while (workers_ < count) {
      try {
        std::thread(&Pool::serve, this, workers_ + 1, generation_).detach();
      } catch (const std::system_error&) {
        return;  // fewer threads change the time a call takes, not its result
      }
      ++workers_;
    }
  }

  void serve(int worker, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (worker > wanted_) continue;
      Loop* loop = loop_;
      lock.unlock();
      loop->work(worker);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  Loop* loop_ = nullptr;
  int workers_ = 0;
  int wanted_ = 0;
  int running_ = 0;
  uint64_t generation_ = 0;
};

// Leaked on purpose: workers wait on it until the process ends. A forked child has the memory but
// not the threads, so it starts with a new pool.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
  static_cast<void>(registered);
  Pool* current = pool.load();
  if (current == nullptr) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
  }
  return *current;
}

}  // namespace

void parallel_for(int64_t tasks, int threads, void (*run)(void*, int, int64_t), void* context) {
  Loop loop{tasks, run, context};
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1 || !the_pool().run(loop, threads)) loop.work(0);
}

}  // namespace subzero::cpu
