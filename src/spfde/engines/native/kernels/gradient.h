// The backward pass of a convolution: gradient of what it read and of its active weights, in one pass over the image.
//
// From a window of the gradient of y and, for the weights, one of x, both made on the way: the former from the gradient behind
// the normalisation and activation that follow y, the latter from the input of those that lie before x. What is written is the
// gradient of x, with what else comes back to x added. Where a normalisation lies before x, it is taken through the activation
// between them first, so that nobody who reads it asks for the slope again; and its sums are taken.
#pragma once

#include "product.h"

// What comes back to x besides: added where it is not null. The slope is read off z, or is 1. d may be where the sum goes.
struct Added {
  const void* d;
  const void* z;
  int64_t activation;
};

// The sums that a normalisation needs of the gradient d of z = activation(y * scale + shift + residual): of d * slope and of
// d * slope * (y - mean). In double precision, [parts][2][channels]. A convolution that takes them writes d * slope.
struct NormSums {
  double* sums;   // or null: nobody needs them
  const void* y;
  const void* z;  // with a residual: the slope is read off it; or null
  const real* scale;
  const real* shift;
  const real* mean;
  int64_t activation;
};

struct GradientJob {
  Slope gradient;  // of y
  Source source;   // x
  void* target;    // the gradient of x, behind the activation before it where sums are taken; laid out as x; or null
  int64_t accumulate;
  Added added;
  NormSums norm;
  Window window, source_window;  // of the gradient and of x
  Tile tile;
  const Entries* entries;        // of the turned weight, for each residue of rows and columns of x by the stride
  const real* values;            // of all of them, one after another
  Entries weight;                // whose gradients are wanted
  int64_t weight_rows, weight_columns;  // of a tile, in registers; 0: none is wanted
  const int32_t* index;          // [weight.n]: where each one's weight is
  real* weight_gradient;         // added to
  real* partial;                 // [threads][weight.n][4]
  real* summed;                  // [threads][weight.n]
  real* bias;                    // [threads][channels of y]: sums of the gradient of y; or null
  int64_t step, height, bands, band_rows, threads;  // rows are counted in y's, or x's over the stride, whichever are more
};

// What a channel of norm.y is taken around in sums of products: its mean, or zero where two pixels are multiplied at once. Rounding
// of what is stored is far more then than what cancels in float.
template <class T>
static inline real center_of(const NormSums& norm, int64_t c) {
  return norm.mean && Lump<T>::pixels == 1 ? norm.mean[c] : real(0);
}

