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
  constexpr int64_t at_once = 256;  // without a branch, for vectors; compilers want to know how many
  int64_t i = 0;
  for (; i + at_once <= n; i += at_once) {
    int found = 0;
    for (int64_t k = 0; k < at_once; k++) found |= int(weights[i + k] != 0) & int(mask[i + k] == 0);
    if (found) return 1;
  }
  for (; i < n; i++) {
    if (weights[i] != 0 && !mask[i]) return 1;
  }
  return 0;
}
