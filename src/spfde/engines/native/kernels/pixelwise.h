// What happens to each pixel of each channel where no convolution does it on its way: normalisation, activation, addition.
#pragma once

#include <algorithm>
#include <vector>

#include "gradient.h"

// A table of norms has five rows: mean, variance, 1 / sqrt(variance + eps), and the scale and shift that these and the
// norm's own weight and bias come to.
struct ConstantsJob {
  real* table;  // the first row, at the norm's first channel
  int64_t row, channels;
  const real* mean;      // what it normalises by, or null: it stands in the table
  const real* variance;  // likewise
  const real* weight;    // or null
  const real* bias;      // or null
  const real* before;    // added to what is normalised, or null
  double eps;
};

SPFDE_EXPORT void spfde_constants(const void* data) {
  const auto* job = static_cast<const ConstantsJob*>(data);
  const int64_t row = job->row;
  for (int64_t c = 0; c < job->channels; c++) {
    real* at = job->table + c;
    if (job->mean) at[0] = job->mean[c];
    if (job->variance) at[row] = job->variance[c];
    const double inverse = 1.0 / std::sqrt(double(at[row]) + job->eps);
    const double scale = job->weight ? inverse * double(job->weight[c]) : inverse;
    at[2 * row] = real(inverse);
    at[3 * row] = real(scale);
    at[4 * row] = real((job->before ? double(job->before[c]) : 0.0) * scale - double(at[0]) * scale +
                       (job->bias ? double(job->bias[c]) : 0.0));
  }
}

// target = what the source comes to; empty lanes stay zero.
struct ApplyJob {
  Source source;
  void* target;
  int64_t threads;
};

template <class T>
static void apply(const ApplyJob& job) {
  const Source& x = job.source;
  const Blocked& layout = x.layout;
  const Window line{1, layout.pitch(), layout.span(), 0, 0, 0, 1};  // a row of the target is a window without zeros
#pragma omp parallel for schedule(static) num_threads(job.threads)
  for (int64_t index = 0; index < layout.groups * layout.height; index++) {
    const int64_t g = index / layout.height, h = index % layout.height;
    fill(x, line, g, h, false, out<T>(job.target) + layout.at(g, 0, h));
  }
}
SPFDE_KERNEL(apply, ApplyJob)

// target = the gradient, or += it.
struct ApplyBackwardJob {
  Slope gradient;
  void* target;
  int64_t accumulate, threads;
};

template <class T>
static void apply_backward(const ApplyBackwardJob& job) {
  const Blocked& layout = job.gradient.layout;
  const Window line{1, layout.pitch(), layout.span(), 0, 0, 0, 1};
#pragma omp parallel for schedule(static) num_threads(job.threads)
  for (int64_t index = 0; index < layout.groups * layout.height; index++) {
    const int64_t g = index / layout.height, h = index % layout.height;
    T* row = out<T>(job.target) + layout.at(g, 0, h);
    if (!job.accumulate) {
      fill_gradient(job.gradient, line, g, h, row, nullptr);
      continue;
    }
    T* made = reinterpret_cast<T*>(workspace(sizeof(T) * size_t(layout.pitch())));
    fill_gradient(job.gradient, line, g, h, made, nullptr);
    for (int64_t i = 0; i < layout.pitch(); i += LANES) store(row + i, load(row + i) + load(made + i));
  }
}
SPFDE_KERNEL(apply_backward, ApplyBackwardJob)

// Two sums of each channel, taken line by line: a line of all channels is one piece of memory. Each part of the lines is
// some thread's, and what a line adds to is vectors of a group, put together in double precision.
struct ChannelSums {
  const int64_t channels, lines, height, parts;
  std::vector<double> totals;  // [parts][2][channels]

  ChannelSums(const Blocked& layout, int64_t threads)
      : channels(layout.channels), lines(layout.groups * layout.height), height(layout.height), parts(threads),
        totals(size_t(2 * threads * layout.channels)) {}

  int64_t start(int64_t part) const { return lines * part / parts; }

