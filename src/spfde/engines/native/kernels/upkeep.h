// What is done to parameters and statistics between the passes, for many small tensors in one call.
#pragma once

#include <algorithm>
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

// The running statistics of a norm, and where those of the batch stand in the table of norms.
struct Tracked {
  void* mean;
  void* variance;
  int64_t at, channels;
  double share;     // of the batch
  double unbiased;  // what its variance is multiplied with
};

// Row by row of the table: mean and variance of the batch.
SPFDE_EXPORT void spfde_track(const Tracked* norms, int64_t n, const real* table, int64_t row) {
  const auto move = [](void* data, const real* to, double share, double factor, int64_t channels) {
    real* at = static_cast<real*>(data);
    // From the end that is nearer, as PyTorch does it: with a share of 1 nothing of what was is left.
    for (int64_t c = 0; c < channels; c++) {
      const real end = to[c] * real(factor), way = end - at[c];
      at[c] = share < 0.5 ? at[c] + real(share) * way : end - real(1 - share) * way;
    }
  };
  for (const Tracked* norm = norms; norm < norms + n; norm++) {
    move(norm->mean, table + norm->at, norm->share, 1, norm->channels);
    move(norm->variance, table + row + norm->at, norm->share, norm->unbiased, norm->channels);
  }
}