// What happens to the gradients of channel c of x, in one residue, once they are whole. UNROLLED: of a whole tile in registers;
// activations are then RELU or none.
template <class T, class S, bool UNROLLED, class Valid>
static SPFDE_INLINE void gradient_finish(const GradientJob& job, int64_t g, int64_t c, int64_t h, int64_t w, real* sums, const Valid& is_valid,
                                   vec* sum) {
  const Blocked& to = job.source.layout;
  const int64_t s = job.source_window.stride, at = to.at(g, c, h) + w * LANES, down = s * to.pitch(), across = s * LANES;
  const auto place = [=](int k) { return at + (k / S::columns) * down + (k % S::columns) * across; };
  const auto sloped = [](vec d, vec u, int64_t activation) SPFDE_HERE {
    if constexpr (UNROLLED) return activation == RELU ? (u > vec{} ? d : vec{}) : d;
    return activate_backward(d, u, activation);
  };
  if (job.accumulate) {
    each_of<S::n, UNROLLED>([&](auto k) SPFDE_HERE {
      if (is_valid(k)) sum[k] += load(in<T>(job.target) + place(k));
    });
  }
  const Added& added = job.added;
  if (added.d && added.z) {
    each_of<S::n, UNROLLED>([&](auto k) SPFDE_HERE {
      if (!is_valid(k)) return;
      sum[k] += sloped(load(in<T>(added.d) + place(k)), load(in<T>(added.z) + place(k)), added.activation);
    });
  } else if (added.d) {
    each_of<S::n, UNROLLED>([&](auto k) SPFDE_HERE {
      if (is_valid(k)) sum[k] += load(in<T>(added.d) + place(k));
    });
  }
  T* const target = out<T>(job.target);
  const NormSums& norm = job.norm;
  if (!norm.sums) {
    each_of<S::n, UNROLLED>([&](auto k) SPFDE_HERE {
      if (is_valid(k)) store(target + place(k), sum[k]);
    });
    return;
  }
  sums += c * 2 * LANES;
  const vec scale = spread(norm.scale ? norm.scale[c] : real(1)), shift = spread(norm.shift ? norm.shift[c] : real(0));
  const T* const y = in<T>(norm.y);
  if (norm.z) {
    each_of<S::n, UNROLLED>([&](auto k) SPFDE_HERE {
      if (is_valid(k)) sum[k] = sloped(sum[k], load(in<T>(norm.z) + place(k)), norm.activation);
    });
  } else {
    each_of<S::n, UNROLLED>([&](auto k) SPFDE_HERE {
      if (is_valid(k)) sum[k] = sloped(sum[k], multiply_add(load(y + place(k)), scale, shift), norm.activation);
    });
  }
  vec total[4] = {load(sums)}, dot[4] = {load(sums + LANES)};
  if constexpr (UNROLLED && is_lumped<T, S>) {
    each_of<S::n / 2>([&](auto i) SPFDE_HERE {
      const int k = 2 * i;
      const auto both = Lump<T>::of(sum[k], sum[k + 1]);
      Lump<T>::put(target + place(k), target + place(k + 1), both);
      total[i % 4] = Lump<T>::add(total[i % 4], both, Lump<T>::ones());
      dot[i % 4] = Lump<T>::add(dot[i % 4], both, Lump<T>::take(y + place(k), y + place(k + 1)));
    });
  } else {
    const vec center = spread(center_of<T>(norm, c));
    each_of<S::n, UNROLLED>([&](auto k) SPFDE_HERE {
      if (!is_valid(k)) return;
      sum[k] = stored(target + place(k), sum[k]);
      total[k % 4] += sum[k];
      dot[k % 4] += sum[k] * (load(y + place(k)) - center);
    });
  }
  store(sums, (total[0] + total[1]) + (total[2] + total[3]));
  store(sums + LANES, (dot[0] + dot[1]) + (dot[2] + dot[3]));
}

// Memory of a thread.
template <class T>
struct GradientRoom {
  T *d, *x;
  real *tile, *waiting, *norm, *bias;
  vec4* weight;  // [weight.n]: sums of the gradients
  double* norm_sums;
};

// Gradient of x: one tile, each residue.
template <class T, class S>
static void gradient_tile(S size, const GradientJob& job, int64_t g, int64_t p, int64_t q, const T* rows, const GradientRoom<T>& room,
                          Streams& streams) {
  constexpr int N = S::n;
  const Blocked& to = job.source.layout;
  const int64_t s = job.source_window.stride, residues = s * s, chunks = job.entries->chunks;
  const bool is_plain = job.added.activation <= RELU && job.norm.activation <= RELU;
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    const Spread x = spread_tile(job.tile, job.entries[0], chunk, rows, job.window, 1, room.tile);
    const real* values = job.values;
    for (int64_t residue = 0; residue < residues; residue++) {
      const Entries& list = job.entries[residue];
      const int64_t h = p * s + residue / s, w = q * s + residue % s;
      const int64_t high = (to.height - h + s - 1) / s, wide = (to.width - w + s - 1) / s;
      const bool is_whole = is_plain && high >= S::rows && wide >= S::columns;
      real* waiting = room.waiting + residue * list.rows * N * LANES;
      multiply<T>(size, x.at, x.down, list, values, chunk, waiting, streams, [&](int64_t c, vec* sum) SPFDE_HERE {
        if (is_whole) return gradient_finish<T, S, true>(job, g, c, h, w, room.norm, [](int) { return true; }, sum);
        vec copied[N];
        each_of<N, true>([&](auto k) SPFDE_HERE { copied[k] = sum[k]; });
        const auto is_valid = [=](int k) { return k / S::columns < high && k % S::columns < wide; };
        gradient_finish<T, S, false>(job, g, c, h, w, room.norm, is_valid, copied);
      });
      values += list.n;
    }
  }
}