  // `each(g, c, h, sum, dot)` adds to the two vectors what line h of channel c brings.
  template <class Each>
  void take(const Each& each) {
#pragma omp parallel for schedule(static, 1) num_threads(parts)
    for (int64_t part = 0; part < parts; part++) {
      double* total = totals.data() + part * 2 * channels;
      std::vector<real> sums(size_t((2 * channels + 1) * LANES));
      real* at = aligned(sums.data());
      for (int64_t line = start(part); line < start(part + 1); line++) {
        const int64_t g = line / height, h = line % height;
        for (int64_t c = 0; c < channels; c++) {
          vec sum = load(at + 2 * c * LANES), dot = load(at + (2 * c + 1) * LANES);
          each(g, c, h, sum, dot);
          store(at + 2 * c * LANES, sum);
          store(at + (2 * c + 1) * LANES, dot);
        }
        if (h < height - 1 && line + 1 < start(part + 1)) continue;
        for (int64_t c = 0; c < channels; c++) {
          total[c] += double(sum_lanes(load(at + 2 * c * LANES)));
          total[channels + c] += double(sum_lanes(load(at + (2 * c + 1) * LANES)));
        }
        std::fill(sums.begin(), sums.end(), real(0));
      }
    }
  }

  double sum(int64_t which, int64_t c) const {
    double found = 0;
    for (int64_t part = 0; part < parts; part++) found += totals[size_t((2 * part + which) * channels + c)];
    return found;
  }
};

// The sums that a normalisation needs of a gradient, where no convolution has taken them.
struct NormSumsJob {
  const void* d;
  Blocked layout;
  NormSums norm;
  int64_t threads;
};

template <class T>
static void norm_sums(const NormSumsJob& job) {
  const Blocked& layout = job.layout;
  const NormSums& norm = job.norm;
  ChannelSums sums(layout, job.threads);
  sums.take([&](int64_t g, int64_t c, int64_t h, vec& sum, vec& dot) {
    const vec scale = spread(norm.scale ? norm.scale[c] : real(1)), shift = spread(norm.shift ? norm.shift[c] : real(0));
    const real mean = norm.mean ? norm.mean[c] : real(0);
    const int64_t at = layout.at(g, c, h);
    for (int64_t i = at; i < at + layout.span(); i += LANES) {
      const vec y = load(in<T>(norm.y) + i);
      const vec u = norm.z ? load(in<T>(norm.z) + i) : multiply_add(y, scale, shift);
      const vec t = activate_backward(load(in<T>(job.d) + i), u, norm.activation);
      sum += t;
      dot += t * (y - mean);
    }
  });
  std::copy(sums.totals.begin(), sums.totals.end(), norm.sums);
}
SPFDE_KERNEL(norm_sums, NormSumsJob)

// From the sums: gradients of the norm's weight and bias, and with `batch` what the gradient of y is made of (Slope).
struct NormGradientJob {
  const double* sums;  // [threads][2][channels]
  const real* table;   // of norms, at the norm's first channel
  int64_t row, channels;
  real* weight;  // added to, or null
  real* bias;    // added to, or null
  real* k2;      // [channels], k3 behind it; or null
  int64_t count, threads;
};

SPFDE_EXPORT void spfde_norm_gradient(const void* data) {
  const auto* job = static_cast<const NormGradientJob*>(data);
  for (int64_t c = 0; c < job->channels; c++) {
    double total = 0, product = 0;
    for (int64_t part = 0; part < job->threads; part++) {
      total += job->sums[2 * part * job->channels + c];
      product += job->sums[(2 * part + 1) * job->channels + c];
    }
    const real* at = job->table + c;
    const double mean = double(at[0]), inverse = double(at[2 * job->row]), scale = double(at[3 * job->row]);
    if (job->bias) job->bias[c] += real(total);
    if (job->weight) job->weight[c] += real(product * inverse);
    if (!job->k2) continue;
    // dy = scale * (d - mean of d - normalised y * mean of (d * normalised y)).
    const double k2 = -scale * inverse * inverse * product / double(job->count);
    job->k2[c] = real(k2);
    job->k2[job->channels + c] = real(-scale * total / double(job->count) - k2 * mean);
  }
}

// Of each channel the sum over images and pixels, or with `around` that of the squared distances from it; divided.
struct ChannelSumJob {
  const void* source;
  Blocked layout;
  const real* around;  // [channels] or null
  real* out;           // [channels]
  int64_t divisor, threads;
};

template <class T>
static void channel_sum(const ChannelSumJob& job) {
  const Blocked& layout = job.layout;
  ChannelSums sums(layout, job.threads);
  sums.take([&](int64_t g, int64_t c, int64_t h, vec& sum, vec&) {
    const vec center = job.around ? job.around[c] * layout.valid(g) : vec{};
    const T* s = in<T>(job.source) + layout.at(g, c, h);
    for (int64_t i = 0; i < layout.span(); i += LANES) {
      const vec v = load(s + i) - center;
      sum += job.around ? v * v : v;
    }
  });
  for (int64_t c = 0; c < layout.channels; c++) job.out[c] = real(sums.sum(0, c) / double(job.divisor));
}
SPFDE_KERNEL(channel_sum, ChannelSumJob)
