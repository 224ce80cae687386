// The fused convolution: y^ from x^, both channels-last [pixel, irrep, component, copy], in 16-bit numbers.
//
// A warp owns 2 rows of 8 pixels and all output channels. For 8 copies of an input irrep at a time:
//   1. harmonics: u = x^ * H_h, as products of a Toeplitz matrix (8 pixels of 2 harmonics x 16 window columns) with the
//      window (16 columns x 8 copies). Tap rows +y and -y are folded first, since a harmonic is even or odd in y;
//   2. Clebsch-Gordan: z_a = sum of coefficient * u, in registers;
//   3. mixing: the accumulator layout of 1 is the operand layout of a product (16 pixels x 16) * (16 x 8), so z is rounded
//      and multiplied with the weights without leaving the registers. The 16 are 8 copies x 2 z (real type), or 8 copies
//      x 2 components (complex type, weights [[W1, -W2], [W2, W1]]).
#pragma once
#include "structure.cuh"

namespace equiconv {

constexpr int kTilesForHalves = 16;  // a lone z needs half a product, which costs registers: with more tiles, they run out

struct ForwardParams {
  const u16* x;           // [batch, height, width, channels_in]
  const uint4* weights;   // [n_operands, 32 lanes]
  const uint4* toeplitz;  // [n_fragments, 32 lanes]
  u16* y;                 // [batch, out_height, out_width, y_channels]: writes those that the irreps have
  int y_channels;
  Image image;
};

template <class T, class Number, int WARPS>
struct Forward {
  using S = Structure<T>;
  static constexpr int threads = WARPS * 32, tile_rows = 2 * WARPS, staged_rows = tile_rows + 2 * S::radius;
  static constexpr int plane = staged_rows * 16 * 16 + 64;  // bytes: rows x 16 columns x 8 copies; + 64 against bank conflicts
  static constexpr int stage = S::max_size() * 2 * plane;   // 16 copies at a time: whole 32-byte sectors of x
  static constexpr int toeplitz_at = 2 * stage, weights_at = toeplitz_at + S::n_fragments * 512;
  static constexpr int shared_bytes = weights_at + S::n_operands * 512;

  struct Tile {
    const u16* x;
    int y0, x0;
  };

  template <int M>
  EQ_DEVICE static void stage_chunk(const ForwardParams& p, const Tile& tile, u32 at, int chunk) {
    constexpr Irrep in = T::in[M];
#pragma unroll 1
    for (int i = threadIdx.x; i < in.size * staged_rows * S::columns * 2; i += threads) {
      const int half = i % 2, col = i / 2 % S::columns, row = i / (2 * S::columns) % staged_rows, b = i / (2 * S::columns * staged_rows);
      const int channel = in.channel + b * in.stride + chunk * 16 + half * 8;
      if (in.copies % 16 && chunk * 16 + half * 8 >= in.copies) continue;
      const int y = tile.y0 + row - p.image.pad_y, x = tile.x0 + col - p.image.pad_x;
      const bool inside = unsigned(y) < unsigned(p.image.height) && unsigned(x) < unsigned(p.image.width);
      const long long pixel = inside ? (long long)y * p.image.width + x : 0;
      copy_async(at + (b * 2 + half) * plane + (row * 16 + col) * 16, tile.x + pixel * S::channels_in + channel, inside);
    }
    commit_copies();
  }

  template <int SIZE>
  struct Window {
    u32 row[SIZE][S::rows][2];
  };
  template <int SIZE, int PAIRS>
  struct Responses {
    float u[PAIRS][SIZE][2][4];  // [..][pixel row][slot of the pair, copy]
  };

  template <int G, int SIZE>
  EQ_DEVICE static void harmonics(Responses<SIZE, T::groups[G].pairs>& r, const Window<SIZE>& w, const uint4* toeplitz) {
    unroll<T::groups[G].fragments.first, T::groups[G].fragments.last>([&](auto index) EQ_INLINE {
      constexpr Fragment f = T::fragments[decltype(index)::value];
      const uint4 t = toeplitz[index * 32 + threadIdx.x % 32];
      const u32 operand[4] = {t.x, t.y, t.z, t.w};
#pragma unroll
      for (int b = 0; b < SIZE; ++b)
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          const u32(&above)[2] = w.row[b][y + S::radius + f.row], (&below)[2] = w.row[b][y + S::radius - f.row];
          u32 v[2];
#pragma unroll
          for (int i = 0; i < 2; ++i)
            v[i] = f.row == 0 ? above[i] : f.odd ? Number::subtract(above[i], below[i]) : Number::add(above[i], below[i]);
          Number::mma(r.u[f.pair][b][y], operand, v[0], v[1]);
        }
    });
  }

  template <int Z, class R>
  EQ_DEVICE static float combine(const R& r, int y, int copy) {  // one component of one z
    float z = 0;
    unroll<T::z[Z].first, T::z[Z].last>([&](auto index) EQ_INLINE {
      constexpr Term t = T::terms[decltype(index)::value];
      z += t.coefficient * r.u[t.slot / 2][t.component][y][t.slot % 2 * 2 + copy];
    });
    return z;
  }
  template <int Z, int AT, int N, class R>
  EQ_DEVICE static void operand(u32 (&a)[N], const R& r) {
#pragma unroll
    for (int y = 0; y < 2; ++y) a[AT + y] = Number::pack(combine<Z>(r, y, 0), combine<Z>(r, y, 1));
  }

