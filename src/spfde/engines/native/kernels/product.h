// What multiplies: lists of weights over tiles of pixels.
//
// A tile is some rows and columns of target pixels; their sums stay in registers. What the tile reads of a chunk of source
// channels is spread from the window into a scratch that fits the first-level cache; there all offsets are the same whatever
// the image's size. Then all rows of the weight that have entries in the chunk pass over it. (What is stored as it is
// multiplied, in fp32, is read from the window.)
//
//     window --spread--> scratch --list--> sums --> target
//
// Where the processor multiplies pairs of bf16 (SPFDE_DOT) a vector of the scratch holds, lane by lane, the same pixel of two
// channels, or a pixel and its right neighbour; an entry of the list is two weights then, one of which may be zero. A window that
// nothing else reads may hold such pairs itself; then there is no scratch.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "window.h"

// What is multiplied: a pixel, a pixel of two channels, or two neighbouring pixels; or a pixel of two channels that lie as pairs in
// the window.
enum Pairing : int64_t { SINGLE = 0, CHANNELS = 1, COLUMNS = 2, LAID_OUT = 3 };

constexpr int32_t FIRST = 1, LAST = 2, FLAGS = 2;  // of an item: no chunk before has entries of its row, none after it

// The active entries, in chunks of source channels. A chunk has items: rows of the weight with their entries in it.
struct Entries {
  int64_t rows, chunks, n, pairing;
  const int32_t* chunk;   // [chunks + 1]: where a chunk's items begin
  const int32_t* item;    // [items][2]: row << FLAGS | flags, and where its entries end
  const int32_t* order;   // source channels as the chunks take them
  const int32_t* taken;   // [chunks + 1]: where in that order a chunk begins
  const int32_t* offset;  // [n]: where an entry reads, in numbers from what belongs to the tile's first pixel
};

// Target pixels of a tile, and its scratch: rows, planes of columns by their residue, pixels in one.
struct Tile {
  int64_t rows, columns, high, planes, wide;

  int64_t pitch() const { return planes * wide * LANES; }
  int64_t span() const { return high * pitch(); }
};

// Memory that the next rows need, asked for some lines at a time while multiplying: into the second-level cache, piece after
// piece. Many pieces side by side are slower.
struct Streams {
  struct {
    const char *at, *end;
  } pieces[9];
  int n = 0, now = 0;
  int64_t bytes = 0, lines = 0;

  template <class T>
  void add(const T* p, int64_t numbers) {
    const char* at = reinterpret_cast<const char*>(p);
    pieces[n++] = {at, at + numbers * int64_t(sizeof(T))};
    bytes += numbers * int64_t(sizeof(T));
  }
  void over(int64_t calls) { lines = (bytes / 64 + calls) / (calls + 1); }
  inline void next() {
    if (now == n) return;
    const char* p = pieces[now].at;
    for (int64_t line = 0; line < lines; line++) __builtin_prefetch(p + line * 64, 0, 2);
    pieces[now].at = p + lines * 64;
    now += pieces[now].at >= pieces[now].end;
  }
};

// Whether entries of lists may be pairs.
template <class T>
struct IsPaired {
  static constexpr bool value = false;
};

// Pixels that a register holds where numbers are multiplied as they are stored, and summed over pixels and images: a register of
// bf16 is two pixels, and pairs need no structure. Lanes of the sums are no images then.
template <class T>
struct Lump {
  static constexpr int pixels = 1;
  typedef vec type;
  static inline vec take(const T* p) { return load(p); }
  static inline vec add(vec sum, vec a, vec b) { return sum + a * b; }
};
#if SPFDE_DOT
template <>
struct Lump<bf16> {
  static constexpr int pixels = 2;
  typedef __m512bh type;
  static inline type take(const bf16* p) { return (type)_mm512_loadu_si512(p); }
  static inline type take(const bf16* p, const bf16* q) {
    const __m256i one = _mm256_load_si256(reinterpret_cast<const __m256i*>(p)), two = _mm256_load_si256(reinterpret_cast<const __m256i*>(q));
    return (type)_mm512_inserti64x4(_mm512_castsi256_si512(one), two, 1);
  }
  static inline vec add(vec sum, type a, type b) { return (vec)_mm512_dpbf16_ps((__m512)sum, a, b); }
  static inline type ones() { return (type)_mm512_set1_epi16(0x3f80); }
  static inline type of(vec a, vec b) { return _mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }
  // The first to p and the second to q.
  static inline void put(bf16* p, bf16* q, type both) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256((__m512i)both));
    _mm256_store_si256(reinterpret_cast<__m256i*>(q), _mm512_extracti64x4_epi64((__m512i)both, 1));
  }
};
#endif

