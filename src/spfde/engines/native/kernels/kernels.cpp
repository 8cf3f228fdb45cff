// One source for every processor: the compiler's vector extensions, C++17, OpenMP, and nothing else.
#include "conv.h"
#include "gradient.h"
#include "packing.h"
#include "pixelwise.h"
#include "pooling.h"
#include "tape.h"

SPFDE_EXPORT int spfde_lanes() { return LANES; }
SPFDE_EXPORT int spfde_registers() { return REGISTERS; }
SPFDE_EXPORT int spfde_has_pairs() {
#if SPFDE_DOT
  return 1;
#else
  return 0;
#endif
}

// Is there a weight where the mask has none?
SPFDE_EXPORT int spfde_outside(const real* weights, const unsigned char* mask, int64_t n) {
  constexpr int64_t at_once = 4096;  // without a branch, for vectors
  for (int64_t start = 0; start < n; start += at_once) {
    const int64_t end = start + at_once < n ? start + at_once : n;
    int found = 0;
    for (int64_t i = start; i < end; i++) found |= (weights[i] != 0) & !mask[i];
    if (found) return 1;
  }
  return 0;
}
