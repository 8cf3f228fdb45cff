// A window: some rows of all channels of a group, as they are stored, with zeros around the image. A kernel fills it row by
// row on its way down an image. What a row holds is made while it is filled: a stored value, a value that is a
// normalisation, addition and activation away from stored ones, or a gradient on its way back through these.
//
//     slot 0   0 x x x x x x x x 0 | 0 y y y y y y y y 0 | ...     one row: channel after channel
//     slot 1   0 x x x x x x x x 0 | 0 y y y y y y y y 0 | ...
//
// With a stride s the columns are taken apart by their residue, so that what neighbours of the output read are neighbours.
//
// Where lanes are cells of an image, what lies around a cell is the opposite side of the cell beside it: the same vectors with
// their lanes moved.
#pragma once

#include <algorithm>

#include "storage.h"

struct Window {
  int64_t slots, pitch;  // rows, and numbers from one to the next
  int64_t span, plane;   // numbers from a channel to the next, and from one residue of columns to the next
  int64_t above, lead;   // zero rows and columns before the image
  int64_t stride;        // of rows and columns
};

template <class T>
static inline size_t bytes_of(const Window& window) {
  return (size_t(window.slots * window.pitch) * sizeof(T) + 63) / 64 * 64;
}

template <class T>
static inline void clear(T* row, int64_t n) {
  std::memset(static_cast<void*>(row), 0, size_t(n) * sizeof(T));
}

// The last rows become the first ones, as many as are wanted again `step` target rows further down; how many these are.
template <class T>
static inline int64_t slide(T* rows, const Window& window, int64_t step) {
  const int64_t by = step * window.stride, keep = window.slots > by ? window.slots - by : 0;
  std::memmove(static_cast<void*>(rows), rows + by * window.pitch, size_t(keep * window.pitch) * sizeof(T));
  return keep;
}

// Where pixel w of a channel's row belongs.
template <class T>
static inline T* column(T* row, const Window& window, int64_t w) {
  const int64_t u = w + window.lead;
  return row + u % window.stride * window.plane + u / window.stride * LANES;
}

// each(t, w): pixel w of a channel's row belongs at t.
template <class T, class Each>
static inline void each_column(T* row, const Window& window, int64_t width, const Each& each) {
  const int64_t s = window.stride;
  if (s == 1) {
    T* t = row + window.lead * LANES;
    for (int64_t w = 0; w < width; w++) each(t + w * LANES, w);
    return;
  }
  for (int64_t first = 0; first < std::min(s, width); first++) {  // of those that are neighbours in the window
    T* t = column(row, window, first);
    for (int64_t w = first; w < width; w += s, t += LANES) each(t, w);
  }
}

// A value: stored, or activation(y * scale + shift + residual), which is written to z on the way where z is not null.
struct Source {
  const void* y;
  Blocked layout;  // of all of them
  const real* scale;  // [channels] or null
  const real* shift;  // [channels] or null
  const void* residual;
  void* z;
  int64_t activation;

  bool is_stored() const { return !scale && !shift && !residual && !activation; }
};

// Which variant of the loop over pixels makes values: nothing is asked in it that is the same for all of them.
template <int64_t ACTIVATION_, bool ADDS_, bool WRITES_, bool IS_SHORT_>
struct Variant {
  static constexpr int64_t activation = ACTIVATION_;  // -1: as it stands in the source
  static constexpr bool adds = ADDS_, writes = WRITES_, is_short = IS_SHORT_;
};

// call(Variant) for a row of group g.
template <class Call>
static inline void with_variant(const Source& x, int64_t g, bool write, const Call& call) {
  const auto by = [&](auto activation) {
    with_flag(x.residual, [&](auto adds) {
      with_flag(x.z && write, [&](auto writes) {
        with_flag(x.layout.is_short(g), [&](auto is_short) { call(Variant<activation(), adds(), writes(), is_short()>{}); });
      });
    });
  };
  switch (x.activation) {
    case NONE: return by(std::integral_constant<int64_t, NONE>{});
    case RELU: return by(std::integral_constant<int64_t, RELU>{});
    default: return by(std::integral_constant<int64_t, -1>{});
  }
}

// What row h of a channel is made of.
template <class T, class V>
struct MadeOf {
  const T *y, *residual;
  T* z;
  vec scale, shift, valid;
  int64_t activation;