// Gradient of the weights: the step's rows, chunk by chunk of x's channels.
template <class T, class S>
static void weight_step(S size, const GradientJob& job, const GradientRoom<T>& room, Streams& streams) {
  constexpr int WIDE = S::columns * Lump<T>::pixels;
  const Window &of_d = job.window, &of_x = job.source_window;
  const int64_t x_down = of_x.stride * of_x.pitch, width = job.gradient.layout.width;
  for (int64_t chunk = 0; chunk < job.weight.chunks; chunk++) {
    for (int64_t i = 0; i < job.step; i += S::rows) {
      const T *x = room.x + i * x_down, *d = room.d + (of_d.above + i) * of_d.pitch + of_d.lead * LANES;
      for (int64_t q = 0; q < width; q += WIDE) {
        multiply_weight<T>(size, job.weight, chunk, x + q * LANES, x_down, d + q * LANES, of_d.pitch, of_d.span, room.weight, streams);
      }
    }
  }
}

// A band of rows of a group.
template <class T>
static void gradient_band(const GradientJob& job, int64_t g, int64_t band, const GradientRoom<T>& room) {
  const Window &of_d = job.window, &of_x = job.source_window;
  const Blocked &from = job.gradient.layout, &to = job.source.layout;
  const int64_t s = of_x.stride, top = band * job.band_rows, bottom = std::min(top + job.band_rows, job.height);
  const int64_t width = std::max(from.width, (to.width + s - 1) / s);
  int64_t have = 0, have_x = 0;
  for (int64_t p = top; p < bottom; p += job.step) {
    for (; have < of_d.slots; have++) {
      const int64_t h = p - of_d.above + have;
      fill_gradient(job.gradient, of_d, g, h, room.d + have * of_d.pitch, h >= top && h < bottom ? room.bias : nullptr);
    }
    for (; job.weight_rows && have_x < of_x.slots; have_x++) {
      fill(job.source, of_x, g, p * s - of_x.above + have_x, false, room.x + have_x * of_x.pitch);
    }
    Streams streams;
    const int64_t next = p - of_d.above + of_d.slots, n_next = job.step * from.pitch();
    if (next < from.height) {
      streams.add(in<T>(job.gradient.d) + from.at(g, 0, next), n_next);
      if (job.gradient.y) streams.add(in<T>(job.gradient.y) + from.at(g, 0, next), n_next);
      if (job.gradient.z) streams.add(in<T>(job.gradient.z) + from.at(g, 0, next), n_next);
    }
    const int64_t n_below = job.step * s * to.pitch();
    if (job.weight_rows) streams.add(in<T>(job.source.y) + to.at(g, 0, (p + job.step) * s), n_below);
    if (job.target) {
      const int64_t below = to.at(g, 0, (p + job.step) * s);
      streams.add(in<T>(job.target) + below, n_below);
      if (job.added.d && job.added.d != job.target) streams.add(in<T>(job.added.d) + below, n_below);
      if (job.added.z) streams.add(in<T>(job.added.z) + below, n_below);
      if (job.norm.sums && job.norm.y != job.source.y) streams.add(in<T>(job.norm.y) + below, n_below);
    }
    const int64_t tiles = ((job.step + job.tile.rows - 1) / job.tile.rows) * ((width + job.tile.columns - 1) / job.tile.columns);
    const int64_t of_weight = job.weight_rows ? (job.step / job.weight_rows) * ((width * job.weight.chunks) / job.weight_columns) : 0;
    streams.over((job.target ? tiles * job.entries->chunk[job.entries->chunks] * s * s : 0) + of_weight * from.channels / 2);
    if (job.target) {
      with_size(job.tile.rows, job.tile.columns, [&](auto size) {
        for (int64_t i = 0; i < job.step && p + i < bottom; i += size.rows) {
          for (int64_t q = 0; q < width; q += size.columns) {
            gradient_tile<T>(size, job, g, p + i, q, room.d + i * of_d.pitch + q * LANES, room, streams);
          }
        }
      });
    }
    if (job.weight_rows) {
      with_size(job.weight_rows, job.weight_columns, [&](auto size) { weight_step<T>(size, job, room, streams); });
    }
    have = slide(room.d, of_d, job.step);
    if (job.weight_rows) have_x = slide(room.x, of_x, job.step);
  }
  // Lanes are put together group by group, in double precision.
  const NormSums& norm = job.norm;
  if (!norm.sums) return;
  for (int64_t c = 0; c < to.channels; c++) {
    const double total = double(sum_lanes(load(room.norm + 2 * c * LANES))), dot = double(sum_lanes(load(room.norm + (2 * c + 1) * LANES)));
    const double around = norm.mean ? double(norm.mean[c]) - double(center_of<T>(norm, c)) : 0.0;
    room.norm_sums[c] += total;
    room.norm_sums[to.channels + c] += dot - around * total;
  }
  std::memset(room.norm, 0, sizeof(real) * 2 * to.channels * LANES);
}

