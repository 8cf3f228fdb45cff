// Pooling: maximum, average over a window, average over the whole plane.
#pragma once

#include "lanes.h"

struct PoolJob {
  const real* source;  // forward: the input; backward: the gradient of the output
  real* target;        // forward: the output; backward: the gradient of the input
  Blocked input, output;
  int64_t kernel[2], stride[2], padding[2];
  int32_t* choice;  // maximum: [groups][channels][height * width][LANES], the winner's pixel in its plane
  int64_t count_padding, accumulate, threads;
};

static inline int64_t clip_low(int64_t start) { return start < 0 ? 0 : start; }
static inline int64_t clip_high(int64_t end, int64_t size) { return end < size ? end : size; }

SPFDE_EXPORT void spfde_max_pool(const void* data) {
  const auto* job = static_cast<const PoolJob*>(data);
  const Blocked in = job->input, out = job->output;
#pragma omp parallel for schedule(static) num_threads(job->threads)
  for (int64_t index = 0; index < in.groups * in.channels; index++) {
    const int64_t g = index / in.channels, c = index % in.channels;
    const real* x = job->source + in.origin(g, c);
    real* y = job->target + out.origin(g, c);
    int32_t* choice = job->choice + index * out.height * out.width * LANES;
    for (int64_t p = 0; p < out.height; p++) {
      for (int64_t q = 0; q < out.width; q++, choice += LANES) {
        const int64_t top = p * job->stride[0] - job->padding[0], left = q * job->stride[1] - job->padding[1];
        bool first = true;
        vec best{};
        for (int64_t h = clip_low(top); h < clip_high(top + job->kernel[0], in.height); h++) {
          for (int64_t w = clip_low(left); w < clip_high(left + job->kernel[1], in.width); w++) {
            const vec v = load(x + h * in.pitch() + w * LANES);
            for (int lane = 0; lane < LANES; lane++) {
              if (first || v[lane] > best[lane] || v[lane] != v[lane]) {
                best[lane] = v[lane];
                choice[lane] = int32_t(h * in.width + w);
              }
            }
            first = false;
          }
        }
        store(y + p * out.pitch() + q * LANES, best);
      }
    }
  }
}

static void clear_planes(const PoolJob* job, int64_t g, int64_t c) {
  if (job->accumulate) return;
  for (int64_t h = 0; h < job->input.height; h++) {
    std::memset(job->target + job->input.origin(g, c) + h * job->input.pitch(), 0, sizeof(real) * job->input.width * LANES);
  }
}

SPFDE_EXPORT void spfde_max_pool_backward(const void* data) {
  const auto* job = static_cast<const PoolJob*>(data);
  const Blocked in = job->input, out = job->output;
#pragma omp parallel for schedule(static) num_threads(job->threads)
  for (int64_t index = 0; index < in.groups * in.channels; index++) {
    const int64_t g = index / in.channels, c = index % in.channels;
    clear_planes(job, g, c);
    const real* d = job->source + out.origin(g, c);
    real* dx = job->target + in.origin(g, c);
    const int32_t* choice = job->choice + index * out.height * out.width * LANES;
    for (int64_t p = 0; p < out.height; p++) {
      for (int64_t q = 0; q < out.width; q++, choice += LANES) {
        const real* t = d + p * out.pitch() + q * LANES;
        for (int lane = 0; lane < LANES; lane++) {
          dx[(choice[lane] / in.width) * in.pitch() + (choice[lane] % in.width) * LANES + lane] += t[lane];
        }
      }
    }
  }
}

// Number of pixels that a window's sum is divided by, as PyTorch counts it.
static inline real window_size(const PoolJob* job, int64_t top, int64_t left) {
  const int64_t bottom = clip_high(top + job->kernel[0], job->input.height + job->padding[0]);
  const int64_t right = clip_high(left + job->kernel[1], job->input.width + job->padding[1]);
  if (job->count_padding) return real((bottom - top) * (right - left));
  return real((clip_high(bottom, job->input.height) - clip_low(top)) * (clip_high(right, job->input.width) - clip_low(left)));
}