  MadeOf(const Source& x, int64_t g, int64_t c, int64_t h)
      : y(in<T>(x.y) + x.layout.at(g, c, h)), residual(V::adds ? in<T>(x.residual) + x.layout.at(g, c, h) : nullptr),
        z(V::writes ? out<T>(x.z) + x.layout.at(g, c, h) : nullptr), scale(spread(x.scale ? x.scale[c] : real(1))),
        shift(spread(x.shift ? x.shift[c] : real(0))), valid(x.layout.valid(g)),
        activation(V::activation < 0 ? x.activation : V::activation) {}

  // Pixel w of it.
  SPFDE_INLINE vec operator()(int64_t w) const {
    vec v = multiply_add(load(y + w * LANES), scale, shift);
    if constexpr (V::adds) v += load(residual + w * LANES);
    v = activate(v, V::activation < 0 ? activation : V::activation);
    if constexpr (V::is_short) v = valid != vec{} ? v : vec{};
    return v;
  }
};

template <class T, class V>
static inline void fill_made(const Source& x, const Window& window, int64_t g, int64_t h, T* row) {
  for (int64_t c = 0; c < x.layout.channels; c++, row += window.span) {
    const MadeOf<T, V> of(x, g, c, h);
    each_column(row, window, x.layout.width, [&](T* t, int64_t w) SPFDE_HERE {
      const vec v = of(w);
      store(t, v);
      if constexpr (V::writes) store(of.z + w * LANES, v);
    });
  }
}

// Row h of all channels of each image or cell. With `write` it also goes to z.
template <class T>
static inline void fill_own(const Source& x, const Window& window, int64_t g, int64_t h, bool write, T* row) {
  const Blocked& layout = x.layout;
  if (!x.is_stored()) return with_variant(x, g, write, [&](auto variant) { fill_made<T, decltype(variant)>(x, window, g, h, row); });
  const T* s = in<T>(x.y) + layout.at(g, 0, h);
  for (int64_t c = 0; c < layout.channels; c++, row += window.span, s += layout.span()) {
    each_column(row, window, layout.width, [&](T* t, int64_t w) { std::memcpy(t, s + w * LANES, sizeof(T) * LANES); });
  }
}

// What the cells see of the one that is so many further down and right of them; zeros outside of the image.
struct Neighbour {
  ints from;
  ints is_inside;

  Neighbour(const Blocked& layout, int64_t down, int64_t right) {
    for (int64_t lane = 0; lane < LANES; lane++) {
      const int64_t i = lane % layout.cells() / layout.right + down, j = lane % layout.right + right;
      const bool inside = i >= 0 && i < layout.down && j >= 0 && j < layout.right;
      is_inside[lane] = inside ? -1 : 0;
      from[lane] = inside ? lane + down * layout.right + right : lane;
    }
  }
  vec operator()(vec v) const { return is_inside ? permuted(v, from) : vec{}; }
};

// Cells: a row that is there as it lies in each of them becomes one of the cells `down` further down, and gets the columns before
// and behind it from the cells beside them.
template <class T>
static inline void join(const Blocked& layout, const Window& window, int64_t channels, int64_t down, T* row) {
  const Neighbour above(layout, down, 0), before(layout, 0, -1), behind(layout, 0, 1);
  const int64_t left = layout.right > 1 ? window.lead : 0, columns = window.span / LANES - window.lead - layout.width;
  const int64_t right = layout.right > 1 && columns > 0 ? std::min(columns, layout.width) : 0;
  for (int64_t c = 0; c < channels; c++, row += window.span) {
    if (down) each_column(row, window, layout.width, [&](T* t, int64_t) { store(t, above(load(t))); });
    for (int64_t w = 0; w < left; w++) store(column(row, window, w - left), before(load(column(row, window, layout.width + w - left))));
    for (int64_t w = 0; w < right; w++) store(column(row, window, layout.width + w), behind(load(column(row, window, w))));
  }
}

// Row h of so many channels, or pairs of them, with what lies beside it; zeros outside of the image. own(h) fills in row h of
// each image or cell.
template <class T, class Own>
static inline void fill_around(const Blocked& layout, const Window& window, int64_t channels, int64_t h, T* row, const Own& own) {
  const int64_t down = h < 0 ? -1 : h >= layout.height ? 1 : 0, inside = h - down * layout.height;
  if ((down && layout.down == 1) || inside < 0 || inside >= layout.height) return clear(row, channels * window.span);
  own(inside);
  if (layout.cells() > 1) join(layout, window, channels, down, row);
}

