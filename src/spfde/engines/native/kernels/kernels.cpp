// One source for every processor: the compiler's vector extensions, C++17, OpenMP, and nothing else.
#include "conv.h"
#include "gradient.h"
#include "packing.h"
#include "pixelwise.h"
#include "pooling.h"
#include "tape.h"
#include "upkeep.h"

SPFDE_EXPORT int spfde_lanes() { return LANES; }
SPFDE_EXPORT int spfde_registers() { return REGISTERS; }
SPFDE_EXPORT int spfde_has_pairs() {
#if SPFDE_DOT
  return 1;
#else
  return 0;
#endif
}
