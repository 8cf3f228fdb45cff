// Convolution with a sparse weight: forward, gradient of the input, gradient of the active weights.
//
// The weight is a list of its active entries, row by row, cut into chunks of source channels so that the part of the
// source that a tile reads stays in the first-level cache. `offset` is where an entry reads, in reals from the source
// pixel that belongs to the tile's first pixel: channel, kernel position, padding and dilation are all in that number.
#pragma once

#include "lanes.h"

struct Entries {
  int64_t rows, chunks;
  const int32_t* start;   // [chunks * rows + 1]
  const int32_t* offset;  // [entries]
};

// Target pixel (p * step_y + origin_h, q * step_y + origin_w) sums over the source around (p, q) * step_x, for p < height
// and q < width.
struct ConvJob {
  const real* source;
  real* target;
  Blocked from, to;
  Entries entries;
  const real* values;  // [entries]
  int64_t step_x, step_y, origin_h, origin_w, height, width;
  int64_t accumulate;         // add to the target
  const real* scale;          // [rows] or null, with shift and activation: the last thing that happens to a value
  const real* shift;          // [rows] or null
  const real* residual;       // added before the activation, or null
  Blocked residual_layout;
  int64_t activation;
  real* statistics;           // of what is written, [groups][bands][rows][3][LANES]: a sample, sum and sum of
                              // squares around it; or null
  int64_t bands, band_rows, threads;
};

template <int ROWS, int COLUMNS>
struct Size {
  static constexpr int rows = ROWS, columns = COLUMNS;
};

// Cut the rows from `top` to `bottom` into tiles of at most MOST pixels (8 or 16), each a call of tile(size, p, q).
template <int MOST, class Tile>
static inline void each_tile(int64_t width, int64_t top, int64_t bottom, const Tile& tile) {
  for (int64_t q = 0; q < width; q += 8) {
    const int64_t columns = width - q < 8 ? width - q : 8;
    for (int64_t p = top, high; p < bottom; p += high) {
      const int64_t left = bottom - p;
      high = 1;
      if constexpr (MOST >= 16) {
        if (columns == 8 && left >= 2) {
          tile(Size<2, 8>{}, p, q);
          high = 2;
          continue;
        }
        if (columns == 4 && left >= 4) {
          tile(Size<4, 4>{}, p, q);
          high = 4;
          continue;
        }
      }
      if (columns == 4 && left >= 2) {
        tile(Size<2, 4>{}, p, q);
        high = 2;
        continue;
      }
      if (columns == 2 && left >= 2) {
        high = left >= 4 ? 4 : 2;
        high == 4 ? tile(Size<4, 2>{}, p, q) : tile(Size<2, 2>{}, p, q);
        continue;
      }
      switch (columns) {
        case 8: tile(Size<1, 8>{}, p, q); break;
        case 7: tile(Size<1, 7>{}, p, q); break;
        case 6: tile(Size<1, 6>{}, p, q); break;
        case 5: tile(Size<1, 5>{}, p, q); break;
        case 4: tile(Size<1, 4>{}, p, q); break;
        case 3: tile(Size<1, 3>{}, p, q); break;
        case 2: tile(Size<1, 2>{}, p, q); break;
        default: tile(Size<1, 1>{}, p, q);
      }
    }
  }
}

// How many rows of the weight ahead of their use the target and the residual are asked for.
constexpr int64_t AHEAD = 4;

