// One source for every processor: the compiler's vector extensions, C++17, OpenMP, and nothing else.
#include "conv.h"
#include "packing.h"
#include "pixelwise.h"
#include "pooling.h"
#include "tape.h"

SPFDE_EXPORT int spfde_lanes() { return LANES; }
