// What happens to each pixel of each channel: normalisation, activation, addition.
#pragma once

#include <algorithm>
#include <vector>

#include "lanes.h"

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

// target = activation(source * scale + shift + residual); halos and empty lanes stay zero.
struct ApplyJob {
  const real* source;
  real* target;
  Blocked from, to;
  const real* scale;  // [channels] or null
  const real* shift;  // [channels] or null
  const real* residual;
  Blocked residual_layout;
  int64_t activation, threads;
};

SPFDE_EXPORT void spfde_apply(const void* data) {
  const auto* job = static_cast<const ApplyJob*>(data);
  const Blocked from = job->from, to = job->to, other = job->residual_layout;
  const int64_t lines = from.groups * from.height, act = job->activation;
#pragma omp parallel for schedule(static) num_threads(job->threads)
  for (int64_t line = 0; line < lines; line++) {
    const int64_t g = line / from.height, h = line % from.height;
    const vec valid = from.valid(g);
    const bool is_short = from.is_short(g);
    for (int64_t c = 0; c < from.channels; c++) {
      const vec scale = spread(job->scale ? job->scale[c] : real(1)), shift = spread(job->shift ? job->shift[c] : real(0));
      const real* y = job->source + from.at(g, c, h);
      const real* r = job->residual ? job->residual + other.at(g, c, h) : nullptr;
      real* z = job->target + to.at(g, c, h);
      for (int64_t i = 0; i < from.width * LANES; i += LANES) {
        vec u = load(y + i) * scale + shift;
        if (r) u += load(r + i);
        u = activate(u, act);
        if (is_short) u = valid != vec{} ? u : vec{};
        store(z + i, u);
      }
    }
  }
}

// The way back through z = activation(y * scale + shift + residual), where scale and shift come from the batch (`batch`)
// or are constants. d = gradient * slope. With `keep` d is written back to `gradient`: it is what the residual gets.
struct ApplyBackwardJob {
  real* gradient;  // of z
  const real* y;
  const real* z;   // with a residual: the slope is read off the output (ReLU and ReLU6 only); else null
  real* out;       // gradient of y, or null; may be `gradient` itself unless `keep`
  Blocked gradient_layout, y_layout, z_layout, out_layout;
  const real* scale;
  const real* shift;
  const real* mean;     // [channels], with `batch`
  const real* inverse;  // [channels], 1 / sqrt(variance + eps)
  real* scale_gradient;  // [channels]: sum of d * (y - mean) * inverse; or null
  real* shift_gradient;  // [channels]: sum of d; or null
  int64_t activation, batch, keep, threads;
};

static inline vec slope_gradient(const ApplyBackwardJob& job, vec d, const real* y, const real* z, vec scale, vec shift) {
  if (job.activation == NONE) return d;
  const vec u = z ? load(z) : load(y) * scale + shift;
  return activate_backward(d, u, job.activation);
}

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