// One tile of ROWS x COLUMNS pixels, all rows of the weight.
template <int ROWS, int COLUMNS, int STEP_X, int STEP_Y>
static void conv_tile(const ConvJob& job, int64_t g, int64_t p, int64_t q, real* statistics, bool first) {
  constexpr int N = ROWS * COLUMNS;
  const int64_t sx = STEP_X ? STEP_X : job.step_x, sy = STEP_Y ? STEP_Y : job.step_y;
  const int64_t across = sx * LANES, down = sx * job.from.pitch(), y_across = sy * LANES, y_down = sy * job.to.pitch();
  const real* x = job.source + job.from.origin(g, 0) + p * down + q * across;
  real* tile = job.target + job.to.origin(g, 0) + (p * sy + job.origin_h) * job.to.pitch() + (q * sy + job.origin_w) * LANES;
  const int64_t rows = job.entries.rows, chunks = job.entries.chunks, span = job.to.span;
  const bool finish = job.scale || job.shift || job.residual || job.activation;
  const Blocked& other = job.residual_layout;
  const vec valid = job.to.valid(g);
  const bool is_short = job.to.is_short(g);
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    const int32_t* start = job.entries.start + chunk * rows;
    const bool fresh = chunk == 0 && !job.accumulate, last = chunk == chunks - 1;
    for (int64_t row = 0; row < rows; row++) {
      int32_t k = start[row];
      const int32_t end = start[row + 1];
      if (k == end && !fresh && !(last && (finish || statistics))) continue;
      real* y = tile + row * span;
      // Rows and channels are too short for the processor to see them coming.
      if (fresh) {
        SPFDE_UNROLL for (int i = 0; i < N; i++) {
          __builtin_prefetch(y + AHEAD * span + (i / COLUMNS) * y_down + (i % COLUMNS) * y_across, 1);
        }
      }
      if (chunk == 0 && row < job.from.channels) {
        const real* next = x + row * job.from.span + (ROWS + 1) * down;
        SPFDE_UNROLL for (int i = 0; i < COLUMNS; i++) __builtin_prefetch(next + i * across);
      }
      if (last && job.residual) {
        const real* r = job.residual + other.at(g, row + AHEAD, p) + q * LANES;
        SPFDE_UNROLL for (int i = 0; i < N; i++) __builtin_prefetch(r + (i / COLUMNS) * other.pitch() + (i % COLUMNS) * LANES);
      }
      vec sum[N];
      if (fresh) {
        SPFDE_UNROLL for (int i = 0; i < N; i++) sum[i] = vec{};
      } else {
        SPFDE_UNROLL for (int i = 0; i < N; i++) sum[i] = load(y + (i / COLUMNS) * y_down + (i % COLUMNS) * y_across);
      }
      for (; k < end; k++) {
        const real* s = x + job.entries.offset[k];
        const vec w = spread(job.values[k]);
        SPFDE_UNROLL for (int i = 0; i < N; i++) sum[i] += w * load(s + (i / COLUMNS) * down + (i % COLUMNS) * across);
      }
      if (last && finish) {
        const vec scale = spread(job.scale ? job.scale[row] : real(1)), shift = spread(job.shift ? job.shift[row] : real(0));
        SPFDE_UNROLL for (int i = 0; i < N; i++) sum[i] = sum[i] * scale + shift;
        if (job.residual) {
          const real* r = job.residual + other.at(g, row, p) + q * LANES;
          SPFDE_UNROLL for (int i = 0; i < N; i++) sum[i] += load(r + (i / COLUMNS) * other.pitch() + (i % COLUMNS) * LANES);
        }
        SPFDE_UNROLL for (int i = 0; i < N; i++) sum[i] = activate(sum[i], job.activation);
        if (is_short) {
          SPFDE_UNROLL for (int i = 0; i < N; i++) sum[i] = valid != vec{} ? sum[i] : vec{};
        }
      }
      if (last && statistics) {
        real* stat = statistics + row * 3 * LANES;
        const vec sample = first ? sum[0] : load(stat);
        vec total = first ? vec{} : load(stat + LANES), squares = first ? vec{} : load(stat + 2 * LANES);
        SPFDE_UNROLL for (int i = 0; i < N; i++) {
          const vec away = sum[i] - sample;
          total += away;
          squares += away * away;
        }
        store(stat, sample);
        store(stat + LANES, total);
        store(stat + 2 * LANES, squares);
      }
      SPFDE_UNROLL for (int i = 0; i < N; i++) store(y + (i / COLUMNS) * y_down + (i % COLUMNS) * y_across, sum[i]);
    }
  }
}

