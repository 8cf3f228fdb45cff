// The forward pass of a convolution with a sparse weight, with what lies before it (a normalisation, addition and activation)
// and, where nothing learns, behind it. Sums for the normalisation that follows are taken on the way.
#pragma once

#include "product.h"

struct ConvJob {
  Source source;
  void* target;
  Blocked to;
  Window window;
  Tile tile;
  Entries entries;
  const real* values;  // [entries]; of pairs two bf16 each
  int64_t step;        // target rows for which the window holds what they read
  const real* scale;   // [rows] or null, with shift, residual and activation: the last thing that happens to a value
  const real* shift;   // [rows] or null
  const void* residual;  // as `to` lies, or null
  int64_t activation;
  real* statistics;  // of what is written, [groups][bands][rows][3][LANES]: a sample, sum and sum of squares around it, or around
                     // zero where they are taken as Lump has them; or null
  int64_t bands, band_rows, threads;
};

// What happens to the sums of a row of the weight, once they are whole. UNROLLED: of a whole tile in registers, all of whose lanes
// are written; activations are then RELU or none.
template <class T, class S, bool UNROLLED>
static SPFDE_INLINE void conv_finish(const ConvJob& job, int64_t g, int64_t row, int64_t p, int64_t q, int64_t bottom, real* stat, bool first,
                               vec* sum) {
  const Blocked& to = job.to;
  const int64_t at = to.at(g, row, p) + q * LANES, down = to.pitch(), high = bottom - p, wide = to.width - q;
  T* const target = out<T>(job.target) + at;
  const auto is_valid = [=](int k) { return UNROLLED || (k / S::columns < high && k % S::columns < wide); };
  const auto place = [=](int k) { return (k / S::columns) * down + (k % S::columns) * LANES; };
  const auto each_valid = [&](const auto& each) SPFDE_HERE {
    each_of<S::n, UNROLLED>([&](auto k) SPFDE_HERE {
      if (is_valid(k)) each(k);
    });
  };
  if (job.scale || job.shift) {
    const vec scale = spread(job.scale ? job.scale[row] : real(1)), shift = spread(job.shift ? job.shift[row] : real(0));
    each_valid([&](auto k) SPFDE_HERE { sum[k] = multiply_add(sum[k], scale, shift); });
  }
  if (job.residual) {
    const T* residual = in<T>(job.residual) + at;
    each_valid([&](auto k) SPFDE_HERE { sum[k] += load(residual + place(k)); });
  }
  if (job.activation) {
    each_valid([&](auto k) SPFDE_HERE { sum[k] = activate(sum[k], UNROLLED ? int64_t(RELU) : job.activation); });
  }
  if constexpr (!UNROLLED) {
    const vec valid = to.valid(g);
    each_valid([&](auto k) SPFDE_HERE { sum[k] = valid != vec{} ? sum[k] : vec{}; });
  }
  if (!stat) return each_valid([&](auto k) SPFDE_HERE { store(target + place(k), sum[k]); });
  stat += row * 3 * LANES;
  // In short chains: one long chain would hold up what comes behind.
  vec total[4] = {first ? vec{} : load(stat + LANES)}, squares[4] = {first ? vec{} : load(stat + 2 * LANES)};
  vec sample{};
  if constexpr (UNROLLED && is_lumped<T, S>) {
    each_of<S::n / 2>([&](auto i) SPFDE_HERE {
      const int k = 2 * i;
      const auto both = Lump<T>::of(sum[k], sum[k + 1]);
      Lump<T>::put(target + place(k), target + place(k + 1), both);
      total[i % 4] = Lump<T>::add(total[i % 4], both, Lump<T>::ones());
      squares[i % 4] = Lump<T>::add(squares[i % 4], both, both);
    });
  } else {
    each_valid([&](auto k) SPFDE_HERE { sum[k] = stored(target + place(k), sum[k]); });
    if (Lump<T>::pixels == 1) sample = first ? sum[0] : load(stat);
    each_valid([&](auto k) SPFDE_HERE {
      const vec away = sum[k] - sample;
      total[k % 4] += away;
      squares[k % 4] += away * away;
    });
  }
  store(stat, sample);
  store(stat + LANES, (total[0] + total[1]) + (total[2] + total[3]));
  store(stat + 2 * LANES, (squares[0] + squares[1]) + (squares[2] + squares[3]));
}

// The items of a chunk that are about one of so many parts of the weight's rows, as a list of one chunk.
struct Part {
  int32_t chunk[2];
  Entries entries;

