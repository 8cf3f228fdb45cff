// Vectors and the blocked layout that all kernels share.
//
// A batch of images is cut into groups of LANES; a pixel of a group is one vector, one lane an image. Thus every kernel
// works on whole vectors whatever the width of the image, and a weight meets LANES images at once. Where these would be
// too few, each image is cut into cells of one size, and a lane is a cell: to all kernels that look at a pixel alone that
// is the same.
//
// Group after group, row after row, and in a row channel after channel, pixel after pixel: the rows that a thread works
// through are one piece of memory. Zeros around an image are in no memory but a thread's window (window.h).
//
// Kernels cut groups and rows among the threads in the same way, in order (pooling and packing: groups and channels). So
// a thread reads what it wrote itself: two cores need not share a cache, and what travels between their caches costs more
// than what a step computes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef SPFDE_REAL
#define SPFDE_REAL float
#define SPFDE_SINGLE 1  // whether that is the type above, which the preprocessor cannot ask
#endif

#if defined(SPFDE_ROLLED)  // for sanitizers, under which unrolled code takes minutes to compile
#define SPFDE_UNROLL
#elif defined(__GNUC__) && !defined(__clang__)
#define SPFDE_UNROLL _Pragma("GCC unroll 16")
#else
#define SPFDE_UNROLL _Pragma("unroll")
#endif

// Of a function, and of a lambda: it is put where it is called, so that what it works on stays in registers.
#define SPFDE_INLINE inline SPFDE_HERE
#define SPFDE_HERE __attribute__((always_inline))
#define SPFDE_EXPORT extern "C" __attribute__((visibility("default")))

using real = SPFDE_REAL;

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = SPFDE_SINGLE ? 32 : 16;
#else
constexpr int LANES = 8, REGISTERS = 16;  // NEON has 32 of half the size
#endif

// call(flag) with a flag that is a constant.
template <class Call>
static inline void with_flag(bool flag, const Call& call) {
  if (flag) return call(std::true_type{});
  call(std::false_type{});
}

typedef real vec __attribute__((vector_size(LANES * sizeof(real)), may_alias));

static inline vec load(const real* p) { return *reinterpret_cast<const vec*>(p); }
static inline void store(real* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
// The first place for a vector at or after p.
static inline real* aligned(real* p) {
  const uintptr_t size = LANES * sizeof(real);
  return reinterpret_cast<real*>((reinterpret_cast<uintptr_t>(p) + size - 1) / size * size);
}
static inline vec spread(real value) { return value - vec{}; }
// a * b + c, rounded once where the processor does that. Left to themselves, compilers do it in one copy of a function and not in
// another, and a value would depend on which one made it.
static inline vec multiply_add(vec a, vec b, vec c) {
#if SPFDE_SINGLE && defined(__AVX512F__)
  return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif SPFDE_SINGLE && defined(__AVX2__) && defined(__FMA__)
  return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_FEATURE_FMA)
  vec out;
  for (int lane = 0; lane < LANES; lane++) out[lane] = std::fma(a[lane], b[lane], c[lane]);
  return out;
#else
  return a * b + c;
#endif
}
typedef decltype(vec{} == vec{}) ints;  // as wide as the numbers
static inline ints spread_int(int64_t value) { return decltype(ints{}[0] + 0)(value) - ints{}; }
// v[from[lane]] in each lane.
static inline vec permuted(vec v, ints from) {
#if defined(__GNUC__) && !defined(__clang__)
  return __builtin_shuffle(v, from);
#else
  vec out;
  for (int lane = 0; lane < LANES; lane++) out[lane] = v[from[lane]];
  return out;
#endif
}
// Sums over many pixels are put together in double precision.
typedef double dvec __attribute__((vector_size(LANES * sizeof(double)), may_alias));
static inline dvec widen(vec v) { return __builtin_convertvector(v, dvec); }
static inline double sum_lanes(dvec v) {
  double total = v[0];
  for (int lane = 1; lane < LANES; lane++) total += v[lane];
  return total;
}
// Four lanes that the others are added to.
typedef real vec4 __attribute__((vector_size(4 * sizeof(real)), may_alias));
static_assert(LANES % 4 == 0, "lanes are put together in fours");
static inline vec4 sum_to_four(vec v) {
#if SPFDE_SINGLE && (defined(__AVX512F__) || defined(__AVX2__))
#if defined(__AVX512F__)
  const __m256 above = _mm256_castpd_ps(_mm512_extractf64x4_pd((__m512d)v, 1));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), above);
#else
  const __m256 half = (__m256)v;
#endif
  return (vec4)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#else
  vec4 sum{};
  for (int lane = 0; lane < LANES; lane++) sum[lane % 4] += v[lane];
  return sum;