// Row h of all channels. With `write` it also goes to z.
template <class T>
static inline void fill(const Source& x, const Window& window, int64_t g, int64_t h, bool write, T* row) {
  fill_around(x.layout, window, x.layout.channels, h, row, [&](int64_t own) { fill_own(x, window, g, own, write, row); });
}

// The gradient of y where z = activation(y * scale + shift + residual) has the gradient d. Scale and shift may come from the
// batch: then y's mean and variance have gradients too, which k2 and k3 are of. d * slope * k1 + y * k2 + k3, where the slope
// is read off z with a residual, off y without one; with neither it is 1.
struct Slope {
  const void* d;
  Blocked layout;  // of all of them
  const void* y;   // or null
  const void* z;   // or null
  const real* scale;
  const real* shift;
  const real* k1;  // each [channels] or null
  const real* k2;
  const real* k3;
  int64_t activation;
};

// How the loop over pixels is written: nothing is asked there that is the same for all of them. PLAIN: all lanes are in use, and
// no sums are wanted.
template <class T, int64_t ACTIVATION, bool FROM_Z, bool CENTRED, bool PLAIN>
static inline void fill_gradient_with(const Slope& s, const Window& window, int64_t g, int64_t h, T* row, real* sums) {
  const Blocked& layout = s.layout;
  const vec valid = layout.valid(g);
  const bool is_short = layout.is_short(g);
  const int64_t activation = ACTIVATION < 0 ? s.activation : ACTIVATION;
  for (int64_t c = 0; c < layout.channels; c++, row += window.span) {
    const int64_t at = layout.at(g, c, h);
    const T *d = in<T>(s.d) + at, *y = in<T>(s.y) + (s.y ? at : 0), *z = in<T>(s.z) + (FROM_Z ? at : 0);
    const vec scale = spread(s.scale ? s.scale[c] : real(1)), shift = spread(s.shift ? s.shift[c] : real(0));
    const vec k1 = spread(s.k1 ? s.k1[c] : real(1)), k2 = spread(CENTRED ? s.k2[c] : real(0));
    const vec k3 = spread(CENTRED && s.k3 ? s.k3[c] : real(0));
    vec sum{};
    each_column(row, window, layout.width, [&](T* t, int64_t w) SPFDE_HERE {
      vec v = load(d + w * LANES);
      if (activation != NONE) {
        v = activate_backward(v, FROM_Z ? load(z + w * LANES) : multiply_add(load(y + w * LANES), scale, shift), activation);
      }
      v = v * k1;
      if (CENTRED) v += load(y + w * LANES) * k2 + k3;
      if (!PLAIN) {
        if (is_short) v = valid != vec{} ? v : vec{};
        sum += v;
      }
      store(t, v);
    });
    if (!PLAIN && sums) store(sums + c * LANES, load(sums + c * LANES) + sum);
  }
}

template <class T, int64_t ACTIVATION>
static inline void fill_gradient_by(const Slope& s, const Window& window, int64_t g, int64_t h, T* row, real* sums) {
  const bool is_plain = !sums && !s.layout.is_short(g);
  with_flag(ACTIVATION != NONE && s.z, [&](auto from_z) {
    with_flag(s.k2, [&](auto centred) {
      with_flag(is_plain, [&](auto plain) {
        fill_gradient_with<T, ACTIVATION, from_z(), centred(), plain()>(s, window, g, h, row, sums);
      });
    });
  });
}

// Row h of the gradient; zeros outside of the image. `sums` [channels][LANES] takes what each channel comes to, or is null.
template <class T>
static inline void fill_gradient(const Slope& s, const Window& window, int64_t g, int64_t h, T* row, real* sums) {
  if (h < 0 || h >= s.layout.height) return clear(row, window.pitch);
  switch (s.activation) {
    case NONE: return fill_gradient_by<T, NONE>(s, window, g, h, row, sums);
    case RELU: return fill_gradient_by<T, RELU>(s, window, g, h, row, sums);
    default: return fill_gradient_by<T, -1>(s, window, g, h, row, sums);
  }
}
