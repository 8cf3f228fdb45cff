// A tape: jobs for kernels, one after another. What lies elsewhere each time is known by slots, until it is played.
#pragma once

#include "crowd.h"
#include "lanes.h"

using Kernel = void(const void* job);

struct Call {
  Kernel* kernel;
  int64_t job;  // where it lies among the jobs, in bytes
};

// The pointer at byte `at` of the jobs is to be `offset` bytes behind the address in a slot.
struct Patch {
  int64_t at, slot, offset;
};

struct Tape {
  char* jobs;
  const Patch* patches;
  int64_t n_patches;
  const Call* calls;
  int64_t n_calls, threads;
};

SPFDE_EXPORT void spfde_play(const Tape* tape, char* const* slots) {
  for (int64_t i = 0; i < tape->n_patches; i++) {
    const Patch& patch = tape->patches[i];
    char* const address = slots[patch.slot] + patch.offset;
    std::memcpy(tape->jobs + patch.at, &address, sizeof(address));
  }
  watch.begin(tape->threads);
  for (int64_t i = 0; i < tape->n_calls; i++) {
    tape->calls[i].kernel(tape->jobs + tape->calls[i].job);
    watch.passed();
  }
}

SPFDE_EXPORT bool spfde_lacks_cores(double waited, double seconds) { return lacks_cores(waited, seconds); }

// The pauses after these looks, negative where a lack of cores is believed.
SPFDE_EXPORT void spfde_judge(const bool* lacks, int64_t n, int* pauses) {
  Judgement judgement;
  for (int64_t i = 0; i < n; i++) {
    judgement.take(lacks[i]);
    pauses[i] = judgement.lacks() ? -judgement.pause() : judgement.pause();
  }
}