  template <int M, int STEP, class R>
  EQ_DEVICE static void mix(float (&acc)[S::n_tiles][4], const R& r, const uint4* weights) {
    static constexpr Step s = T::steps[STEP];
    static constexpr Irrep out = T::out[s.out];
    constexpr int first = S::operand(M, STEP);
    unroll<0, (out.copies + 15) / 16>([&](auto block) EQ_INLINE {
      constexpr int nb = 2 * decltype(block)::value;
      constexpr bool second = 8 * (nb + 1) < out.copies;
      const uint4 w = weights[(first + block) * 32 + threadIdx.x % 32];
      if constexpr (out.complex) {  // w: W1 and W2 for two blocks of 8 copies
        u32 a[4];
        operand<s.z0, 0>(a, r);
        operand<s.z0 + 1, 2>(a, r);
        Number::mma(acc[S::tile(s.out, 0, nb)], a, w.x, negate(w.y));
        Number::mma(acc[S::tile(s.out, 1, nb)], a, w.y, w.x);
        if constexpr (second) {
          Number::mma(acc[S::tile(s.out, 0, nb + 1)], a, w.z, negate(w.w));
          Number::mma(acc[S::tile(s.out, 1, nb + 1)], a, w.w, w.z);
        }
      } else {  // w: the weights of z0 and z1 for two blocks
        unroll<0, out.size>([&](auto component) EQ_INLINE {
          constexpr int c = decltype(component)::value;
          if constexpr (s.z1 < 0 && S::n_tiles <= kTilesForHalves) {
            u32 a[2];
            operand<s.z0 + c, 0>(a, r);
            Number::mma_half(acc[S::tile(s.out, c, nb)], a, w.x);
            if constexpr (second) Number::mma_half(acc[S::tile(s.out, c, nb + 1)], a, w.z);
          } else {
            u32 a[4] = {};
            operand<s.z0 + c, 0>(a, r);
            if constexpr (s.z1 >= 0) operand<s.z1 + c, 2>(a, r);
            Number::mma(acc[S::tile(s.out, c, nb)], a, w.x, w.y);
            if constexpr (second) Number::mma(acc[S::tile(s.out, c, nb + 1)], a, w.z, w.w);
          }
        });
      }
    });
  }

  // Grid: tiles_x * tiles_y * batch blocks.
  EQ_DEVICE static void run(const ForwardParams& p) {
    const Image& im = p.image;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, batch = blockIdx.x / (im.tiles_x * im.tiles_y);
    const Tile tile{p.x + (long long)batch * im.height * im.width * S::channels_in,
                    int(blockIdx.x / im.tiles_x % im.tiles_y) * tile_rows, int(blockIdx.x % im.tiles_x) * 8};
    uint4* const shared_toeplitz = reinterpret_cast<uint4*>(shared_memory + toeplitz_at);
    uint4* const shared_weights = reinterpret_cast<uint4*>(shared_memory + weights_at);
    for (int i = threadIdx.x; i < S::n_fragments * 32; i += threads) shared_toeplitz[i] = p.toeplitz[i];
    for (int i = threadIdx.x; i < S::n_operands * 32; i += threads) shared_weights[i] = p.weights[i];
    for (int i = threadIdx.x; i < toeplitz_at / 16; i += threads)  // columns past the window must be finite
      reinterpret_cast<uint4*>(shared_memory)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();

    float acc[S::n_tiles][4] = {};
    const u32 base = shared_address(shared_memory);
    int buffer = 0;
    stage_chunk<0>(p, tile, base, 0);
    unroll<0, S::n_in>([&](auto input) EQ_INLINE {
      constexpr int m = decltype(input)::value, size = T::in[m].size, chunks = T::in[m].copies / 8;
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
        if (chunk % 2 == 0) {
          const u32 next = base + (buffer ^ 1) * stage;  // the next 16 copies travel while these are computed
          if (chunk + 2 < chunks) stage_chunk<m>(p, tile, next, chunk / 2 + 1);
          else if constexpr (m + 1 < S::n_in) stage_chunk<m + 1>(p, tile, next, 0);
          if (chunk + 2 < chunks || m + 1 < S::n_in) wait_copies<1>();
          else wait_copies<0>();
          __syncthreads();
        }
        Window<size> window;
        const u32 at = base + buffer * stage + chunk % 2 * plane + (warp * 2 * 16 + lane % 16) * 16;
#pragma unroll
        for (int b = 0; b < size; ++b)
#pragma unroll
          for (int row = 0; row < S::rows; ++row) load_transposed(window.row[b][row], at + b * 2 * plane + row * 256);
        constexpr int first = S::operand_base(m), per_chunk = S::operands(m);
        const uint4* const chunk_weights = shared_weights + (first + chunk * per_chunk) * 32;
        unroll<0, S::n_groups>([&](auto group) EQ_INLINE {
          constexpr int g = decltype(group)::value;
          constexpr Range steps = T::steps_of[m][g];
          if constexpr (steps.first < steps.last) {
            Responses<size, T::groups[g].pairs> r = {};
            harmonics<g>(r, window, shared_toeplitz);
            unroll<T::steps_of[m][g].first, T::steps_of[m][g].last>(
                [&](auto step) EQ_INLINE { mix<m, decltype(step)::value>(acc, r, chunk_weights); });
          }
        });
        if (chunk % 2 == 1 || chunk + 1 == chunks) {
          __syncthreads();
          buffer ^= 1;
        }
      }
    });

    const int px = tile.x0 + lane / 4;
    if (px >= im.out_width) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int py = tile.y0 + warp * 2 + row;
      if (py >= im.out_height) continue;
      u16* const y = p.y + (((long long)batch * im.out_height + py) * im.out_width + px) * p.y_channels + lane % 4 * 2;
      S::each_tile([&](auto i, auto channel) EQ_INLINE {
        *reinterpret_cast<u32*>(y + channel) = Number::pack(acc[i][2 * row], acc[i][2 * row + 1]);
      });
    }
  }
};

}  // namespace equiconv
