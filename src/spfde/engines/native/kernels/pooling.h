// Pooling: maximum, average over a window, average over the whole plane.
#pragma once

#include <algorithm>

#include "storage.h"

struct PoolJob {
  const void* source;  // forward: the input; backward: the gradient of the output
  void* target;        // forward: the output; backward: the gradient of the input
  Blocked input, output;
  int64_t kernel[2], stride[2], padding[2];
  int32_t* choice;  // maximum: [groups][channels][height * width][LANES], the winner's pixel in its plane
  int64_t count_padding, accumulate, threads;
};

// Rows and columns of the input under one pixel of the output, the ends not included; and what their sum is divided by.
struct PoolWindow {
  int64_t top, bottom, left, right;
  real size;
};

// each(x, y, pixel, window) for every pixel of the output, y: x is the first pixel of the input's plane, and `pixel` counts
// over all planes. On the way back the input's planes, which are the target then, are cleared before unless it adds to them.
template <class T, bool BACKWARD, class Each>
static inline void each_window(const PoolJob& job, const Each& each) {
  const Blocked &x_layout = job.input, &y_layout = job.output;
  each_plane(x_layout, job.threads, [&](int64_t g, int64_t c) {
    T* x = (BACKWARD ? out<T>(job.target) : const_cast<T*>(in<T>(job.source))) + x_layout.at(g, c, 0);
    T* y = (BACKWARD ? const_cast<T*>(in<T>(job.source)) : out<T>(job.target)) + y_layout.at(g, c, 0);
    int64_t pixel = (g * x_layout.channels + c) * y_layout.height * y_layout.width;
    if (BACKWARD && !job.accumulate) {
      for (int64_t h = 0; h < x_layout.height; h++) std::memset(static_cast<void*>(x + h * x_layout.pitch()), 0, sizeof(T) * x_layout.span());
    }
    for (int64_t p = 0; p < y_layout.height; p++) {
      for (int64_t q = 0; q < y_layout.width; q++, pixel++) {
        const int64_t top = p * job.stride[0] - job.padding[0], left = q * job.stride[1] - job.padding[1];
        const int64_t bottom = std::min(top + job.kernel[0], x_layout.height + job.padding[0]);
        const int64_t right = std::min(left + job.kernel[1], x_layout.width + job.padding[1]);
        PoolWindow window{std::max<int64_t>(top, 0), std::min(bottom, x_layout.height), std::max<int64_t>(left, 0),
                          std::min(right, x_layout.width), real((bottom - top) * (right - left))};
        if (!job.count_padding) window.size = real((window.bottom - window.top) * (window.right - window.left));
        each(x, y + p * y_layout.pitch() + q * LANES, pixel, window);
      }
    }
  });
}

template <class T>
static void max_pool(const PoolJob& job) {
  const int64_t pitch = job.input.pitch(), width = job.input.width;
  each_window<T, false>(job, [&](const T* x, T* y, int64_t pixel, const PoolWindow& window) {
    const int64_t start = window.top * pitch + window.left * LANES;
    vec best = load(x + start);
    ints choice = spread_int(window.top * width + window.left);
    for (int64_t h = window.top; h < window.bottom; h++) {
      for (int64_t w = window.left; w < window.right; w++) {
        const vec v = load(x + h * pitch + w * LANES);
        const ints better = (v > best) | (v != v);
        best = better ? v : best;
        choice = better ? spread_int(h * width + w) : choice;
      }
    }
    for (int lane = 0; lane < LANES; lane++) job.choice[pixel * LANES + lane] = int32_t(choice[lane]);
    store(y, best);
  });
}
SPFDE_KERNEL(max_pool, PoolJob)

template <class T>
static void max_pool_backward(const PoolJob& job) {
  const int64_t pitch = job.input.pitch(), width = job.input.width;
  each_window<T, true>(job, [&](T* dx, const T* d, int64_t pixel, const PoolWindow&) {
    const int32_t* choice = job.choice + pixel * LANES;
    for (int lane = 0; lane < LANES; lane++) {
      T* at = dx + (choice[lane] / width) * pitch + (choice[lane] % width) * LANES + lane;
      put(at, number(*at) + number(d[lane]));
    }
  });
}
SPFDE_KERNEL(max_pool_backward, PoolJob)

template <class T>
static void avg_pool(const PoolJob& job) {
  const int64_t pitch = job.input.pitch();
  each_window<T, false>(job, [&](const T* x, T* y, int64_t, const PoolWindow& window) {
    vec sum{};
    for (int64_t h = window.top; h < window.bottom; h++) {
      for (int64_t w = window.left; w < window.right; w++) sum += load(x + h * pitch + w * LANES);
    }
    store(y, sum / window.size);
  });
}
SPFDE_KERNEL(avg_pool, PoolJob)

template <class T>
static void avg_pool_backward(const PoolJob& job) {
  const int64_t pitch = job.input.pitch();
  each_window<T, true>(job, [&](T* dx, const T* d, int64_t, const PoolWindow& window) {
    const vec t = load(d) / window.size;
    for (int64_t h = window.top; h < window.bottom; h++) {
      for (int64_t w = window.left; w < window.right; w++) {
        T* at = dx + h * pitch + w * LANES;
        store(at, load(at) + t);
      }
    }
  });
}
SPFDE_KERNEL(avg_pool_backward, PoolJob)

// Mean of each plane, to and from a contiguous (N, C).
struct GlobalPoolJob {
  void* blocked;  // planes, or their gradient
  Blocked layout;
  real* means;  // [images, channels], or their gradient
  int64_t accumulate, threads;
};

template <class T>
static void global_pool(const GlobalPoolJob& job) {
  const Blocked& layout = job.layout;
  each_plane(layout, job.threads, [&](int64_t g, int64_t c) {
    vec sum{};
    for (int64_t h = 0; h < layout.height; h++) {
      const T* s = in<T>(job.blocked) + layout.at(g, c, h);
      for (int64_t i = 0; i < layout.span(); i += LANES) sum += load(s + i);
    }
    const int64_t cells = layout.cells();
    sum /= real(layout.height * layout.width * cells);
    for (int64_t lane = 0; lane < layout.used(g); lane += cells) {
      real mean = sum[lane];
      for (int64_t cell = 1; cell < cells; cell++) mean += sum[lane + cell];
      job.means[(g * LANES + lane) / cells * layout.channels + c] = mean;
    }
  });
}
SPFDE_KERNEL(global_pool, GlobalPoolJob)

template <class T>
static void global_pool_backward(const GlobalPoolJob& job) {
  const Blocked& layout = job.layout;
  each_plane(layout, job.threads, [&](int64_t g, int64_t c) {
    vec d{};
    for (int64_t lane = 0; lane < layout.used(g); lane++) {
      d[lane] = job.means[(g * LANES + lane) * layout.channels + c] / real(layout.height * layout.width);
    }
    for (int64_t h = 0; h < layout.height; h++) {
      T* t = out<T>(job.blocked) + layout.at(g, c, h);
      for (int64_t i = 0; i < layout.span(); i += LANES) store(t + i, job.accumulate ? load(t + i) + d : d);
    }
  });
}
SPFDE_KERNEL(global_pool_backward, GlobalPoolJob)
