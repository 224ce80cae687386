// The fused convolution: y^ from x^, both channels-last [pixel, irrep, component, copy].
//
// A warp owns 2 rows of 8 pixels and all output channels. For 8 copies of an input irrep at a time:
//   1. harmonics: u = x^ * H_h, as products of a Toeplitz matrix (8 pixels of 2 harmonics x 16 window columns) with the
//      window (16 columns x 8 copies). Taps at +-z and at +-y are folded first, since a harmonic is even or odd there;
//   2. Clebsch-Gordan: z_a = sum of coefficient * u, in registers;
//   3. mixing: the accumulator layout of 1 is the operand layout of a product (16 pixels x 16) * (16 x 8), so z is rounded
//      and multiplied with the weights without leaving the registers. The 16 are 8 copies x 2 z (real type), or 8 copies
//      x 2 components (complex type, weights [[W1, -W2], [W2, W1]]).
#pragma once
#include "source.cuh"
#include "store.cuh"

namespace equiconv {

constexpr int kTilesForHalves = 16;  // a lone z needs half a product, which costs registers: with more tiles, they run out

struct ForwardParams {
  const void* x;         // [batch, depth, height, width, channels_in]
  const uint4* weights;  // [n_operands] operands
  const uint4* toeplitz;
  Output output;         // [batch, out_depth, out_height, out_width, channels]
  Image image;
};

// WARP_PLANES x WARP_ROWS warps; COPIES, 8 or 16, are staged at a time, with their weights, in one or two BUFFERS. Store:
// Irreps or InFields.
template <class T, class Number, int WARP_PLANES, int WARP_ROWS, int COPIES, int BUFFERS, class Store>
struct Forward {
  using S = Structure<T>;
  using Input = Staged<T, Number, WARP_PLANES, 2 * WARP_ROWS, COPIES>;
  using Pair = typename Number::Pair;
  static constexpr int threads = WARP_PLANES * WARP_ROWS * 32, tile_planes = WARP_PLANES, tile_rows = 2 * WARP_ROWS;
  static constexpr int chunks_staged = COPIES / 8, weights_at = Input::bytes;
  static constexpr int stage = weights_at + chunks_staged * S::max_operands() * Number::operand_bytes;
  static constexpr int toeplitz_at = BUFFERS * stage;
  static constexpr int shared_bytes = toeplitz_at + S::harmonics_of_fragments() * Number::operand_bytes / 2;

  template <int N>
  struct Lines {
    Pair of[N][S::rows][2];
  };
  template <int N>
  struct OfPair {
    float u[N][2][4];  // [component, pixel row; slot of the pair, copy]
  };
  template <int PAIRS, int N>
  struct Responses {
    OfPair<N> pairs[PAIRS];
    EQ_DEVICE float number(int slot, int b, int i) const { return pairs[slot / 2].u[b][i / 2][slot % 2 * 2 + i % 2]; }
  };

  template <int SLAB, int PAIRS, int N>
  EQ_DEVICE static void respond(Responses<PAIRS, N>& r, const Lines<N>& lines, u32 toeplitz) {
    unroll<T::slabs[SLAB].fragments.first, T::slabs[SLAB].fragments.last>([&](auto index) EQ_INLINE {
      constexpr Fragment f = T::fragments[decltype(index)::value];
      Pair operand[4];
      Input::template toeplitz<decltype(index)::value>(operand, toeplitz);
#pragma unroll
      for (int b = 0; b < N; ++b)
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          Pair v[2];
          Input::template window<decltype(index)::value>(v, lines.of[b], y);
          Number::mma(r.pairs[f.pair].u[b][y], operand, v[0], v[1]);
        }
    });
  }

  template <int Z, int AT, int N, class C>
  EQ_DEVICE static void operand(Pair (&a)[N], const C& c) {  // one component of one z
#pragma unroll
    for (int y = 0; y < 2; ++y) a[AT + y] = Number::pack(c.template z<Z>(2 * y), c.template z<Z>(2 * y + 1));
  }

  template <int M, int STEP, class C>
  EQ_DEVICE static void mix(float (&acc)[S::n_tiles][4], const C& combined, u32 weights) {
    static constexpr Step s = T::steps[STEP];
    static constexpr Irrep out = T::out[s.out];
    constexpr int first = S::operand(M, STEP);
    unroll<0, (out.copies + 15) / 16>([&](auto block) EQ_INLINE {
      constexpr int nb = 2 * decltype(block)::value;
      constexpr bool second = 8 * (nb + 1) < out.copies;
      Pair w[4];
      Number::fetch(w, weights + (first + block) * Number::operand_bytes);
      if constexpr (out.complex) {  // w: W1 and W2 for two blocks of 8 copies
        Pair a[4];
        operand<s.z0, 0>(a, combined);
        operand<s.z0 + 1, 2>(a, combined);
        Number::mma(acc[S::tile(s.out, 0, nb)], a, w[0], Number::negate(w[1]));
        Number::mma(acc[S::tile(s.out, 1, nb)], a, w[1], w[0]);
        if constexpr (second) {
          Number::mma(acc[S::tile(s.out, 0, nb + 1)], a, w[2], Number::negate(w[3]));
          Number::mma(acc[S::tile(s.out, 1, nb + 1)], a, w[3], w[2]);
        }
      } else {  // w: the weights of z0 and z1 for two blocks
        unroll<0, out.size>([&](auto component) EQ_INLINE {
          constexpr int c = decltype(component)::value;
          if constexpr (s.z1 < 0 && S::n_tiles <= kTilesForHalves) {
            Pair a[2];
            operand<s.z0 + c, 0>(a, combined);
            Number::mma_half(acc[S::tile(s.out, c, nb)], a, w[0]);
            if constexpr (second) Number::mma_half(acc[S::tile(s.out, c, nb + 1)], a, w[2]);
          } else {
            Pair a[4] = {};
            operand<s.z0 + c, 0>(a, combined);
            if constexpr (s.z1 >= 0) operand<s.z1 + c, 2>(a, combined);
            Number::mma(acc[S::tile(s.out, c, nb)], a, w[0], w[1]);
            if constexpr (second) Number::mma(acc[S::tile(s.out, c, nb + 1)], a, w[2], w[3]);
          }
        });
      }
    });
  }

