// How many threads share the work: all of them, or as many as have a core.
//
// OpenMP's threads wait for each other at the end of every kernel. Where other processes want the cores too, one thread stands
// in a queue for a core while the others spin for it, and a step takes many times as long as the cores would need. So
// from time to time one tape is watched: the system tells how long each thread was ready to run and had no core. If w of
// them stood in a queue on average, w fewer share the work for a while.
//
// A kernel is cut into as many parts as before, so its sums are the same bit for bit.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>

#ifdef __linux__
#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#endif

// Threads that have a core of their own, when all together waited so many seconds for one in so many.
static inline int64_t free_threads(int64_t threads, double waited, double seconds) {
  constexpr double some = 0.25;  // of a thread: a moment's guest, such as the system itself, takes no core for long
  const double queued = waited / seconds;
  return queued < some ? threads : std::max<int64_t>(1, threads - int64_t(std::ceil(queued - some)));
}

class Team {
 public:
  // Of the threads that a kernel is cut for, those that share its work now.
  int64_t of(int64_t threads) const { return std::min(threads, free_); }

  template <class Play>
  void play(int64_t threads, const Play& play) {
    const auto start = Clock::now();
    if (threads < 2 || start < next_) return play();
    free_ = threads;
    const double before = waited(threads);
    play();
    const double waiting = waited(threads) - before;
    const auto end = Clock::now();
    free_ = free_threads(threads, waiting, std::chrono::duration<double>(end - start).count());
    // To look costs some microseconds; to look with all threads where they have no cores, what it is about to spare.
    next_ = end + (free_ < threads ? std::max<Clock::duration>(EVERY, LESS * (end - start)) : EVERY);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds EVERY{20};
  static constexpr int LESS = 20;

  int64_t free_ = INT64_MAX;
  Clock::time_point next_{};

  // Seconds that so many threads were ready to run and had no core, since they began; 0 where the system does not tell.
  static double waited(int64_t threads) {
    double seconds = 0;
#pragma omp parallel num_threads(threads) reduction(+ : seconds)
    seconds += waited_here();
    return seconds;
  }

  static double waited_here() {
#ifdef __linux__
    const int file = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    char text[96] = {};  // nanoseconds on a core, nanoseconds in the queue, how often
    const bool is_told = read(file, text, sizeof(text) - 1) > 0;
    close(file);
    char* at = text;
    std::strtoull(text, &at, 10);
    return is_told ? double(std::strtoull(at, nullptr, 10)) * 1e-9 : 0;
#else
    return 0;
#endif
  }
};

// Of the thread that plays: OpenMP gives each one its own others.
static thread_local Team team;
