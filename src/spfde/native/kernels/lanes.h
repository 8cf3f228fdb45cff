// Vectors and the blocked layout that all kernels share.
//
// A batch of images is cut into groups of LANES; a pixel of a group is one vector, one lane an image. Thus every kernel
// works on whole vectors whatever the width of the image, and a weight meets LANES images at once.
//
// Group after group, channel after channel, row after row; each row ends in `halo` zero pixels and each channel in `halo`
// zero rows, and a group starts with as many zeros. The pixel left of a row is the end of the row before it, and the row
// above a channel the end of the channel before it: one halo serves both sides.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef SPFDE_REAL
#define SPFDE_REAL float
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define SPFDE_UNROLL _Pragma("GCC unroll 16")
#else
#define SPFDE_UNROLL _Pragma("unroll")
#endif

#define SPFDE_EXPORT extern "C" __attribute__((visibility("default")))

using real = SPFDE_REAL;

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef real vec __attribute__((vector_size(LANES * sizeof(real)), may_alias));

static inline vec load(const real* p) { return *reinterpret_cast<const vec*>(p); }
static inline void store(real* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
static inline vec spread(real value) { return value - vec{}; }
static inline real sum_lanes(vec v) {
  real total = 0;
  for (int lane = 0; lane < LANES; lane++) total += v[lane];
  return total;
}

struct Blocked {
  int64_t groups, channels, height, width, halo, batch;
  int64_t plane;  // reals from a channel to the next

  int64_t pitch() const { return (width + halo) * LANES; }
  int64_t lead() const { return (halo * (width + halo) + halo) * LANES; }
  int64_t group() const { return lead() + channels * plane; }
  // Where pixel (0, 0) of a channel lies, in reals from the start of the buffer.
  int64_t origin(int64_t g, int64_t c) const { return g * group() + lead() + c * plane; }
  // Ones in the lanes that hold an image: the last group may be short.
  vec valid(int64_t g) const {
    vec mask{};
    for (int lane = 0; lane < LANES; lane++) mask[lane] = g * LANES + lane < batch ? real(1) : real(0);
    return mask;
  }
  bool is_short(int64_t g) const { return (g + 1) * LANES > batch; }
};

enum Activation : int64_t { NONE = 0, RELU = 1, RELU6 = 2, SILU = 3, GELU = 4 };

static inline vec activate(vec u, int64_t act) {
  const vec zero{};
  switch (act) {
    case RELU:
      return u < zero ? zero : u;  // a NaN stays a NaN
    case RELU6: {
      const vec six = spread(6);
      u = u < zero ? zero : u;
      return u > six ? six : u;
    }
    case SILU:
      for (int lane = 0; lane < LANES; lane++) u[lane] = u[lane] / (1 + std::exp(-u[lane]));
      return u;
    case GELU:
      for (int lane = 0; lane < LANES; lane++) u[lane] *= real(0.5) * (1 + std::erf(u[lane] * real(0.70710678118654752)));
      return u;
    default:
      return u;
  }
}

// d times the slope of the activation at u.
static inline vec activate_backward(vec d, vec u, int64_t act) {
  const vec zero{};
  switch (act) {
    case RELU:
      return u > zero ? d : zero;
    case RELU6:
      return (u > zero) & (u < spread(6)) ? d : zero;
    case SILU:
      for (int lane = 0; lane < LANES; lane++) {
        const real s = 1 / (1 + std::exp(-u[lane]));
        d[lane] *= s * (1 + u[lane] * (1 - s));
      }
      return d;
    case GELU:
      for (int lane = 0; lane < LANES; lane++) {
        const real x = u[lane];
        const real cdf = real(0.5) * (1 + std::erf(x * real(0.70710678118654752)));
        d[lane] *= cdf + x * real(0.39894228040143268) * std::exp(real(-0.5) * x * x);
      }
      return d;
    default:
      return d;
  }
}
