// The threads that share the kernels' work: OpenMP's, entered once for a whole tape, with our own way to hand out units.
//
// OpenMP's barriers spin for milliseconds. That is what a kernel takes, and it is lost twice where other processes want the
// cores: whoever spins holds a core, and the thread that is waited for stands in a queue for the other one. So whoever
// waits here spins for as long as a wait takes among free cores, and sleeps then: its core is free, and the system gives
// it to the thread that is waited for. And nobody waits for a thread that has not begun: the others take its units.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

class Team {
 public:
  explicit Team(int64_t threads) : ranges_(size_t(threads)) {}

  // body(i) for each i below n, by all threads; back when all of it is done.
  template <class Body>
  void share(int64_t n, const Body& body) {
    const auto threads = int64_t(ranges_.size());
    if (n <= 0) return;
    const int64_t most = UNITS * threads < MOST ? UNITS * threads : MOST, chunk = (n + most - 1) / most;
    const int64_t units = (n + chunk - 1) / chunk;
    call_ = [](const void* what, int64_t start, int64_t end) {
      const Body own = *static_cast<const Body*>(what);
      for (int64_t i = start; i < end; i++) own(i);
    };
    body_ = &body, n_ = n, chunk_ = chunk, left_ = units;
    number_++;
    // What a thread takes is in order and the same in every kernel, as long as none is late: see lanes.h.
    for (int64_t k = 0; k < threads; k++) {
      ranges_[size_t(k)].units = pack(number_, uint64_t(units * k / threads), uint64_t(units * (k + 1) / threads));
    }
    begun_ = number_;
    wake();
    take(0);
    wait([this] { return left_ == 0; });
  }

  // What another thread than the first does until `close`.
  void work(int64_t thread) {
    for (uint32_t seen = 0;;) {
      wait([&] { return begun_ != seen || closed_; });
      if (closed_) return;
      seen = begun_;
      take(thread);
    }
  }

  void close() {
    closed_ = true;
    wake();
  }

 private:
  static constexpr int64_t UNITS = 64, MOST = 0xffff;  // for each thread, and for all
  static constexpr std::chrono::microseconds SPIN{20};

  // Units that a thread takes first, from the front; the others take from the back once they have none. With the number of
  // the job, so that a unit is not taken for one of another job.
  struct alignas(64) Range {
    std::atomic<uint64_t> units{0};
  };
  static uint64_t pack(uint32_t number, uint64_t start, uint64_t end) {
    return uint64_t(number) << 32 | start << 16 | end;
  }

  void take(int64_t thread) {
    const auto threads = int64_t(ranges_.size());
    for (int64_t away = 0; away < threads; away++) {
      std::atomic<uint64_t>& range = ranges_[size_t((thread + away) % threads)].units;
      uint64_t found = range;
      for (;;) {
        const uint64_t start = found >> 16 & 0xffff, end = found & 0xffff;
        if (start >= end) break;
        // Read before the unit is taken: while one is left, the job is not over, and these stay as they are.
        void (*const call)(const void*, int64_t, int64_t) = call_;
        const void* const body = body_;
        const int64_t chunk = chunk_, n = n_;
        if (!range.compare_exchange_weak(found, away ? found - 1 : found + (1 << 16))) continue;
        const int64_t first = int64_t(away ? end - 1 : start) * chunk;
        call(body, first, first + chunk < n ? first + chunk : n);
        if (--left_ == 0) wake();
        found = range;
      }
    }
  }

  template <class Ready>
  void wait(const Ready& ready) {
    const auto until = std::chrono::steady_clock::now() + SPIN;
    do {
      for (int i = 0; i < 16; i++) {
        if (ready()) return;
        pause();
      }
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_++;
    changed_.wait(lock, ready);
    sleepers_--;
  }

  // Who goes to sleep says so before a last look, and who wakes looks after the change: one of the two sees the other.
  void wake() {
    if (sleepers_ == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  std::vector<Range> ranges_;
  std::atomic<void (*)(const void*, int64_t, int64_t)> call_{nullptr};
  std::atomic<const void*> body_{nullptr};
  std::atomic<int64_t> n_{0}, chunk_{1}, left_{0};
  uint32_t number_ = 0;
  std::atomic<uint32_t> begun_{0};
  std::atomic<bool> closed_{false};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// The team of the tape that this thread plays.
static thread_local Team* team = nullptr;

template <class Body>
static inline void share(int64_t n, const Body& body) {
  if (team) {
    team->share(n, body);
  } else {
    for (int64_t i = 0; i < n; i++) body(i);
  }
}

// Plays, with so many threads to share its work.
template <class Play>
static inline void with_team(int64_t threads, const Play& play) {
#ifdef _OPENMP
  if (threads > 1) {
    Team ours(threads);
#pragma omp parallel num_threads(int(threads))
    {
      if (const int thread = omp_get_thread_num()) {
        ours.work(thread);
      } else {
        team = &ours;
        play();
        team = nullptr;
        ours.close();
      }
    }
    return;
  }
#endif
  play();
}
