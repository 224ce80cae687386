// From the source to the z's: what the forward and the gradient of the weights have in common.
#pragma once
#include "structure.cuh"

namespace equiconv {

constexpr int kComponents = 2;  // of an irrep, up to which the responses of all are kept

struct Tile {  // its first pixel
  int batch, z, y, x;
};

EQ_DEVICE Tile tile_of(const Image& im, int index, int planes, int rows) {
  const int x = index % im.tiles_x, y = index / im.tiles_x % im.tiles_y, z = index / (im.tiles_x * im.tiles_y) % im.tiles_z;
  return {index / (im.tiles_x * im.tiles_y * im.tiles_z), z * planes, y * rows, x * 8};
}

// The place in an image, or -1 outside it.
EQ_DEVICE long long pixel_of(int batch, int z, int y, int x, int depth, int height, int width) {
  const bool inside = unsigned(z) < unsigned(depth) && unsigned(y) < unsigned(height) && unsigned(x) < unsigned(width);
  return inside ? (((long long)batch * depth + z) * height + y) * width + x : -1;
}

// COPIES copies of an irrep at the pixels that a tile of PLANES x ROWS x 8 reads, in shared memory: [component, 16 bytes of
// copies, plane, row, phase, column]. Column c of a phase is at stride * c + phase, so 8 pixels read columns side by side.
template <class T, class Number, int PLANES, int ROWS, int COPIES>
struct Staged {
  using S = Structure<T>;
  using Pair = typename Number::Pair;
  static constexpr int planes = T::stride * (PLANES - 1) + T::depth_taps, rows = T::stride * (ROWS - 1) + T::taps;
  static constexpr int width = S::phases * S::columns, line = width * 16, unit = 16 / Number::bytes, units = COPIES / unit;
  static constexpr int sheet = (planes * rows * line + 127) / 128 * 128 + Number::padding, component = units * sheet;
  static constexpr int bytes = S::max_size() * component + 128;  // 16 columns of the last window reach beyond the last line

  template <int M>
  EQ_DEVICE static void stage(const void* x, const Image& im, const Tile& tile, u32 at, int first, int threads) {
    constexpr Irrep in = T::in[M];
#pragma unroll 1
    for (int i = threadIdx.x; i < in.size * planes * rows * width * units; i += threads) {
      const int part = i % units, column = i / units % width, row = i / (units * width) % rows;
      const int plane = i / (units * width * rows) % planes, b = i / (units * width * rows * planes);
      const int copy = first + part * unit;
      if (in.copies % COPIES && copy >= in.copies) continue;  // that sheet stays as it is
      const int y = T::stride * tile.y + row - im.pad_y, x_ = T::stride * tile.x + column - im.pad_x;
      const int z = T::stride * tile.z + plane - im.pad_z;
      const bool between = T::up > 1 && (z % T::up || y % T::up || x_ % T::up);
      const long long pixel = between ? -1 : pixel_of(tile.batch, z / T::up, y / T::up, x_ / T::up, im.depth, im.height, im.width);
      const u32 to = at + b * component + part * sheet + (plane * rows + row) * line;
      const long long from = (pixel < 0 ? 0 : pixel * S::channels_in) + in.channel + b * in.stride + copy;
      copy_async(to + (column % S::phases * S::columns + column / S::phases) * 16,
                 static_cast<const unsigned char*>(x) + from * Number::bytes, pixel >= 0);
    }
    commit_copies();
  }

  // Windows of 8 copies, `step` bytes apart, as the taps of a slab read them: planes +-plane are folded, since a harmonic is
  // even or odd in z.
  template <int SLAB, int N>
  EQ_DEVICE static void load(Pair (&v)[N][S::rows][2], u32 at, int step) {
    constexpr Slab s = T::slabs[SLAB];
    if constexpr (!S::keeps_lines) forget();
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int row = 0; row < S::rows; ++row) {
        const u32 centre = at + n * step + (S::depth_radius * rows + row) * line + s.phase * S::columns * 16;
        Number::load(v[n][row], centre + s.plane * rows * line);
        if constexpr (s.plane > 0) {
          Pair below[2];
          Number::load(below, centre - s.plane * rows * line);
          fold(v[n][row], v[n][row], below, s.odd);
        }
      }
  }

