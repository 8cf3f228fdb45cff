// Pooling: maximum, average over a window, average over the whole plane.
#pragma once

#include <algorithm>

#include "lanes.h"

struct PoolJob {
  const real* source;  // forward: the input; backward: the gradient of the output
  real* target;        // forward: the output; backward: the gradient of the input
  Blocked input, output;
  int64_t kernel[2], stride[2], padding[2];
  int32_t* choice;  // maximum: [groups][channels][height * width][LANES], the winner's pixel in its plane
  int64_t count_padding, accumulate, threads;
};

// Rows and columns of the input under one pixel of the output, the ends not included; and what their sum is divided by.
struct Window {
  int64_t top, bottom, left, right;
  real size;
};

// each(x, y, pixel, window) for every pixel of the output, y: x is the first pixel of the input's plane, and `pixel` counts
// over all planes. On the way back the input's planes, which are the target then, are cleared before unless it adds to them.
template <bool BACKWARD, class Each>
static inline void each_window(const PoolJob& job, const Each& each) {
  const Blocked in = job.input, out = job.output;
  each_plane(in, job.threads, [&](int64_t g, int64_t c) {
    real* x = (BACKWARD ? job.target : const_cast<real*>(job.source)) + in.origin(g, c);
    real* y = (BACKWARD ? const_cast<real*>(job.source) : job.target) + out.origin(g, c);
    int64_t pixel = (g * in.channels + c) * out.height * out.width;
    if (BACKWARD && !job.accumulate) {
      for (int64_t h = 0; h < in.height; h++) std::memset(x + h * in.pitch(), 0, sizeof(real) * in.width * LANES);
    }
    for (int64_t p = 0; p < out.height; p++) {
      for (int64_t q = 0; q < out.width; q++, pixel++) {
        const int64_t top = p * job.stride[0] - job.padding[0], left = q * job.stride[1] - job.padding[1];
        const int64_t bottom = std::min(top + job.kernel[0], in.height + job.padding[0]);
        const int64_t right = std::min(left + job.kernel[1], in.width + job.padding[1]);
        Window window{std::max<int64_t>(top, 0), std::min(bottom, in.height), std::max<int64_t>(left, 0),
                      std::min(right, in.width), real((bottom - top) * (right - left))};
        if (!job.count_padding) window.size = real((window.bottom - window.top) * (window.right - window.left));
        each(x, y + p * out.pitch() + q * LANES, pixel, window);
      }
    }
  });
}

SPFDE_EXPORT void spfde_max_pool(const void* data) {
  const auto* job = static_cast<const PoolJob*>(data);
  const int64_t pitch = job->input.pitch(), width = job->input.width;
  each_window<false>(*job, [=](const real* x, real* y, int64_t pixel, const Window& window) {
    int32_t* choice = job->choice + pixel * LANES;
    bool first = true;
    vec best{};
    for (int64_t h = window.top; h < window.bottom; h++) {
      for (int64_t w = window.left; w < window.right; w++) {
        const vec v = load(x + h * pitch + w * LANES);
        for (int lane = 0; lane < LANES; lane++) {
          if (first || v[lane] > best[lane] || v[lane] != v[lane]) {
            best[lane] = v[lane];
            choice[lane] = int32_t(h * width + w);
          }
        }
        first = false;
      }
    }
    store(y, best);
  });
}

SPFDE_EXPORT void spfde_max_pool_backward(const void* data) {
  const auto* job = static_cast<const PoolJob*>(data);
  const int64_t pitch = job->input.pitch(), width = job->input.width;
  each_window<true>(*job, [=](real* dx, const real* d, int64_t pixel, const Window&) {
    const int32_t* choice = job->choice + pixel * LANES;
    for (int lane = 0; lane < LANES; lane++) {
      dx[(choice[lane] / width) * pitch + (choice[lane] % width) * LANES + lane] += d[lane];
    }
  });
}

SPFDE_EXPORT void spfde_avg_pool(const void* data) {
  const auto* job = static_cast<const PoolJob*>(data);
  const int64_t pitch = job->input.pitch();
  each_window<false>(*job, [=](const real* x, real* y, int64_t, const Window& window) {
    vec sum{};
    for (int64_t h = window.top; h < window.bottom; h++) {
      for (int64_t w = window.left; w < window.right; w++) sum += load(x + h * pitch + w * LANES);
    }
    store(y, sum / window.size);
  });
}

SPFDE_EXPORT void spfde_avg_pool_backward(const void* data) {
  const auto* job = static_cast<const PoolJob*>(data);
  const int64_t pitch = job->input.pitch();
  each_window<true>(*job, [=](real* dx, const real* d, int64_t, const Window& window) {
    const vec t = load(d) / window.size;
    for (int64_t h = window.top; h < window.bottom; h++) {
      for (int64_t w = window.left; w < window.right; w++) {
        real* at = dx + h * pitch + w * LANES;
        store(at, load(at) + t);
      }
    }
  });
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
  const Blocked layout = job->layout;
  each_plane(layout, job->threads, [&](int64_t g, int64_t c) {
    vec sum{};
    for (int64_t h = 0; h < layout.height; h++) {
      const real* s = job->blocked + layout.at(g, c, h);
      for (int64_t i = 0; i < layout.width * LANES; i += LANES) sum += load(s + i);
    }
    sum /= real(layout.height * layout.width);
    for (int64_t lane = 0; lane < layout.images(g); lane++) {
      job->means[(g * LANES + lane) * layout.channels + c] = sum[lane];
    }
  });
}

SPFDE_EXPORT void spfde_global_pool_backward(const void* data) {
  const auto* job = static_cast<const GlobalPoolJob*>(data);
  const Blocked layout = job->layout;
  each_plane(layout, job->threads, [&](int64_t g, int64_t c) {
    vec d{};
    for (int64_t lane = 0; lane < layout.images(g); lane++) {
      d[lane] = job->means[(g * LANES + lane) * layout.channels + c] / real(layout.height * layout.width);
    }
    for (int64_t h = 0; h < layout.height; h++) {
      real* t = job->blocked + layout.at(g, c, h);
      for (int64_t i = 0; i < layout.width * LANES; i += LANES) store(t + i, job->accumulate ? load(t + i) + d : d);
    }
  });
}