  Part(const Entries& list, int64_t index, int64_t part, int64_t parts) : entries(list) {
    for (int64_t end = 0; end < 2; end++) {
      const int64_t row = list.rows * (part + end) / parts;  // the items of a chunk are sorted by it
      int32_t at = list.chunk[index], behind = list.chunk[index + 1];
      while (at < behind) {
        const int32_t middle = (at + behind) / 2;
        if (list.item[2 * middle] >> FLAGS < row) at = middle + 1; else behind = middle;
      }
      chunk[end] = at;
    }
    entries.chunk = chunk;
  }
};

// A band of rows of a group, in tiles of size S, for a part of the weight's rows.
template <class T, class S>
static void conv_band(S size, const ConvJob& job, int64_t g, int64_t band, int64_t part, int64_t parts, T* rows, real* tile, real* waiting) {
  const Window& window = job.window;
  const Source& source = job.source;
  const Blocked &from = source.layout, &to = job.to;
  const Entries& list = job.entries;
  const bool is_laid_out = IsPaired<T>::value && list.pairing == LAID_OUT;
  const int64_t s = window.stride, top = band * job.band_rows, bottom = std::min(top + job.band_rows, to.height);
  // Which rows of z are this band's to write.
  const int64_t own = band == 0 ? 0 : top * s, own_end = bottom == to.height ? from.height : bottom * s;
  // In lanes without an image a shift or a residual makes something of nothing.
  const bool is_plain = job.activation <= RELU && !((job.shift || job.residual) && to.is_short(g));
  real* statistics = job.statistics ? job.statistics + (g * job.bands + band) * list.rows * 3 * LANES : nullptr;
  int64_t have = 0;
  for (int64_t p = top; p < bottom; p += job.step) {
    for (; have < window.slots; have++) {
      const int64_t h = p * s - window.above + have;
      T* row = rows + have * window.pitch;
      const bool write = part == 0 && h >= own && h < own_end;
#if SPFDE_DOT
      if (is_laid_out) {
        fill_pairs(source, window, list, g, h, write, reinterpret_cast<real*>(row));
        continue;
      }
#endif
      fill(source, window, g, h, write, row);
    }
    Streams streams;
    const int64_t next = p * s - window.above + window.slots, n_next = job.step * s * from.pitch();
    if (next < from.height) {
      streams.add(in<T>(source.y) + from.at(g, 0, next), n_next);
      if (source.residual) streams.add(in<T>(source.residual) + from.at(g, 0, next), n_next);
      if (source.z) streams.add(in<T>(source.z) + from.at(g, 0, next), n_next);
    }
    streams.add(in<T>(job.target) + to.at(g, 0, p + job.step), job.step * to.pitch());
    if (job.residual) streams.add(in<T>(job.residual) + to.at(g, 0, p + job.step), job.step * to.pitch());
    streams.over(list.chunk[list.chunks] * ((to.width + S::columns - 1) / S::columns) * ((job.step + S::rows - 1) / S::rows));
    for (int64_t i = 0; i < job.step && p + i < bottom; i += S::rows) {
      for (int64_t q = 0; q < to.width; q += S::columns) {
        const bool is_whole = is_plain && bottom - p - i >= S::rows && to.width - q >= S::columns, first = p + i == top && q == 0;
        for (int64_t chunk = 0; chunk < list.chunks; chunk++) {
          const T* corner = rows + i * s * window.pitch + (is_laid_out ? 2 : 1) * q * LANES;
          const Spread x = is_laid_out ? Spread{reinterpret_cast<const real*>(corner), s * window.pitch / 2}
                                       : spread_tile(job.tile, list, chunk, corner, window, s, tile);
          const Part here(list, chunk, part, parts);
          multiply<T>(size, x.at, x.down, here.entries, job.values, 0, waiting, streams, [&](int64_t row, vec* sum) SPFDE_HERE {
            if (is_whole) return conv_finish<T, S, true>(job, g, row, p + i, q, bottom, statistics, first, sum);
            vec copied[S::n];
            each_of<S::n, true>([&](auto k) SPFDE_HERE { copied[k] = sum[k]; });
            conv_finish<T, S, false>(job, g, row, p + i, q, bottom, statistics, first, copied);
          });
        }
      }
    }
    have = slide(rows, window, job.step);
  }
}

