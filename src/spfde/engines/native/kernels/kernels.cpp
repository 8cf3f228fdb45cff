// One source for every processor: the compiler's vector extensions, C++17, OpenMP, and nothing else.
#include "conv.h"
#include "packing.h"
#include "pixelwise.h"
#include "pooling.h"
#include "tape.h"

SPFDE_EXPORT int64_t spfde_abi() { return 2; }
SPFDE_EXPORT int64_t spfde_lanes() { return LANES; }
SPFDE_EXPORT int64_t spfde_real_bytes() { return sizeof(real); }
