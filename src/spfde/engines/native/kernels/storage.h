// Numbers as they are stored: the kernels' own, or bf16, the upper half of a float. All arithmetic is in the former.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "lanes.h"

#if SPFDE_SINGLE
#define SPFDE_HALF 1  // bf16 is there
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SPFDE_DOT 1  // and the processor multiplies pairs of it
#endif
#endif

// A kernel for each kind of storage: `name` is a template over it that takes a job.
#if SPFDE_HALF
#define SPFDE_KERNEL(name, Job)                                                                     \
  SPFDE_EXPORT void spfde_##name(const void* job) { name<real>(*static_cast<const Job*>(job)); }    \
  SPFDE_EXPORT void spfde_##name##_bf16(const void* job) { name<bf16>(*static_cast<const Job*>(job)); }
#else
#define SPFDE_KERNEL(name, Job) \
  SPFDE_EXPORT void spfde_##name(const void* job) { name<real>(*static_cast<const Job*>(job)); }
#endif

#if SPFDE_HALF
struct bf16 {
  uint16_t bits;
};
typedef uint16_t halves __attribute__((vector_size(LANES * sizeof(uint16_t)), may_alias));
typedef uint32_t words __attribute__((vector_size(LANES * sizeof(uint32_t)), may_alias));

// GCC would widen the halves of the vector one by one, and put them together again.
static inline vec widened(halves v) {
#if defined(__AVX512F__)
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)v), 16);
#elif defined(__AVX2__)
  return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)v), 16);
#else
  return (vec)(__builtin_convertvector(v, words) << 16);
#endif
}
static inline vec load(const bf16* p) { return widened(*reinterpret_cast<const halves*>(p)); }

// To the nearest, ties to even; a NaN stays a NaN.
static inline halves rounded(vec v) {
#if SPFDE_DOT
  return (halves)_mm512_cvtneps_pbh((__m512)v);
#else
  const words bits = (words)v;
  const words up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 64;
  return __builtin_convertvector(v == v ? up : quiet, halves);
#endif
}
static inline void store(bf16* p, vec v) { *reinterpret_cast<halves*>(p) = rounded(v); }
// What is stored then.
static inline vec stored(bf16* p, vec v) {
  const halves bits = rounded(v);
  *reinterpret_cast<halves*>(p) = bits;
  return widened(bits);
}

static inline real number(bf16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  real out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
static inline void put(bf16* p, real v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  p->bits = uint16_t(v == v ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 64);
}
#endif
static inline vec stored(real* p, vec v) {
  store(p, v);
  return v;
}
// PyTorch's memory is aligned to its numbers only.
typedef real vec_anywhere __attribute__((vector_size(LANES * sizeof(real)), may_alias, aligned(sizeof(real))));
static inline vec load_anywhere(const real* p) { return *reinterpret_cast<const vec_anywhere*>(p); }
static inline void store_anywhere(real* p, vec v) { *reinterpret_cast<vec_anywhere*>(p) = v; }
#if SPFDE_HALF
static inline vec load_anywhere(const bf16* p) {
  halves v;
  std::memcpy(&v, p, sizeof(v));
  return widened(v);
}
static inline void store_anywhere(bf16* p, vec v) {
  const halves bits = rounded(v);
  std::memcpy(p, &bits, sizeof(bits));
}
#endif
static inline real number(real v) { return v; }
static inline void put(real* p, real v) { *p = v; }

// The first n numbers of a buffer whose job does not say how it is stored.
template <class T>
static inline const T* in(const void* p) {
  return static_cast<const T*>(p);
}
template <class T>
static inline T* out(void* p) {
  return static_cast<T*>(p);
}

struct Room {
  char* memory = nullptr;
  size_t size = 0;
  ~Room() { std::free(memory); }
};

// Memory of a thread, for one kernel; it holds numbers of any kernel before. It goes with the thread.
static inline char* workspace(size_t bytes) {
  static thread_local Room room;
  if (room.size < bytes) {
    std::free(room.memory);
    room.size = (bytes + 4095) / 4096 * 4096;
    room.memory = static_cast<char*>(std::aligned_alloc(4096, room.size));
    if (!room.memory) {
      std::perror("spfde: there is no memory for the kernels");
      std::abort();
    }
    std::memset(room.memory, 0, room.size);
  }
  return room.memory;
}
