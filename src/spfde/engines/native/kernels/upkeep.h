// What is done to parameters and running statistics beside the passes.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "lanes.h"

// A piece of a tensor and of its mask.
struct Masked {
  void* numbers;
  const void* mask;  // a byte each, zero where nothing is to be
  int64_t n;
};

// Is there anything where the mask has nothing? With `clears` it is zeroed, a negative zero too, which else is no thing.
template <bool CLEARS>
static inline bool outside(const Masked& piece) {
  using Bits = std::conditional_t<sizeof(real) == 4, uint32_t, uint64_t>;
  constexpr Bits seen = CLEARS ? ~Bits(0) : ~Bits(0) >> 1;
  constexpr int64_t at_once = 256;  // without a branch, for vectors; compilers want to know how many
  Bits* numbers = static_cast<Bits*>(piece.numbers);
  const uint8_t* mask = static_cast<const uint8_t*>(piece.mask);
  const auto inside = [=](int64_t k) { return Bits(0) - Bits(mask[k] != 0); };  // all bits or none
  bool any = false;
  for (int64_t i = 0; i < piece.n; i += at_once) {
    const int64_t n = std::min(at_once, piece.n - i);
    Bits found = 0;
    if (n == at_once) {
      for (int64_t k = i; k < i + at_once; k++) found |= numbers[k] & seen & ~inside(k);
    } else {
      for (int64_t k = i; k < i + n; k++) found |= numbers[k] & seen & ~inside(k);
    }
    if (!found) continue;
    any = true;
    if (!CLEARS) break;
    for (int64_t k = i; k < i + n; k++) numbers[k] &= inside(k);
  }
  return any;
}

SPFDE_EXPORT int spfde_outside(const Masked* pieces, int64_t n, int clears, int64_t threads) {
  int found = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : found)
  for (int64_t i = 0; i < n; i++) found |= clears ? outside<true>(pieces[i]) : outside<false>(pieces[i]);
  return found;
}

// Running statistics of a norm, and what they move towards.
struct TrackJob {
  void* mean;
  void* variance;
  void* seen;              // int64: batches so far
  const real* batch_mean;
  const real* batch_variance;  // biased
  int64_t channels;
  double share;     // of the batch; not a number: as much as of each one before
  double unbiased;  // what the batch's variance is multiplied with
};

SPFDE_EXPORT void spfde_track(const void* data) {
  const auto* job = static_cast<const TrackJob*>(data);
  const int64_t seen = ++*static_cast<int64_t*>(job->seen);
  const double share = std::isnan(job->share) ? 1.0 / double(seen) : job->share;
  const auto move = [=](void* running, const real* to, double factor) {
    real* at = static_cast<real*>(running);
    // From the end that is nearer, as PyTorch does it: with a share of 1 nothing of what was is left.
    for (int64_t c = 0; c < job->channels; c++) {
      const real end = to[c] * real(factor), way = end - at[c];
      at[c] = share < 0.5 ? at[c] + real(share) * way : end - real(1 - share) * way;
    }
  };
  move(job->mean, job->batch_mean, 1);
  move(job->variance, job->batch_variance, job->unbiased);
}