#endif
}
static inline real sum_lanes(vec4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#if SPFDE_SINGLE
static inline real sum_lanes(vec v) {
  ints lane;
  for (int k = 0; k < LANES; k++) lane[k] = k;
  SPFDE_UNROLL for (int away = LANES / 2; away > 0; away /= 2) v += permuted(v, lane ^ away);
  return v[0];
}
#endif

// Exponential and normal distribution function of whole vectors. In single precision by polynomials (the standard library
// has no vectors, and these would be most of a transformer's step); in double precision, for tests, exact.
#if SPFDE_SINGLE
typedef int32_t ivec __attribute__((vector_size(LANES * sizeof(int32_t))));

// exp(x) = 2^n exp(r), r within half of ln 2 of zero; relative error about 1e-7.
static inline vec exponential(vec x) {
  x = x > spread(88) ? spread(88) : x;
  x = x < spread(-87) ? spread(-87) : x;  // a NaN stays a NaN
  const vec shifted = x * real(1.44269504088896341) + real(12582912);  // 1.5 * 2^23: rounds to the nearest integer
  const vec n = shifted - real(12582912);
  const vec r = x - n * real(0.693359375) + n * real(2.12194440e-4);  // ln 2 in two parts
  vec p = spread(1.0 / 5040);
  p = p * r + real(1.0 / 720);
  p = p * r + real(1.0 / 120);
  p = p * r + real(1.0 / 24);
  p = p * r + real(1.0 / 6);
  p = p * r + real(0.5);
  p = p * r + real(1);
  p = p * r + real(1);
  union {
    vec real_bits;
    ivec bits;
  } power;
  power.real_bits = shifted;
  power.bits = (power.bits + 127) << 23;  // n stands in the low bits of `shifted`
  return p * power.real_bits;
}

// P(X < x) of a normal X, from exp(-x * x / 2): Abramowitz and Stegun, 7.1.26, absolute error below 1e-7.
static inline vec normal_cdf(vec x, vec bell) {
  const vec zero{};
  const vec t = 1 / (1 + real(0.3275911 * 0.70710678118654752) * (x < zero ? -x : x));
  vec p = spread(1.061405429);
  p = p * t + real(-1.453152027);
  p = p * t + real(1.421413741);
  p = p * t + real(-0.284496736);
  p = p * t + real(0.254829592);
  const vec tail = real(0.5) * p * t * bell;
  return x < zero ? tail : 1 - tail;
}
#else
static inline vec exponential(vec x) {
  for (int lane = 0; lane < LANES; lane++) x[lane] = std::exp(x[lane]);
  return x;
}

static inline vec normal_cdf(vec x, vec) {
  for (int lane = 0; lane < LANES; lane++) x[lane] = real(0.5) * std::erfc(-x[lane] * real(0.70710678118654752));
  return x;
}
#endif

struct Blocked {
  int64_t groups, channels, height, width;  // of an image, or of a cell of one
  int64_t batch;                            // lanes in use: images, or all of their cells
  int64_t down, right;                      // cells of an image; lane after lane, row by row

  // In numbers: from a channel to the next, from a row to the next, from a group to the next.
  int64_t span() const { return width * LANES; }
  int64_t pitch() const { return channels * span(); }
  int64_t group() const { return height * pitch(); }
  // Where a row of a channel begins.
  int64_t at(int64_t g, int64_t c, int64_t h) const { return g * group() + h * pitch() + c * span(); }
  int64_t cells() const { return down * right; }
  // Ones in the lanes that are in use: the last group may be short.
  vec valid(int64_t g) const {
    vec mask{};
    for (int lane = 0; lane < LANES; lane++) mask[lane] = g * LANES + lane < batch ? real(1) : real(0);
    return mask;
  }
  bool is_short(int64_t g) const { return (g + 1) * LANES > batch; }
  int64_t used(int64_t g) const { return is_short(g) ? batch - g * LANES : LANES; }
};

// Threads for so many numbers: for few, others would be woken in vain.
static inline int64_t threads_for(int64_t numbers, int64_t threads) { return numbers < 8192 ? 1 : threads; }

// each(g, c) for every channel of every group.
template <class Each>
static inline void each_plane(const Blocked& layout, int64_t threads, const Each& each) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t index = 0; index < layout.groups * layout.channels; index++) {
    each(index / layout.channels, index % layout.channels);
  }
}

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
      return u / (1 + exponential(-u));
    case GELU:
      return u * normal_cdf(u, exponential(real(-0.5) * u * u));
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
    case SILU: {
      const vec s = 1 / (1 + exponential(-u));
      return d * s * (1 + u * (1 - s));
    }
    case GELU: {
      const vec bell = exponential(real(-0.5) * u * u);
      return d * (normal_cdf(u, bell) + u * real(0.39894228040143268) * bell);
    }
    default:
      return d;
  }
}
