// The way into the blocked layout and out of it, and from a weight to its active entries and back.
#pragma once

#include <algorithm>

#include "storage.h"

// From a PyTorch tensor (N, C, H, W) with any strides, in elements, and back.
struct PackJob {
  void* tensor;
  int64_t half;  // whether its numbers are bf16
  int64_t strides[4];
  void* blocked;
  Blocked layout;
  int64_t threads;
};

// LANES vectors as the rows of a square matrix, turned: halves of pairs are exchanged at distances 1, 2, 4, …
template <int STEP>
static inline void turn_at(vec* rows) {
  SPFDE_UNROLL for (int i = 0; i < LANES; i++) {
    if (i & STEP) continue;
    const vec a = rows[i], b = rows[i + STEP];
    SPFDE_UNROLL for (int lane = 0; lane < LANES; lane++) {
      rows[i][lane] = lane & STEP ? b[lane - STEP] : a[lane];
      rows[i + STEP][lane] = lane & STEP ? b[lane] : a[lane + STEP];
    }
  }
}

static inline void turn(vec* rows) {
  turn_at<1>(rows);
  turn_at<2>(rows);
  turn_at<4>(rows);
  if (LANES == 16) turn_at<LANES / 2>(rows);
}

// each(s, t, lanes, apart) for every pixel of a group: s is where its first lane's lies in the tensor, apart[lane] how far behind
// that a lane's does, t where its vector lies. Of LANES images whose planes are one piece of memory, square(s, t) for LANES pixels
// instead: t has the place of each.
template <class Each, class Square>
static inline void each_vector(const PackJob& job, const Each& each, const Square& square) {
  const Blocked& blocked = job.layout;
  const int64_t *strides = job.strides, cells = blocked.cells(), pixels = blocked.height * blocked.width;
  const bool is_flat = cells == 1 && strides[3] == 1 && strides[2] == blocked.width;
  int64_t apart[LANES];
  for (int64_t lane = 0; lane < LANES; lane++) {
    const int64_t down = lane % cells / blocked.right, right = lane % blocked.right;
    apart[lane] = lane / cells * strides[0] + down * blocked.height * strides[2] + right * blocked.width * strides[3];
  }
  each_plane(blocked, job.threads, [&](int64_t g, int64_t c) {
    const int64_t lanes = blocked.used(g), first = g * (LANES / cells) * strides[0] + c * strides[1];
    int64_t h = 0, w = 0;
    const auto next = [&] {
      const int64_t t = blocked.at(g, c, h) + w * LANES;
      if (++w == blocked.width) w = 0, h++;
      return t;
    };
    int64_t i = 0;
    for (; is_flat && lanes == LANES && i + LANES <= pixels; i += LANES) {
      int64_t t[LANES];
      for (int64_t k = 0; k < LANES; k++) t[k] = next();
      square(first + i, t);
    }
    for (; i < pixels; i++) {
      const int64_t s = first + h * strides[2] + w * strides[3];
      each(s, next(), lanes, apart);
    }
  });
}

// call(pointer) with a tensor as what it holds.
template <class Call>
static inline void with_type(void* tensor, int64_t half, const Call& call) {
#if SPFDE_HALF
  if (half) return call(static_cast<bf16*>(tensor));
#endif
  (void)half;
  call(static_cast<real*>(tensor));
}

template <class T>
static void pack(const PackJob& job) {
  with_type(job.tensor, job.half, [&](auto* tensor) {
    each_vector(job, [&](int64_t s, int64_t t, int64_t lanes, const int64_t* apart) {
      vec v{};
      for (int64_t lane = 0; lane < lanes; lane++) v[lane] = number(tensor[s + apart[lane]]);
      store(out<T>(job.blocked) + t, v);
    }, [&](int64_t s, const int64_t* t) {
      vec rows[LANES];
      for (int64_t lane = 0; lane < LANES; lane++) rows[lane] = load_anywhere(tensor + s + lane * job.strides[0]);
      turn(rows);
      for (int64_t k = 0; k < LANES; k++) store(out<T>(job.blocked) + t[k], rows[k]);
    });
  });
}
SPFDE_KERNEL(pack, PackJob)

template <class T>
static void unpack(const PackJob& job) {
  with_type(job.tensor, job.half, [&](auto* tensor) {
    each_vector(job, [&](int64_t s, int64_t t, int64_t lanes, const int64_t* apart) {
      for (int64_t lane = 0; lane < lanes; lane++) put(tensor + s + apart[lane], number(in<T>(job.blocked)[t + lane]));
    }, [&](int64_t s, const int64_t* t) {
      vec rows[LANES];
      for (int64_t k = 0; k < LANES; k++) rows[k] = load(in<T>(job.blocked) + t[k]);
      turn(rows);
      for (int64_t lane = 0; lane < LANES; lane++) store_anywhere(tensor + s + lane * job.strides[0], rows[lane]);
    });
  });
}
SPFDE_KERNEL(unpack, PackJob)

