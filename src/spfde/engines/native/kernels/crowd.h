// How threads wait for each other where other processes want the cores too.
//
// OpenMP's threads spin at the end of every kernel, and of every operation of PyTorch, for milliseconds until they sleep. Where
// each has a core that is fastest. Where one of them stands in a queue for a core, another one spins for it on a core that
// it could have, and a step takes many times as long as the cores would need.
//
// GCC's runtime lets waiting threads sleep at once when the process has more of them than cores. So from time to time some
// kernels are watched: the system tells how long each thread was ready to run and had no core. If that is a good part of the time,
// threads that do nothing are added until it is no more. Who computes what stays as it is.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <fcntl.h>
#include <unistd.h>
#endif

// Whether threads that waited so many seconds for a core, all together, in so many seconds are short of cores.
static inline bool lacks_cores(double waited, double seconds) {
  constexpr double some = 0.25;  // of a thread: a moment's guest, such as the system itself, is gone before one has slept
  return waited >= some * seconds;
}

// What is believed after some looks.
//
// The system may put new threads on one core, and see after a tenth of a second that others are free: only many looks in a row
// tell of a lack. To look, then, is to do without what helps: soon, lest a mistake lasts, and more and more rarely.
class Judgement {
 public:
  void take(bool lacks) {
    others_ = lacks == lacks_ ? 0 : others_ + 1;
    if (others_ == (lacks_ ? FREE : BUSY)) lacks_ = lacks, others_ = 0, pause_ = SOONEST;
    else if (others_ == 0) pause_ = std::min(2 * pause_, RAREST);
  }
  bool lacks() const { return lacks_; }
  // How many times as long as a look takes nothing is to be looked at.
  int pause() const { return lacks_ && others_ == 0 ? pause_ : 1; }

 private:
  static constexpr int BUSY = 8, FREE = 4;  // looks in a row that are believed
  static constexpr int SOONEST = 4, RAREST = 64;

  bool lacks_ = false;
  int others_ = 0;  // looks in a row that say otherwise
  int pause_ = SOONEST;
};

// More threads of OpenMP than there are cores, while it stands: until it is told to leave, or not used for some seconds.
//
// A fork of the process has none of its threads, and would wait for them without end: it leaves what it has of them alone.
class Crowd {
 public:
  ~Crowd() {
    if (is_forked()) {
      (void)one_.release();
    } else {
      leave();
    }
  }

  // Whether it stands; it stays for longer then.
  bool stands() {
    if (is_forked() || one_ == nullptr) return false;
    const std::lock_guard<std::mutex> lock(one_->mutex);
    one_->until = Clock::now() + UNUSED;
    return one_->state == STANDS;
  }

  void gather() {
#ifdef _OPENMP
    if (is_forked() || stands()) return;
    leave();
    auto made = std::make_unique<One>();
    made->until = Clock::now() + UNUSED;
    try {
      made->thread = std::thread(stay, made.get());
    } catch (const std::system_error&) {  // no more threads: it goes on as it was
      return;
    }
    one_ = std::move(made);
    std::unique_lock<std::mutex> lock(one_->mutex);  // what is computed before would wait in the old way
    one_->changed.wait(lock, [this] { return one_->state != COMES; });
#endif
  }

  void leave() {
    if (is_forked() || one_ == nullptr) return;
    {
      const std::lock_guard<std::mutex> lock(one_->mutex);
      one_->state = GONE;
    }
    one_->changed.notify_all();
    one_->thread.join();
    one_ = nullptr;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::seconds UNUSED{2};
  enum State { COMES, STANDS, GONE };

  // The thread that has the others around it, and what it is told.
  struct One {
    std::thread thread;
    std::mutex mutex;
    std::condition_variable changed;
    State state = COMES;
    Clock::time_point until{};
  };

  std::unique_ptr<One> one_;
  int64_t process_ = process();

  bool is_forked() const { return process_ != process(); }

  static int64_t process() {
#ifdef __linux__
    return getpid();
#else
    return 0;
#endif
  }

  static void stay(One* one) {
#ifdef _OPENMP
    std::atomic<int> n{0};  // something to do: the compiler leaves out a region in which there is nothing
#pragma omp parallel num_threads(omp_get_num_procs() + 1)
    n++;
#endif
    std::unique_lock<std::mutex> lock(one->mutex);
    one->state = STANDS;
    one->changed.notify_all();
    while (one->state == STANDS && Clock::now() < one->until) one->changed.wait_until(lock, one->until);
    one->state = GONE;
  }
};

// Watches, from time to time, how the threads of this one wait for each other.
class Watch {
 public:
  // Before the kernels of a tape, which so many threads share.
  void begin(int64_t threads) {
#ifdef SPFDE_UNWATCHED  // to measure what it costs
    return;
#endif
    const auto now = Clock::now();
    if (judgement_.lacks()) crowd_.stands();
    // What began long ago, or with other threads, says nothing.
    if (looks_ && threads == threads_ && now - start_ < LONG) return;
    looks_ = threads > 1 && (looks_ || now >= next_);
    if (!looks_) return;
    threads_ = threads, start_ = now;
    crowd_.leave();
    before_ = waited(threads);
  }

  // After each of them.
  void passed() {
    if (!looks_) return;
    const auto now = Clock::now();
    if (now - start_ < LOOK) return;
    looks_ = false;
    const double seconds = std::chrono::duration<double>(now - start_).count();
    judgement_.take(lacks_cores(waited(threads_) - before_, seconds));
    if (judgement_.lacks()) crowd_.gather();
    const auto end = Clock::now();
    next_ = end + std::max<Clock::duration>(EVERY, judgement_.pause() * (end - start_));
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds EVERY{20}, LOOK{15}, LONG{500};

  Crowd crowd_;
  Clock::time_point next_{}, start_{};
  double before_ = 0;
  bool looks_ = false;
  Judgement judgement_;
  int64_t threads_ = 0;

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
static thread_local Watch watch;