template <class T>
static void conv(const ConvJob& job) {
  // Where there are more threads than bands, a band is several of them's, each for some of the weight's rows.
  const int64_t bands = job.to.groups * job.bands, parts = (job.threads + bands - 1) / bands, units = bands * parts;
  const size_t of_window = bytes_of<T>(job.window);
  const size_t of_tile = job.entries.pairing == LAID_OUT ? 0 : size_t(job.tile.span() * most_channels(job.entries)) * sizeof(real);
  const size_t of_sums = size_t(job.entries.rows * job.tile.rows * job.tile.columns * LANES) * sizeof(real);
#pragma omp parallel num_threads(job.threads)
  {
    char* room = workspace(of_window + of_tile + of_sums);
    T* rows = reinterpret_cast<T*>(room);
    real *tile = reinterpret_cast<real*>(room + of_window), *waiting = reinterpret_cast<real*>(room + of_window + of_tile);
    std::memset(room, 0, of_window);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < units; unit++) {
      with_size(job.tile.rows, job.tile.columns, [&](auto size) {
        const int64_t band = unit / parts;
        conv_band<T>(size, job, band / job.bands, band % job.bands, unit % parts, parts, rows, tile, waiting);
      });
    }
  }
}
SPFDE_KERNEL(conv, ConvJob)

// Mean and biased variance of each row from the statistics of its bands, put together in double precision.
struct StatisticsJob {
  const real* statistics;  // as a convolution wrote them
  const void* written;     // what it wrote
  Blocked layout;          // of that
  int64_t bands, band_rows;
  real* mean;      // [rows]
  real* variance;  // [rows]
  int64_t threads;
};

// of(statistics, lanes in use, pixels) for each band of a row.
template <class Of>
static inline void each_band(const StatisticsJob& job, int64_t row, const Of& of) {
  const Blocked& layout = job.layout;
  for (int64_t g = 0; g < layout.groups; g++) {
    const dvec valid = widen(layout.valid(g));
    for (int64_t band = 0; band < job.bands; band++) {
      const int64_t height = std::min(job.band_rows, layout.height - band * job.band_rows);
      const real* stat = job.statistics + ((g * job.bands + band) * layout.channels + row) * 3 * LANES;
      of(stat, valid, double(height) * double(layout.width));
    }
  }
}

// Sums around samples: the mean of all, then how far each part's own mean is from it.
static inline void statistics_around_samples(const StatisticsJob& job, int64_t row, double count, double& mean, double& squares) {
  dvec total{};
  const auto own_mean = [](const real* stat, double n) { return widen(load(stat)) + widen(load(stat + LANES)) / n; };
  each_band(job, row, [&](const real* stat, dvec valid, double n) {
    total += valid != dvec{} ? own_mean(stat, n) * n : dvec{};
  });
  mean = sum_lanes(total) / count;
  total = dvec{};
  each_band(job, row, [&](const real* stat, dvec valid, double n) {
    const dvec sum = widen(load(stat + LANES)), away = own_mean(stat, n) - mean;
    const dvec part = widen(load(stat + 2 * LANES)) - sum * sum / n + away * away * n;
    total += valid != dvec{} ? part : dvec{};
  });
  squares = sum_lanes(total);
}

// Sums around zero. Where they would cancel, the row is read once more.
template <class T>
static inline void statistics_around_zero(const StatisticsJob& job, int64_t row, double count, double& mean, double& squares) {
  const Blocked& layout = job.layout;
  dvec total{}, power{};
  each_band(job, row, [&](const real* stat, dvec, double) {
    total += widen(load(stat + LANES));
    power += widen(load(stat + 2 * LANES));
  });
  mean = sum_lanes(total) / count;
  squares = sum_lanes(power) - mean * mean * count;
  if (squares >= mean * mean * count / 64) return;
  total = power = dvec{};
  for (int64_t g = 0; g < layout.groups; g++) {
    const dvec center = mean * widen(layout.valid(g));
    for (int64_t h = 0; h < layout.height; h++) {
      const T* y = in<T>(job.written) + layout.at(g, row, h);
      for (int64_t i = 0; i < layout.span(); i += LANES) {
        const dvec away = widen(load(y + i)) - center;
        total += away;
        power += away * away;
      }
    }
  }
  const double off = sum_lanes(total) / count;  // of the mean
  mean += off;
  squares = sum_lanes(power) - off * off * count;
}

template <class T>
static void statistics(const StatisticsJob& job) {
  const Blocked& layout = job.layout;
  const double count = double(layout.height) * double(layout.width) * double(layout.batch);
#pragma omp parallel for schedule(static) num_threads(job.threads)
  for (int64_t row = 0; row < layout.channels; row++) {
    double mean = 0, squares = 0;
    if (Lump<T>::pixels == 2) {
      statistics_around_zero<T>(job, row, count, mean, squares);
    } else {
      statistics_around_samples(job, row, count, mean, squares);
    }
    job.mean[row] = real(mean);
    job.variance[row] = real(squares > 0 || squares != squares ? squares / count : 0);
  }
}
SPFDE_KERNEL(statistics, StatisticsJob)