template <class T>
static void conv_gradient(const GradientJob& job) {
  const Blocked &from = job.gradient.layout, &to = job.source.layout;
  const int64_t units = from.groups * job.bands, threads = job.threads, n = job.weight.n, s = job.source_window.stride;
  const size_t of_d = bytes_of<T>(job.window), of_x = job.weight_rows ? bytes_of<T>(job.source_window) : 0;
  const size_t of_tile = job.target ? size_t(job.tile.span() * most_channels(*job.entries)) * sizeof(real) : 0;
  const size_t of_sums = job.target ? size_t(s * s * to.channels * job.tile.rows * job.tile.columns * LANES) * sizeof(real) : 0;
  const size_t of_norm = sizeof(real) * 2 * to.channels * LANES, of_bias = sizeof(real) * from.channels * LANES;
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int64_t part = 0; part < threads; part++) {
    char* at = workspace(of_d + of_x + of_tile + of_sums + of_norm + of_bias);
    const auto take = [&](size_t bytes) { return (at += bytes) - bytes; };
    GradientRoom<T> room{};
    std::memset(at, 0, of_d + of_x);
    room.d = reinterpret_cast<T*>(take(of_d)), room.x = reinterpret_cast<T*>(take(of_x));
    room.tile = reinterpret_cast<real*>(take(of_tile)), room.waiting = reinterpret_cast<real*>(take(of_sums));
    room.norm = reinterpret_cast<real*>(take(of_norm)), room.bias = reinterpret_cast<real*>(take(of_bias));
    std::memset(room.norm, 0, of_norm + of_bias);
    if (!job.bias) room.bias = nullptr;
    room.norm_sums = job.norm.sums ? job.norm.sums + part * 2 * to.channels : nullptr;
    if (room.norm_sums) std::memset(room.norm_sums, 0, sizeof(double) * 2 * to.channels);
    room.weight = reinterpret_cast<vec4*>(job.partial) + part * n;
    if (job.weight_rows) std::fill_n(room.weight, n, vec4{});
    const int64_t first = units * part / threads, end = units * (part + 1) / threads;
    for (int64_t unit = first; unit < end; unit++) gradient_band<T>(job, unit / job.bands, unit % job.bands, room);
    // Each thread puts the lanes of its own sums together: what travels between the threads is then a number an entry.
    for (int64_t k = 0; job.weight_rows && k < n; k++) job.summed[part * n + k] = sum_lanes(room.weight[k]);
    for (int64_t c = 0; room.bias && c < from.channels; c++) job.bias[part * from.channels + c] = sum_lanes(load(room.bias + c * LANES));
  }
  if (!job.weight_rows) return;
#pragma omp parallel for schedule(static) num_threads(threads_for(n, threads))
  for (int64_t k = 0; k < n; k++) {
    real sum = 0;
    for (int64_t part = 0; part < threads; part++) sum += job.summed[part * n + k];
    job.weight_gradient[job.index[k]] += sum;
  }
}
SPFDE_KERNEL(conv_gradient, GradientJob)

// target += the sum over threads of rows [threads][n].
struct RowsJob {
  const real* rows;
  real* target;
  int64_t n, threads;
};

SPFDE_EXPORT void spfde_sum_rows(const void* data) {
  const auto* job = static_cast<const RowsJob*>(data);
  for (int64_t c = 0; c < job->n; c++) {
    real sum = job->target[c];
    for (int64_t part = 0; part < job->threads; part++) sum += job->rows[part * job->n + c];
    job->target[c] = sum;
  }
}
