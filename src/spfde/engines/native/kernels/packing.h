// The way into the blocked layout and out of it, and from a weight to its active entries and back.
#pragma once

#include "lanes.h"

// From a PyTorch tensor (N, C, H, W) with any strides, in elements, and back.
struct PackJob {
  real* tensor;
  int64_t strides[4];
  real* blocked;
  Blocked layout;
  int64_t threads;
};

// each(s, t, lanes) for every pixel of a group: s is its first image's in the tensor, t its vector.
template <class Each>
static inline void each_vector(const PackJob& job, const Each& each) {
  const Blocked blocked = job.layout;
  const int64_t* strides = job.strides;
  each_plane(blocked, job.threads, [&](int64_t g, int64_t c) {
    const int64_t lanes = blocked.images(g);
    for (int64_t h = 0; h < blocked.height; h++) {
      real* s = job.tensor + g * LANES * strides[0] + c * strides[1] + h * strides[2];
      real* t = job.blocked + blocked.at(g, c, h);
      for (int64_t w = 0; w < blocked.width; w++, t += LANES) each(s + w * strides[3], t, lanes);
    }
  });
}

SPFDE_EXPORT void spfde_pack(const void* data) {
  const auto* job = static_cast<const PackJob*>(data);
  const int64_t stride = job->strides[0];
  each_vector(*job, [stride](const real* s, real* t, int64_t lanes) {
    vec v{};
    for (int64_t lane = 0; lane < lanes; lane++) v[lane] = s[lane * stride];
    store(t, v);
  });
}

SPFDE_EXPORT void spfde_unpack(const void* data) {
  const auto* job = static_cast<const PackJob*>(data);
  const int64_t stride = job->strides[0];
  each_vector(*job, [stride](real* s, const real* t, int64_t lanes) {
    for (int64_t lane = 0; lane < lanes; lane++) s[lane * stride] = t[lane];
  });
}

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

// Tokens [tokens, channels], contiguous, into groups of width * LANES of them, and back: token t is column
// t / LANES % width and lane t % LANES of its group. Without a halo a channel's part of a group is one piece.
struct TokensJob {
  real* tokens;
  int64_t n;
  real* blocked;
  Blocked layout;
  int64_t threads;
};

// square(s, t) for LANES tokens and as many channels, column(s, t, have) for each channel that is left of `have` tokens:
// s is where they begin among the tokens, t in the layout.
template <class Square, class Column>
static inline void each_square(const TokensJob& job, const Square& square, const Column& column) {
  const Blocked layout = job.layout;
  const int64_t channels = layout.channels, each = layout.span;
#pragma omp parallel for schedule(static) num_threads(job.threads)
  for (int64_t g = 0; g < layout.groups; g++) {
    for (int64_t i = 0; i < each; i += LANES) {
      const int64_t first = g * each + i, left = job.n - first, have = left < 0 ? 0 : left < LANES ? left : LANES;
      real* token = job.tokens + first * channels;
      real* t = job.blocked + layout.origin(g, 0) + i;
      int64_t c = 0;
      if (have == LANES) {
        for (; c + LANES <= channels; c += LANES) square(token + c, t + c * each);
      }
      for (; c < channels; c++) column(token + c, t + c * each, have);
    }
  }
}

SPFDE_EXPORT void spfde_pack_tokens(const void* data) {
  const auto* job = static_cast<const TokensJob*>(data);
  const int64_t channels = job->layout.channels, span = job->layout.span;
  const auto square = [=](const real* s, real* t) {
    vec rows[LANES];
    SPFDE_UNROLL for (int k = 0; k < LANES; k++) rows[k] = load_anywhere(s + k * channels);
    turn(rows);
    SPFDE_UNROLL for (int k = 0; k < LANES; k++) store(t + k * span, rows[k]);
  };
  each_square(*job, square, [=](const real* s, real* t, int64_t have) {
    vec v{};
    for (int64_t lane = 0; lane < have; lane++) v[lane] = s[lane * channels];
    store(t, v);
  });
}

SPFDE_EXPORT void spfde_unpack_tokens(const void* data) {
  const auto* job = static_cast<const TokensJob*>(data);
  const int64_t channels = job->layout.channels, span = job->layout.span;
  const auto square = [=](real* s, const real* t) {
    vec rows[LANES];
    SPFDE_UNROLL for (int k = 0; k < LANES; k++) rows[k] = load(t + k * span);
    turn(rows);
    SPFDE_UNROLL for (int k = 0; k < LANES; k++) store_anywhere(s + k * channels, rows[k]);
  };
  each_square(*job, square, [=](real* s, const real* t, int64_t have) {
    for (int64_t lane = 0; lane < have; lane++) s[lane * channels] = t[lane];
  });
}

// values[k] = weights[index[k]], and back: added, or put there.
struct IndexJob {
  real* weights;
  const int32_t* index;
  int64_t n;
  real* values;
  int64_t accumulate, threads;
};

SPFDE_EXPORT void spfde_gather(const void* data) {
  const auto* job = static_cast<const IndexJob*>(data);
#pragma omp parallel for schedule(static) num_threads(job->threads)
  for (int64_t k = 0; k < job->n; k++) job->values[k] = job->weights[job->index[k]];
}

SPFDE_EXPORT void spfde_scatter(const void* data) {
  const auto* job = static_cast<const IndexJob*>(data);
#pragma omp parallel for schedule(static) num_threads(job->threads)
  for (int64_t k = 0; k < job->n; k++) {
    real* at = job->weights + job->index[k];
    *at = job->accumulate ? *at + job->values[k] : job->values[k];
  }
}

// target += source, of n numbers.
struct AccumulateJob {
  const real* source;
  real* target;
  int64_t n;
};

SPFDE_EXPORT void spfde_accumulate(const void* data) {
  const auto* job = static_cast<const AccumulateJob*>(data);
  for (int64_t k = 0; k < job->n; k++) job->target[k] += job->source[k];
}