SPFDE_EXPORT void spfde_apply_backward(const void* data) {
  const auto* job = static_cast<const ApplyBackwardJob*>(data);
  const Blocked dl = job->gradient_layout, yl = job->y_layout, zl = job->z_layout, ol = job->out_layout;
  const int64_t channels = yl.channels, width = yl.width * LANES;
  const double count = double(yl.batch) * double(yl.height) * double(yl.width);
  ChannelSums sums(yl, job->threads);
  if (job->scale_gradient || job->shift_gradient || job->batch || job->keep) {
    sums.take([&](int64_t g, int64_t c, int64_t h, vec& sum, vec& dot) {
      const vec scale = spread(job->scale ? job->scale[c] : real(1)), shift = spread(job->shift ? job->shift[c] : real(0));
      const real mean = job->mean ? job->mean[c] : real(0);
      real* d = job->gradient + dl.at(g, c, h);
      const real* y = job->y + yl.at(g, c, h);
      const real* z = job->z ? job->z + zl.at(g, c, h) : nullptr;
      for (int64_t i = 0; i < width; i += LANES) {
        const vec t = slope_gradient(*job, load(d + i), y + i, z ? z + i : nullptr, scale, shift);
        if (job->keep) store(d + i, t);
        sum += t;
        dot += t * (load(y + i) - mean);
      }
    });
  }
  // dy = scale * (d - mean of d - normalised y * mean of (d * normalised y)), as k1 * d + k2 * (y - mean) + k3.
  std::vector<real> constants(size_t(2 * channels));
  for (int64_t c = 0; c < channels; c++) {
    const double total = sums.sum(0, c), product = sums.sum(1, c), inverse = job->inverse ? double(job->inverse[c]) : 1.0;
    if (job->shift_gradient) job->shift_gradient[c] = real(total);
    if (job->scale_gradient) job->scale_gradient[c] = real(product * inverse);
    const double a = job->scale ? double(job->scale[c]) : 1.0;
    constants[size_t(2 * c)] = real(-a * inverse * inverse * product / count);
    constants[size_t(2 * c + 1)] = real(-a * total / count);
  }
  if (!job->out) return;
#pragma omp parallel for schedule(static, 1) num_threads(sums.parts)
  for (int64_t part = 0; part < sums.parts; part++) {
    // From the last line to the first: the last ones are still in the cache.
    for (int64_t line = sums.start(part + 1) - 1; line >= sums.start(part); line--) {
      const int64_t g = line / yl.height, h = line % yl.height;
      const vec valid = yl.valid(g);
      const bool is_short = yl.is_short(g);
      for (int64_t c = 0; c < channels; c++) {
        const vec k1 = spread(job->scale ? job->scale[c] : real(1)), shift = spread(job->shift ? job->shift[c] : real(0));
        const vec k2 = spread(constants[size_t(2 * c)]), k3 = spread(constants[size_t(2 * c + 1)]);
        const real mean = job->mean ? job->mean[c] : real(0);
        const real* d = job->gradient + dl.at(g, c, h);
        const real* y = job->y + yl.at(g, c, h);
        const real* z = job->z ? job->z + zl.at(g, c, h) : nullptr;
        real* out = job->out + ol.at(g, c, h);
        for (int64_t i = 0; i < width; i += LANES) {
          vec t = load(d + i);
          if (!job->keep) t = slope_gradient(*job, t, y + i, z ? z + i : nullptr, k1, shift);
          t = k1 * t;
          if (job->batch) t += k2 * (load(y + i) - mean) + k3;
          if (is_short) t = valid != vec{} ? t : vec{};
          store(out + i, t);
        }
      }
    }
  }
}

// target += source, or = source.
struct AddJob {
  const real* source;
  real* target;
  Blocked from, to;
  int64_t accumulate, threads;
};

SPFDE_EXPORT void spfde_add(const void* data) {
  const auto* job = static_cast<const AddJob*>(data);
  const Blocked from = job->from, to = job->to;
  const int64_t lines = from.groups * from.height;
#pragma omp parallel for schedule(static) num_threads(job->threads)
  for (int64_t line = 0; line < lines; line++) {
    const int64_t g = line / from.height, h = line % from.height;
    for (int64_t c = 0; c < from.channels; c++) {
      const real* s = job->source + from.at(g, c, h);
      real* t = job->target + to.at(g, c, h);
      for (int64_t i = 0; i < from.width * LANES; i += LANES) {
        store(t + i, job->accumulate ? load(t + i) + load(s + i) : load(s + i));
      }
    }
  }
}

// Of each channel the sum over images and pixels, or with `around` that of the squared distances from it; divided.
struct ChannelSumJob {
  const real* source;
  Blocked layout;
  const real* around;  // [channels] or null
  real* out;           // [channels]
  int64_t divisor, threads;
};

SPFDE_EXPORT void spfde_channel_sum(const void* data) {
  const auto* job = static_cast<const ChannelSumJob*>(data);
  const Blocked layout = job->layout;
  ChannelSums sums(layout, job->threads);
  sums.take([&](int64_t g, int64_t c, int64_t h, vec& sum, vec&) {
    const vec center = job->around ? job->around[c] * layout.valid(g) : vec{};
    const real* s = job->source + layout.at(g, c, h);
    for (int64_t i = 0; i < layout.width * LANES; i += LANES) {
      const vec v = load(s + i) - center;
      sum += job->around ? v * v : v;
    }
  });
  for (int64_t c = 0; c < layout.channels; c++) job->out[c] = real(sums.sum(0, c) / double(job->divisor));
}