SPFDE_EXPORT void spfde_avg_pool(const void* data) {
  const auto* job = static_cast<const PoolJob*>(data);
  const Blocked in = job->input, out = job->output;
#pragma omp parallel for schedule(static) num_threads(job->threads)
  for (int64_t index = 0; index < in.groups * in.channels; index++) {
    const int64_t g = index / in.channels, c = index % in.channels;
    const real* x = job->source + in.origin(g, c);
    real* y = job->target + out.origin(g, c);
    for (int64_t p = 0; p < out.height; p++) {
      for (int64_t q = 0; q < out.width; q++) {
        const int64_t top = p * job->stride[0] - job->padding[0], left = q * job->stride[1] - job->padding[1];
        vec sum{};
        for (int64_t h = clip_low(top); h < clip_high(top + job->kernel[0], in.height); h++) {
          for (int64_t w = clip_low(left); w < clip_high(left + job->kernel[1], in.width); w++) {
            sum += load(x + h * in.pitch() + w * LANES);
          }
        }
        store(y + p * out.pitch() + q * LANES, sum / window_size(job, top, left));
      }
    }
  }
}

SPFDE_EXPORT void spfde_avg_pool_backward(const void* data) {
  const auto* job = static_cast<const PoolJob*>(data);
  const Blocked in = job->input, out = job->output;
#pragma omp parallel for schedule(static) num_threads(job->threads)
  for (int64_t index = 0; index < in.groups * in.channels; index++) {
    const int64_t g = index / in.channels, c = index % in.channels;
    clear_planes(job, g, c);
    const real* d = job->source + out.origin(g, c);
    real* dx = job->target + in.origin(g, c);
    for (int64_t p = 0; p < out.height; p++) {
      for (int64_t q = 0; q < out.width; q++) {
        const int64_t top = p * job->stride[0] - job->padding[0], left = q * job->stride[1] - job->padding[1];
        const vec t = load(d + p * out.pitch() + q * LANES) / window_size(job, top, left);
        for (int64_t h = clip_low(top); h < clip_high(top + job->kernel[0], in.height); h++) {
          for (int64_t w = clip_low(left); w < clip_high(left + job->kernel[1], in.width); w++) {
            real* at = dx + h * in.pitch() + w * LANES;
            store(at, load(at) + t);
          }
        }
      }
    }
  }
}

// Mean of each plane, to and from a contiguous (N, C).
struct GlobalPoolJob {
  real* blocked;  // planes, or their gradient
  Blocked layout;
  real* means;  // [images, channels], or their gradient
  int64_t accumulate, threads;
};

SPFDE_EXPORT void spfde_global_pool(const void* data) {
  const auto* job = static_cast<const GlobalPoolJob*>(data);
  const Blocked* layout = &job->layout;
#pragma omp parallel for schedule(static) num_threads(job->threads)
  for (int64_t index = 0; index < layout->groups * layout->channels; index++) {
    const int64_t g = index / layout->channels, c = index % layout->channels;
    vec sum{};
    for (int64_t h = 0; h < layout->height; h++) {
      const real* s = job->blocked + layout->origin(g, c) + h * layout->pitch();
      for (int64_t i = 0; i < layout->width * LANES; i += LANES) sum += load(s + i);
    }
    sum /= real(layout->height * layout->width);
    for (int64_t lane = 0; lane < LANES && g * LANES + lane < layout->batch; lane++) {
      job->means[(g * LANES + lane) * layout->channels + c] = sum[lane];
    }
  }
}

SPFDE_EXPORT void spfde_global_pool_backward(const void* data) {
  const auto* job = static_cast<const GlobalPoolJob*>(data);
  const Blocked* layout = &job->layout;
#pragma omp parallel for schedule(static) num_threads(job->threads)
  for (int64_t index = 0; index < layout->groups * layout->channels; index++) {
    const int64_t g = index / layout->channels, c = index % layout->channels;
    vec d{};
    for (int64_t lane = 0; lane < LANES && g * LANES + lane < layout->batch; lane++) {
      d[lane] = job->means[(g * LANES + lane) * layout->channels + c] / real(layout->height * layout->width);
    }
    for (int64_t h = 0; h < layout->height; h++) {
      real* t = job->blocked + layout->origin(g, c) + h * layout->pitch();
      for (int64_t i = 0; i < layout->width * LANES; i += LANES) store(t + i, job->accumulate ? load(t + i) + d : d);
    }
  }
}