template <int STEP_X, int STEP_Y>
static void conv_band(const ConvJob& job, int64_t g, int64_t band) {
  const int64_t top = band * job.band_rows, bottom = top + job.band_rows < job.height ? top + job.band_rows : job.height;
  const int64_t rows = job.entries.rows;
  real* stat = job.statistics ? job.statistics + (g * job.bands + band) * rows * 3 * LANES : nullptr;
  bool first = true;
  each_tile<8>(job.width, top, bottom, [&](auto size, int64_t p, int64_t q) {
    conv_tile<size.rows, size.columns, STEP_X, STEP_Y>(job, g, p, q, stat, first);
    first = false;
  });
}

SPFDE_EXPORT void spfde_conv(const void* data) {
  const auto* job = static_cast<const ConvJob*>(data);
  const int64_t units = job->from.groups * job->bands;
#pragma omp parallel for schedule(static) num_threads(job->threads)
  for (int64_t unit = 0; unit < units; unit++) {
    const int64_t g = unit / job->bands, band = unit % job->bands;
    if (job->step_x == 1 && job->step_y == 1) {
      conv_band<1, 1>(*job, g, band);
    } else if (job->step_x == 2 && job->step_y == 1) {
      conv_band<2, 1>(*job, g, band);
    } else if (job->step_x == 1 && job->step_y == 2) {
      conv_band<1, 2>(*job, g, band);
    } else {
      conv_band<0, 0>(*job, g, band);
    }
  }
}

// Mean and biased variance of each row from the statistics of its bands, put together in double precision.
struct StatisticsJob {
  const real* statistics;  // as a convolution wrote them
  Blocked layout;          // of what it wrote
  int64_t bands, band_rows;
  real* mean;      // [rows]
  real* variance;  // [rows]
  int64_t threads;
};

SPFDE_EXPORT void spfde_statistics(const void* data) {
  const auto* job = static_cast<const StatisticsJob*>(data);
  const Blocked* layout = &job->layout;
  const int64_t bands = job->bands, band_rows = job->band_rows;
  const double count = double(layout->height) * double(layout->width) * double(layout->batch);
#pragma omp parallel for schedule(static) num_threads(job->threads)
  for (int64_t row = 0; row < layout->channels; row++) {
    // Two passes over the parts: the mean of all, then how far each part's own mean is from it.
    double average = 0, squares = 0;
    for (int pass = 0; pass < 2; pass++) {
      dvec total{};
      for (int64_t g = 0; g < layout->groups; g++) {
        const dvec valid = widen(layout->valid(g));
        for (int64_t band = 0; band < bands; band++) {
          const int64_t top = band * band_rows;
          const int64_t height = top + band_rows < layout->height ? band_rows : layout->height - top;
          const real* stat = job->statistics + ((g * bands + band) * layout->channels + row) * 3 * LANES;
          const double n = double(height) * double(layout->width), share = 1 / n;
          const dvec sum = widen(load(stat + LANES)), here = widen(load(stat)) + sum * share;
          dvec part;
          if (pass == 0) {
            part = here * n;
          } else {
            const dvec away = here - average;
            part = widen(load(stat + 2 * LANES)) - sum * sum * share + away * away * n;
          }
          total += valid != dvec{} ? part : dvec{};
        }
      }
      (pass == 0 ? average : squares) = sum_lanes(total);
      if (pass == 0) average /= count;
    }
    job->mean[row] = real(average);
    job->variance[row] = real(squares > 0 || squares != squares ? squares / count : 0);
  }
}

// The gradient of each active entry, in the order of the entries. A unit is a band of rows of a group.
struct WeightJob {
  const real* source;    // what the convolution read
  const real* gradient;  // of what it wrote
  Blocked from, to;
  Entries entries;
  int64_t step_x;
  real* out;     // [entries]
  real* partial;  // [threads][entries][LANES]
  int64_t bands, band_rows, threads;
};