  // 8 copies of an input irrep, staged at `at`: their part of the sum.
  template <int M>
  EQ_DEVICE static void add_chunk(float (&acc)[S::n_tiles][4], u32 at, u32 toeplitz,
                                  u32 weights) {
    constexpr int kept = kept_components<T, M>;
    Lines<kept> lines;
    if constexpr (S::keeps_lines && kept == T::in[M].size) Input::template load<0>(lines.of, at, Input::component);
    unroll<0, S::n_groups>([&](auto group) EQ_INLINE {
      constexpr int g = decltype(group)::value;
      constexpr Range steps = T::steps_of[M][g];
      if constexpr (steps.first < steps.last) {
        using C = Combined<T, M, g, Responses<T::groups[g].pairs, kept>, 4>;
        C combined;
        unroll<0, T::in[M].size / kept>([&](auto b) EQ_INLINE {
          unroll<T::groups[g].slabs.first, T::groups[g].slabs.last>([&](auto slab) EQ_INLINE {
            constexpr int s = decltype(slab)::value;
            if constexpr (!S::keeps_lines || C::one_by_one)
              Input::template load<s>(lines.of, at + b * Input::component, Input::component);
            respond<s>(combined.u, lines, toeplitz);
            if constexpr (C::one_by_one) combined.template add<decltype(b)::value, s>();
          });
        });
        unroll<T::steps_of[M][g].first, T::steps_of[M][g].last>(
            [&](auto step) EQ_INLINE { mix<M, decltype(step)::value>(acc, combined, weights); });
      }
    });
  }

  // The copies of an input irrep from 8 * chunk on, and their weights, into the buffer `at`.
  template <int M>
  EQ_DEVICE static void stage_copies(const ForwardParams& p, const Tile& tile, u32 at, int chunk) {
    constexpr int words = Number::operand_bytes / 16, chunks = T::in[M].copies / 8;
    const int count = chunks - chunk < chunks_staged ? chunks - chunk : chunks_staged;
    const uint4* const weights = p.weights + (S::operand_base(M) + chunk * S::operands(M)) * words;
#pragma unroll 1
    for (int i = threadIdx.x; i < count * S::operands(M) * words; i += threads)
      copy_async(at + weights_at + i * 16, weights + i, true);
    Input::template stage<M>(p.x, p.image, tile, at, 8 * chunk, threads);
  }

  // Grid: tiles_x * tiles_y * tiles_z * batch blocks.
  EQ_DEVICE static void run(const ForwardParams& p) {
    const Image& im = p.image;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 % WARP_ROWS, warp_plane = threadIdx.x / 32 / WARP_ROWS;
    const Tile tile = tile_of(im, blockIdx.x, tile_planes, tile_rows);
    uint4* const words = reinterpret_cast<uint4*>(shared_memory);
    for (int i = threadIdx.x; i < toeplitz_at / 16; i += threads) words[i] = make_uint4(0, 0, 0, 0);  // what is read must be finite
    for (int i = threadIdx.x; i < (shared_bytes - toeplitz_at) / 16; i += threads) words[toeplitz_at / 16 + i] = p.toeplitz[i];
    __syncthreads();

    float acc[S::n_tiles][4] = {};
    const u32 base = shared_address(shared_memory);
    const u32 mine = Number::place(Input::sheet) + T::stride * (warp_plane * Input::rows + warp_row * 2) * Input::line;
    int buffer = 0;
    if constexpr (BUFFERS == 2) stage_copies<0>(p, tile, base, 0);
    unroll<0, S::n_in>([&](auto input) EQ_INLINE {
      constexpr int m = decltype(input)::value, chunks = T::in[m].copies / 8;
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
        if (chunk % chunks_staged == 0) {
          const bool more = BUFFERS == 2 && (chunk + chunks_staged < chunks || m + 1 < S::n_in);
          const u32 next = base + (buffer ^ 1) * stage;  // the next copies travel while these are computed
          if constexpr (BUFFERS == 1) stage_copies<m>(p, tile, base, chunk);
          else if (chunk + chunks_staged < chunks) stage_copies<m>(p, tile, next, chunk + chunks_staged);
          else if constexpr (m + 1 < S::n_in) stage_copies<m + 1>(p, tile, next, 0);
          if (more) wait_copies<1>();
          else wait_copies<0>();
          __syncthreads();
        }
        const u32 at = base + buffer * stage;
        const int staged = chunk % chunks_staged;
        add_chunk<m>(acc, at + staged * (8 / Input::unit) * Input::sheet + mine, base + toeplitz_at,
                     at + weights_at + staged * S::operands(m) * Number::operand_bytes);
        if (chunk % chunks_staged == chunks_staged - 1 || chunk + 1 == chunks) {
          __syncthreads();
          buffer ^= BUFFERS - 1;
        }
      }
    });

#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const long long pixel = pixel_of(tile.batch, tile.z + warp_plane, tile.y + warp_row * 2 + row, tile.x + lane / 4,
                                       im.out_depth, im.out_height, im.out_width);
      if (pixel >= 0) Store::write(p.output, acc, row, pixel);
    }
  }
};

}  // namespace equiconv