#if SPFDE_DOT
static inline vec interleaved(const bf16* a, const bf16* b) {  // a0 b0 a1 b1 ...
  alignas(64) static const uint16_t order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i left = _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(a)));
  const __m512i right = _mm512_castsi256_si512(_mm256_load_si256(reinterpret_cast<const __m256i*>(b)));
  return (vec)_mm512_permutex2var_epi16(left, _mm512_load_si512(order), right);
}
static inline vec interleaved(Lump<bf16>::type both) {  // of its halves
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vec)_mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)both);
}
static inline vec dot(vec sum, vec a, vec b) { return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
template <>
struct IsPaired<bf16> {
  static constexpr bool value = true;
};

// A window of pairs of channels, in the order of the list, each in the place of two channels.
template <class V>
static inline void fill_made_pairs(const Source& x, const Window& window, const int32_t* order, int64_t g, int64_t h, real* row) {
  for (int64_t place = 0; place < x.layout.channels; place += 2, row += window.span) {
    const MadeOf<bf16, V> one(x, g, order[place], h), two(x, g, order[place + 1], h);
    each_column(row, window, x.layout.width, [&](real* t, int64_t w) SPFDE_HERE {
      const auto both = Lump<bf16>::of(one(w), two(w));
      store(t, interleaved(both));
      if constexpr (V::writes) Lump<bf16>::put(one.z + w * LANES, two.z + w * LANES, both);
    });
  }
}

static inline void fill_pairs(const Source& x, const Window& window, const Entries& list, int64_t g, int64_t h, bool write, real* row) {
  const Blocked& layout = x.layout;
  fill_around(layout, window, layout.channels / 2, h, row, [&](int64_t own) {
    if (!x.is_stored()) {
      return with_variant(x, g, write, [&](auto variant) { fill_made_pairs<decltype(variant)>(x, window, list.order, g, own, row); });
    }
    real* to = row;
    for (int64_t place = 0; place < layout.channels; place += 2, to += window.span) {
      const bf16* one = in<bf16>(x.y) + layout.at(g, list.order[place], own);
      const bf16* two = in<bf16>(x.y) + layout.at(g, list.order[place + 1], own);
      each_column(to, window, layout.width, [&](real* t, int64_t w) { store(t, interleaved(one + w * LANES, two + w * LANES)); });
    }
  });
}
#endif

// A chunk of channels of a window into scratch. `from`: what belongs to the tile's first pixel, in its first channel.
template <class T, int64_t WIDE>
static inline void spread_wide(const Tile& tile, const Entries& list, int64_t chunk, const T* from, const Window& window, real* to) {
  const int64_t first = list.taken[chunk], end = list.taken[chunk + 1], wide = WIDE ? WIDE : tile.wide;
  const bool is_two = list.pairing == CHANNELS;
  for (int64_t place = first; place < end; place += is_two ? 2 : 1) {
    const T* one = from + list.order[place] * window.span;
    const T* two = is_two ? from + list.order[place + 1] * window.span : one + LANES;
    for (int64_t r = 0; r < tile.high; r++, one += window.pitch, two += window.pitch) {
      for (int64_t plane = 0; plane < tile.planes; plane++, to += wide * LANES) {
        const T *a = one + plane * window.plane, *b = two + plane * window.plane;
        for (int64_t k = 0; k < wide; k++) {
#if SPFDE_DOT
          if constexpr (IsPaired<T>::value) {
            store(to + k * LANES, interleaved(a + k * LANES, b + k * LANES));
            continue;
          }
#endif
          (void)b;
          store(to + k * LANES, load(a + k * LANES));
        }
      }
    }
  }
}

template <class T>
static inline void spread_by_width(const Tile& tile, const Entries& list, int64_t chunk, const T* from, const Window& window, real* to) {
  switch (tile.wide) {
    case 10: return spread_wide<T, 10>(tile, list, chunk, from, window, to);
    case 8: return spread_wide<T, 8>(tile, list, chunk, from, window, to);
    case 6: return spread_wide<T, 6>(tile, list, chunk, from, window, to);
    default: return spread_wide<T, 0>(tile, list, chunk, from, window, to);
  }
}

// What the entries of a chunk read, for target rows that are `stride` rows of the window apart: the scratch, or the window itself
// where it holds numbers that are multiplied as they are.
struct Spread {
  const real* at;
  int64_t down;  // numbers from a target row to the next
};

template <class T>
static inline Spread spread_tile(const Tile& tile, const Entries& list, int64_t chunk, const T* from, const Window& window,
                                 int64_t stride, real* to) {
  if constexpr (std::is_same_v<T, real>) {
    return {from, stride * window.pitch};
  } else {
    spread_by_width(tile, list, chunk, from, window, to);
    return {to, stride * tile.pitch()};
  }
}

// Vectors of a pixel, or pairs, that the scratch holds at most of a chunk, for each pixel of the tile.
static inline int64_t most_channels(const Entries& list) {
  int64_t most = 0;
  for (int64_t chunk = 0; chunk < list.chunks; chunk++) most = std::max<int64_t>(most, list.taken[chunk + 1] - list.taken[chunk]);
  return most;
}

template <int ROWS_, int COLUMNS_>
struct Size {
  static constexpr int rows = ROWS_, columns = COLUMNS_, n = ROWS_ * COLUMNS_;
};

// call(Size) of the sizes that geometry.py chooses from.
template <class Call>
static inline void with_size(int64_t rows, int64_t columns, const Call& call) {
  if constexpr (REGISTERS >= 32) {
    if (columns == 8 && rows == 2) return call(Size<2, 8>{});
    if (columns == 4 && rows == 4) return call(Size<4, 4>{});
  }
  if (columns == 8) return call(Size<1, 8>{});
  if (columns == 4 && rows == 2) return call(Size<2, 4>{});
  if (columns == 4) return call(Size<1, 4>{});
  if (columns == 2 && rows == 4) return call(Size<4, 2>{});
  if (columns == 2) return call(Size<2, 2>{});
  return call(Size<1, 1>{});
}

template <class Each, int... K>
static SPFDE_INLINE void each_constant(const Each& each, std::integer_sequence<int, K...>) {
  (each(std::integral_constant<int, K>{}), ...);
}

// each(k) for k < N: unrolled where the numbers that it is about are in registers. k is a constant then, so that no compiler
// takes them for an array in memory.
template <int N, bool UNROLLED = true, class Each>
static SPFDE_INLINE void each_of(const Each& each) {
#ifndef SPFDE_ROLLED
  if constexpr (UNROLLED) return each_constant(each, std::make_integer_sequence<int, N>{});
#endif
  for (int k = 0; k < N; k++) each(k);
}

// Where the rows of a tile begin in memory. The compiler would rather find each pixel's own address for each entry.
template <int ROWS_, class T>
struct RowsOf {
  const T* at[ROWS_];

  SPFDE_INLINE RowsOf(const T* first, int64_t down) {
    each_of<ROWS_>([&](auto r) SPFDE_HERE {
      const T* here = first;
      asm("" : "+r"(here));
      at[r] = here;
      first = here + down;
    });
  }
};

// All rows of the weight over one tile and one chunk. finish(row, sum) gets the sums of a row with its last entries; until then
// they wait in `waiting` [rows][tile's pixels][LANES]. x: scratch, or a window; `down`: numbers from a target row to the next in it.
template <class T, class S, class Finish>
static SPFDE_INLINE void multiply(S, const real* x, int64_t down, const Entries& list, const real* values, int64_t chunk, real* waiting,
                            Streams& streams, const Finish& finish) {
  constexpr int N = S::n, COLUMNS_ = S::columns;
  const int32_t* item = list.item + 2 * int64_t(list.chunk[chunk]);
  const int32_t* end_of_items = list.item + 2 * int64_t(list.chunk[chunk + 1]);
  int32_t k = item == list.item ? 0 : item[-1];
  for (; item != end_of_items; item += 2) {
    const int64_t row = item[0] >> FLAGS;
    const int32_t end = item[1];
    real* kept = waiting + row * N * LANES;
    streams.next();
    vec sum[N];
    if (item[0] & FIRST) {
      each_of<N>([&](auto i) SPFDE_HERE { sum[i] = vec{}; });
    } else {
      each_of<N>([&](auto i) SPFDE_HERE { sum[i] = load(kept + i * LANES); });
    }
    for (; k < end; k++) {
      const RowsOf<S::rows, real> s(x + list.offset[k], down);
      const vec w = spread(values[k]);
      each_of<N>([&](auto i) SPFDE_HERE {
        const vec v = load(s.at[i / COLUMNS_] + (i % COLUMNS_) * LANES);
#if SPFDE_DOT
        if constexpr (IsPaired<T>::value) {
          sum[i] = dot(sum[i], w, v);
          return;
        }
#endif
        sum[i] += w * v;
      });
    }
    if (item[0] & LAST) {
      finish(row, sum);
    } else {
      each_of<N>([&](auto i) SPFDE_HERE { store(kept + i * LANES, sum[i]); });
    }
  }
}

// Whether sums over the pixels of a tile of size S are taken two by two.
template <class T, class S>
constexpr bool is_lumped = Lump<T>::pixels == 2 && S::n % 2 == 0;

// The gradients of the weights of a chunk from one tile of S registers: those of a row's pixels stay while its entries pass by.
// Lanes are put together down to four each time, for sums of all of them would not fit a cache.
template <class T, class S>
static SPFDE_INLINE void multiply_weight(S, const Entries& list, int64_t chunk, const T* x, int64_t x_down, const T* d, int64_t d_down,
                                   int64_t d_span, vec4* sums, Streams& streams) {
  constexpr int N = S::n, COLUMNS_ = S::columns, APART = Lump<T>::pixels * LANES;
  const int32_t* item = list.item + 2 * int64_t(list.chunk[chunk]);
  const int32_t* end_of_items = list.item + 2 * int64_t(list.chunk[chunk + 1]);
  int32_t k = item == list.item ? 0 : item[-1];
  for (; item != end_of_items; item += 2) {
    const T* from = d + (item[0] >> FLAGS) * d_span;
    const int32_t end = item[1];
    streams.next();
    typename Lump<T>::type t[N];
    each_of<N>([&](auto i) SPFDE_HERE { t[i] = Lump<T>::take(from + (i / COLUMNS_) * d_down + (i % COLUMNS_) * APART); });
    for (; k < end; k++) {
      const RowsOf<S::rows, T> s(x + list.offset[k], x_down);
      vec part[4] = {};
      each_of<N>([&](auto i) SPFDE_HERE {
        const auto v = Lump<T>::take(s.at[i / COLUMNS_] + (i % COLUMNS_) * APART);
        part[i % 4] = Lump<T>::add(part[i % 4], t[i], v);
      });
      sums[k] += sum_to_four((part[0] + part[1]) + (part[2] + part[3]));
    }
  }
}