// Tokens [tokens, channels], contiguous, into groups of width * LANES of them, and back: token t is column
// t / LANES % width and lane t % LANES of its group.
struct TokensJob {
  void* tokens;
  int64_t half;  // whether its numbers are bf16
  int64_t n;
  void* blocked;
  Blocked layout;
  int64_t threads;
};

// square(s, t) for LANES tokens and as many channels, column(s, t, have) for each channel that is left of `have` tokens:
// s is where they begin among the tokens, t in the layout.
template <class Square, class Column>
static inline void each_square(const TokensJob& job, const Square& square, const Column& column) {
  const Blocked& layout = job.layout;
  const int64_t channels = layout.channels, each = layout.span();
#pragma omp parallel for schedule(static) num_threads(job.threads)
  for (int64_t g = 0; g < layout.groups; g++) {
    for (int64_t i = 0; i < each; i += LANES) {
      const int64_t first = g * each + i, left = job.n - first, have = left < 0 ? 0 : left < LANES ? left : LANES;
      const int64_t token = first * channels, t = layout.at(g, 0, 0) + i;
      int64_t c = 0;
      if (have == LANES) {
        for (; c + LANES <= channels; c += LANES) square(token + c, t + c * each);
      }
      for (; c < channels; c++) column(token + c, t + c * each, have);
    }
  }
}

template <class T>
static void pack_tokens(const TokensJob& job) {
  const int64_t channels = job.layout.channels, span = job.layout.span();
  T* blocked = out<T>(job.blocked);
  with_type(job.tokens, job.half, [&](auto* tokens) {
    const auto square = [&](int64_t s, int64_t t) {
      vec rows[LANES];
      SPFDE_UNROLL for (int k = 0; k < LANES; k++) rows[k] = load_anywhere(tokens + s + k * channels);
      turn(rows);
      SPFDE_UNROLL for (int k = 0; k < LANES; k++) store(blocked + t + k * span, rows[k]);
    };
    each_square(job, square, [&](int64_t s, int64_t t, int64_t have) {
      vec v{};
      for (int64_t lane = 0; lane < have; lane++) v[lane] = number(tokens[s + lane * channels]);
      store(blocked + t, v);
    });
  });
}
SPFDE_KERNEL(pack_tokens, TokensJob)

template <class T>
static void unpack_tokens(const TokensJob& job) {
  const int64_t channels = job.layout.channels, span = job.layout.span();
  const T* blocked = in<T>(job.blocked);
  with_type(job.tokens, job.half, [&](auto* tokens) {
    const auto square = [&](int64_t s, int64_t t) {
      vec rows[LANES];
      SPFDE_UNROLL for (int k = 0; k < LANES; k++) rows[k] = load(blocked + t + k * span);
      turn(rows);
      SPFDE_UNROLL for (int k = 0; k < LANES; k++) store_anywhere(tokens + s + k * channels, rows[k]);
    };
    each_square(job, square, [&](int64_t s, int64_t t, int64_t have) {
      for (int64_t lane = 0; lane < have; lane++) put(tokens + s + lane * channels, number(blocked[t + lane]));
    });
  });
}
SPFDE_KERNEL(unpack_tokens, TokensJob)

// values[k] = weights[index[k]]. Of pairs, the active weights are put together first, in bf16, as they follow each other in
// memory, with a zero behind them; the index says which two of these a pair is. So memory is read from its start to its end, not
// from place to place.
struct GatherJob {
  const real* weights;
  const int32_t* active;  // [n_active]: where they are; or null: no pairs
  int64_t n_active;
  void* together;         // bf16 [n_active + 1], whole vectors
  const int32_t* index;   // [n], of pairs [n][2]
  int64_t n;
  real* values;
  int64_t threads;
};

#if SPFDE_DOT
static void gather_pairs(const GatherJob& job) {
  bf16* together = out<bf16>(job.together);
  const int64_t n_active = job.n_active, n = job.n;
#pragma omp parallel num_threads(threads_for(n, job.threads))
  {
#pragma omp for schedule(static)
    for (int64_t k = 0; k <= n_active; k += LANES) {
      const __mmask16 are_there = n_active - k >= LANES ? 0xffff : (1 << (n_active - k)) - 1;
      const __m512i at = _mm512_maskz_loadu_epi32(are_there, job.active + k);
      store(together + k, (vec)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), are_there, at, job.weights, sizeof(real)));
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < n; k++) {
      const uint32_t both = together[job.index[2 * k]].bits | uint32_t(together[job.index[2 * k + 1]].bits) << 16;
      std::memcpy(job.values + k, &both, sizeof(both));
    }
  }
}
#endif

SPFDE_EXPORT void spfde_gather(const void* data) {
  const auto& job = *static_cast<const GatherJob*>(data);
#if SPFDE_DOT
  if (job.active) return gather_pairs(job);
#endif
#pragma omp parallel for schedule(static) num_threads(threads_for(job.n, job.threads))
  for (int64_t k = 0; k < job.n; k++) job.values[k] = job.weights[job.index[k]];
}