  // The operand of a fragment: its lane's numbers for (harmonic 0, 1; columns 0 .. 7), (0, 1; 8 .. 15).
  template <int FRAGMENT>
  EQ_DEVICE static void toeplitz(Pair (&a)[4], u32 table) {
    constexpr Fragment f = T::fragments[FRAGMENT];
    const u32 at = table + f.place * (Number::operand_bytes / 2);
    if constexpr (f.full) {
      Number::fetch_a(a, at);
    } else {
      Pair half[2];
      Number::fetch(half, at);
      a[0] = half[0], a[1] = {}, a[2] = half[1], a[3] = {};
    }
  }

  // The window of a fragment, tap rows +-row folded, for row y of the two rows of pixels.
  template <int FRAGMENT>
  EQ_DEVICE static void window(Pair (&v)[2], const Pair (&lines)[S::rows][2], int y) {
    constexpr Fragment f = T::fragments[FRAGMENT];
    const Pair(&above)[2] = lines[T::stride * y + S::radius + f.row], (&below)[2] = lines[T::stride * y + S::radius - f.row];
    if constexpr (f.row > 0) fold(v, above, below, f.odd);
    else v[0] = above[0], v[1] = above[1];
  }

  EQ_DEVICE static void fold(Pair (&v)[2], const Pair (&above)[2], const Pair (&below)[2], bool odd) {
#pragma unroll
    for (int i = 0; i < 2; ++i) v[i] = odd ? Number::subtract(above[i], below[i]) : Number::add(above[i], below[i]);
  }
};

// Clebsch-Gordan: z = sum of coefficient * u for a group of harmonics, of which a thread has COUNT numbers each. U holds the
// responses of all components of an irrep or, where it has more than kComponents, of one: sums over them are kept then.
template <class T, int M, int G, class U, int COUNT>
struct Combined {
  static constexpr Range range = Structure<T>::z_of(M, G);
  static constexpr bool one_by_one = T::in[M].size > kComponents;
  U u = {};
  float sums[one_by_one ? range.last - range.first : 1][COUNT] = {};

  template <int COMPONENT, int SLAB>
  EQ_DEVICE void add() {  // what is complete of one component
    static constexpr Range done = T::slabs[SLAB].done;
    if constexpr (done.first < done.last)
      unroll<range.first, range.last>([&](auto z) EQ_INLINE {
        unroll<T::z[decltype(z)::value].first, T::z[decltype(z)::value].last>([&](auto index) EQ_INLINE {
          constexpr Term t = T::terms[decltype(index)::value];
          if constexpr (t.component == COMPONENT && done.first <= t.slot / 2 && t.slot / 2 < done.last)
#pragma unroll
            for (int i = 0; i < COUNT; ++i) sums[z - range.first][i] += t.coefficient * u.number(t.slot, 0, i);
        });
      });
#pragma unroll
    for (int pair = done.first; pair < done.last; ++pair) u.pairs[pair] = {};
  }

  template <int Z>
  EQ_DEVICE float z(int i) const {
    if constexpr (one_by_one) return sums[Z - range.first][i];
    float sum = 0;
    if constexpr (!one_by_one)
      unroll<T::z[Z].first, T::z[Z].last>([&](auto index) EQ_INLINE {
        constexpr Term t = T::terms[decltype(index)::value];
        sum += t.coefficient * u.number(t.slot, t.component, i);
      });
    return sum;
  }
};

template <class T, int M>
constexpr int kept_components = T::in[M].size > kComponents ? 1 : T::in[M].size;

}  // namespace equiconv