// One tile of ROWS x COLUMNS pixels, whose gradients stay in registers while the entries of a row pass by.
template <int ROWS, int COLUMNS, int STEP_X>
static void weight_tile(const WeightJob& job, int64_t chunk, int64_t g, int64_t p, int64_t q, real* sums) {
  constexpr int N = ROWS * COLUMNS;
  const int64_t step = STEP_X ? STEP_X : job.step_x, across = step * LANES, down = step * job.from.pitch();
  const int64_t pitch = job.to.pitch(), span = job.to.span;
  const real* x = job.source + job.from.at(g, 0, p * step) + q * across;
  const real* d = job.gradient + job.to.at(g, 0, p) + q * LANES;
  const int32_t* start = job.entries.start + chunk * job.entries.rows;
  for (int64_t row = 0; row < job.entries.rows; row++, d += span) {
    int32_t k = start[row];
    const int32_t end = start[row + 1];
    if (chunk == 0) {
      SPFDE_UNROLL for (int i = 0; i < N; i++) {
        __builtin_prefetch(d + AHEAD * span + (i / COLUMNS) * pitch + (i % COLUMNS) * LANES);
      }
      if (row < job.from.channels) {
        const real* next = x + row * job.from.span + (ROWS + 1) * down;
        SPFDE_UNROLL for (int i = 0; i < N; i++) __builtin_prefetch(next + (i / COLUMNS) * down + (i % COLUMNS) * across);
      }
    }
    if (k == end) continue;
    vec t[N];
    SPFDE_UNROLL for (int i = 0; i < N; i++) t[i] = load(d + (i / COLUMNS) * pitch + (i % COLUMNS) * LANES);
    for (; k < end; k++) {
      const real* s = x + job.entries.offset[k];
      vec sum = load(sums + k * LANES);
      SPFDE_UNROLL for (int i = 0; i < N; i++) sum += t[i] * load(s + (i / COLUMNS) * down + (i % COLUMNS) * across);
      store(sums + k * LANES, sum);
    }
  }
}

// A unit, chunk by chunk of the source's channels and tile by tile: a tile's part of a chunk stays in the first-level
// cache, and the sums of a chunk in the second.
template <int STEP_X>
static void weight_unit(const WeightJob& job, int64_t g, int64_t band, real* sums) {
  const int64_t top = band * job.band_rows;
  const int64_t bottom = top + job.band_rows < job.to.height ? top + job.band_rows : job.to.height;
  for (int64_t chunk = 0; chunk < job.entries.chunks; chunk++) {
    each_tile<REGISTERS / 2>(job.to.width, top, bottom, [&](auto size, int64_t p, int64_t q) {
      weight_tile<size.rows, size.columns, STEP_X>(job, chunk, g, p, q, sums);
    });
  }
}

SPFDE_EXPORT void spfde_conv_weight(const void* data) {
  const auto* job = static_cast<const WeightJob*>(data);
  const int64_t units = job->to.groups * job->bands, threads = job->threads;
  const int64_t n_entries = job->entries.start[job->entries.chunks * job->entries.rows];
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int64_t part = 0; part < threads; part++) {
    real* sums = job->partial + part * n_entries * LANES;
    std::memset(sums, 0, sizeof(real) * n_entries * LANES);
    for (int64_t unit = units * part / threads; unit < units * (part + 1) / threads; unit++) {
      const int64_t g = unit / job->bands, band = unit % job->bands;
      if (job->step_x == 1) {
        weight_unit<1>(*job, g, band, sums);
      } else if (job->step_x == 2) {
        weight_unit<2>(*job, g, band, sums);
      } else {
        weight_unit<0>(*job, g, band, sums);
      }
    }
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < n_entries; k++) {
    vec sum{};
    for (int64_t part = 0; part < threads; part++) sum += load(job->partial + (part * n_entries + k) * LANES);
    job->out[k] = sum_lanes(sum);
  }
}
