// Gradient of the mixing weights: the sum over pixels and components a of z_(m, copy, path), a * gradient_(n, copy'), a.
//
// The forward with the roles of pixels and channels exchanged. A warp owns 16 copies of one input irrep m and one group of
// harmonics, and walks over pairs of rows of 8 pixels:
//   1. harmonics: u^T = (16 copies x 16 window columns) * (16 columns x 8 pixels, the same Toeplitz operands);
//   2. Clebsch-Gordan in registers, as in the forward;
//   3. z^T (16 copies x 16 pixels) * gradient (16 pixels x 8 output copies), accumulated over all pixels of the block.
// Each row of warps of each block writes its own partial sum; `reduce` of maps.cuh adds them in a fixed order.
#pragma once
#include "source.cuh"

namespace equiconv {

struct GradWeightParams {
  const void* x;          // [batch, depth, height, width, channels_in]
  const void* gradient;   // [batch, out_depth, out_height, out_width, gradient_channels]: reads those that the irreps have
  const uint4* toeplitz;
  float4* partial;        // [gridDim.x * ROW_WARPS, n_tiles, 32 lanes]
  int gradient_channels;
  int tiles;              // of all images
  Image image;
};

template <class T, class Number, int ROW_WARPS, int BUFFERS>
struct GradWeight {
  using S = Structure<T>;
  using Input = Staged<T, Number, 1, 2 * ROW_WARPS, 16>;
  using Pair = typename Number::Pair;
  static constexpr int warps = S::n_groups * ROW_WARPS, threads = warps * 32;
  static constexpr int tile_rows = 2 * ROW_WARPS, tile_pixels = tile_rows * 8;
  static constexpr int half = 8 / Input::unit * Input::sheet;  // bytes from 8 copies of x to the next 8
  static constexpr int g_sheet = (tile_pixels + 1) * 16;       // bytes: pixels x 16 bytes of channels; + 1 against bank conflicts
  static constexpr int g_block = 8 / Input::unit * g_sheet;    // 8 channels
  static constexpr int gradient_at = Input::bytes, stage = gradient_at + S::n_tiles * g_block, toeplitz_at = BUFFERS * stage;
  static constexpr int shared_bytes = toeplitz_at + S::harmonics_of_fragments() * Number::operand_bytes / 2;

  // Accumulator tiles (16 input copies x 8 output copies) of an input irrep, in the order of its steps.
  EQ_TABLE static int paths(int step) { return T::out[T::steps[step].out].complex || T::steps[step].z1 >= 0 ? 2 : 1; }
  EQ_TABLE static int tiles(int first, int last) {
    int n = 0;
    for (int s = first; s < last; ++s) n += paths(s) * (T::out[T::steps[s].out].copies / 8);
    return n;
  }
  EQ_TABLE static int tiles(int m) { return tiles(T::steps_of[m][0].first, T::steps_of[m][S::n_groups - 1].last); }
  EQ_TABLE static int max_tiles(int m) {
    int most = 1;
    for (auto& r : T::steps_of[m]) most = tiles(r.first, r.last) > most ? tiles(r.first, r.last) : most;
    return most;
  }
  EQ_TABLE static int jobs(int m) { return (T::in[m].copies + 15) / 16; }
  EQ_TABLE static int first_job(int m) {
    int j = 0;
    for (int i = 0; i < m; ++i) j += jobs(i);
    return j;
  }
  EQ_TABLE static int first_tile(int m) {
    int t = 0;
    for (int i = 0; i < m; ++i) t += jobs(i) * tiles(i);
    return t;
  }
  static constexpr int n_jobs = first_job(S::n_in), n_tiles = first_tile(S::n_in);

  template <int M>
  EQ_DEVICE static void stage_tile(const GradWeightParams& p, u32 at, int index, int chunk) {
    const Image& im = p.image;
    const Tile tile = tile_of(im, index, 1, tile_rows);
    unroll<0, S::n_out>([&](auto out) EQ_INLINE {
      constexpr Irrep irrep = T::out[decltype(out)::value];
      constexpr int first = S::tile(decltype(out)::value, 0, 0), parts = irrep.copies / Input::unit, all = irrep.size * parts;
#pragma unroll 1
      for (int i = threadIdx.x; i < tile_pixels * all; i += threads) {
        const int part = i % all, at_pixel = i / all, channel = irrep.channel + part / parts * irrep.stride + part % parts * Input::unit;
        const long long pixel = pixel_of(tile.batch, tile.z, tile.y + at_pixel / 8, tile.x + at_pixel % 8, im.out_depth,
                                         im.out_height, im.out_width);
        const long long from = (pixel < 0 ? 0 : pixel * p.gradient_channels) + channel;
        copy_async(at + gradient_at + first * g_block + part * g_sheet + at_pixel * 16,
                   static_cast<const unsigned char*>(p.gradient) + from * Number::bytes, pixel >= 0);
      }
    });
    Input::template stage<M>(p.x, im, tile, at, chunk * 16, threads);
  }

  template <int N>
  struct OfPair {
    float u[2][N][2][4];  // [slot, component, pixel row; copy, pixel]
  };
  template <int PAIRS, int N>
  struct Responses {
    OfPair<N> pairs[PAIRS];
    EQ_DEVICE float number(int slot, int b, int i) const { return pairs[slot / 2].u[slot % 2][b][i / 4][i % 4]; }
  };

  // Responses of one component, to be kept in place KEPT.
  template <int G, int COMPONENT, int KEPT, class C>
  EQ_DEVICE static void respond(C& combined, u32 at, u32 toeplitz) {
    unroll<T::groups[G].slabs.first, T::groups[G].slabs.last>([&](auto slab) EQ_INLINE {
      static constexpr Slab s = T::slabs[decltype(slab)::value];
      Pair lines[2][S::rows][2];  // of 2 x 8 copies
      Input::template load<decltype(slab)::value>(lines, at, half);
      unroll<s.fragments.first, s.fragments.last>([&](auto index) EQ_INLINE {
        constexpr Fragment f = T::fragments[decltype(index)::value];
        Pair t[4];
        Input::template toeplitz<decltype(index)::value>(t, toeplitz);
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          Pair first[2], second[2];
          Input::template window<decltype(index)::value>(first, lines[0], y);
          Input::template window<decltype(index)::value>(second, lines[1], y);
          const Pair v[4] = {first[0], second[0], first[1], second[1]};
          auto& u = combined.u.pairs[f.pair].u;
          Number::mma(u[0][KEPT][y], v, t[0], t[2]);
          if constexpr (f.full) Number::mma(u[1][KEPT][y], v, t[1], t[3]);
        }
      });
      if constexpr (C::one_by_one) combined.template add<COMPONENT, decltype(slab)::value>();
    });
  }

  template <int Z, class C>
  EQ_DEVICE static void operand(Pair (&a)[4], const C& c) {  // one component of one z, transposed
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = Number::pack(c.template z<Z>(2 * i), c.template z<Z>(2 * i + 1));
  }

  // The gradient of one component of an output irrep as operands, for blocks of 8 copies.
  template <int BLOCKS>
  EQ_DEVICE static void load_gradient(Pair (&g)[BLOCKS][2], u32 at, int first) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) Number::load(g[b], at + (first + b) * g_block);
  }

  template <int STEP, int TILE, int N_TILES, class C>
  EQ_DEVICE static void accumulate(float (&acc)[N_TILES][4], const C& combined, u32 at) {
    static constexpr Step s = T::steps[STEP];
    static constexpr Irrep out = T::out[s.out];
    constexpr int blocks = out.copies / 8;
    if constexpr (out.complex) {
      Pair z0[4], z1[4], g0[blocks][2], g1[blocks][2];
      operand<s.z0>(z0, combined);
      operand<s.z0 + 1>(z1, combined);
      load_gradient(g0, at, S::tile(s.out, 0, 0));
      load_gradient(g1, at, S::tile(s.out, 1, 0));
#pragma unroll
      for (int b = 0; b < blocks; ++b) {
        float(&w1)[4] = acc[TILE + b], (&w2)[4] = acc[TILE + blocks + b];
        Number::mma(w1, z0, g0[b][0], g0[b][1]);
        Number::mma(w2, z0, g1[b][0], g1[b][1]);
        Number::mma(w1, z1, g1[b][0], g1[b][1]);
        Number::mma(w2, z1, Number::negate(g0[b][0]), Number::negate(g0[b][1]));
      }
    } else {
      unroll<0, out.size>([&](auto component) EQ_INLINE {
        constexpr int c = decltype(component)::value;
        Pair g[blocks][2];
        load_gradient(g, at, S::tile(s.out, c, 0));
        unroll<0, (s.z1 < 0 ? 1 : 2)>([&](auto path) EQ_INLINE {
          Pair z[4];
          operand<(path ? s.z1 : s.z0) + c>(z, combined);
#pragma unroll
          for (int b = 0; b < blocks; ++b) Number::mma(acc[TILE + path * blocks + b], z, g[b][0], g[b][1]);
        });
      });
    }
  }

  template <int M>
  EQ_DEVICE static void run(const GradWeightParams& p, int chunk) {
    constexpr int most = max_tiles(M), kept = kept_components<T, M>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp % ROW_WARPS, warp_group = warp / ROW_WARPS;
    const u32 base = shared_address(shared_memory);
    const u32 x_at = base + Number::place(Input::sheet) + T::stride * warp_row * 2 * Input::line;
    const u32 g_at = base + gradient_at + Number::place(g_sheet) + warp_row * 2 * 8 * 16;
    float acc[most][4] = {};
    int buffer = 0;
    if (BUFFERS == 2 && blockIdx.x < p.tiles) stage_tile<M>(p, base, blockIdx.x, chunk);
#pragma unroll 1
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
      const int next = BUFFERS == 2 ? tile + gridDim.x : tile;
      if (next < p.tiles) stage_tile<M>(p, base + (buffer ^ (BUFFERS - 1)) * stage, next, chunk);
      if (BUFFERS == 2 && next < p.tiles) wait_copies<1>();
      else wait_copies<0>();
      __syncthreads();
      unroll<0, S::n_groups>([&](auto group) EQ_INLINE {
        constexpr int g = decltype(group)::value;
        constexpr Range steps = T::steps_of[M][g];
        if constexpr (steps.first < steps.last)
          if (warp_group == g) {
            Combined<T, M, g, Responses<T::groups[g].pairs, kept>, 8> combined;
            const auto respond_to = [&](auto b) EQ_INLINE {
              constexpr int component = decltype(b)::value;
              respond<g, component, component % kept>(combined, x_at + buffer * stage + component * Input::component,
                                                      base + toeplitz_at);
            };
            if constexpr (kept == T::in[M].size) {
              unroll<0, kept>(respond_to);
            } else {
#pragma unroll 1
              for (int next = 0; next < T::in[M].size; ++next)  // branches, so that none is read before the last one is done
                unroll<0, T::in[M].size>([&](auto b) EQ_INLINE {
                  if (b == next) respond_to(b);
                });
            }
            unroll<T::steps_of[M][g].first, T::steps_of[M][g].last>([&](auto step) EQ_INLINE {
              constexpr int s = decltype(step)::value;
              accumulate<s, tiles(T::steps_of[M][decltype(group)::value].first, s)>(acc, combined, g_at + buffer * stage);
            });
          }
      });
      __syncthreads();
      buffer ^= BUFFERS - 1;
    }
    const long long row = blockIdx.x * ROW_WARPS + warp_row;
    float4* const partial = p.partial + (row * n_tiles + first_tile(M) + chunk * tiles(M)) * 32 + lane;
    unroll<0, S::n_groups>([&](auto group) EQ_INLINE {
      constexpr int g = decltype(group)::value;
      constexpr Range steps = T::steps_of[M][g];
      constexpr int before = tiles(T::steps_of[M][0].first, steps.first), mine = tiles(steps.first, steps.last);
      if (warp_group == g)
#pragma unroll
        for (int i = 0; i < mine; ++i) partial[(before + i) * 32] = make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    });
  }

  // Grid: (any number of blocks that share the pixels, n_jobs).
  EQ_DEVICE static void start(const GradWeightParams& p) {
    uint4* const words = reinterpret_cast<uint4*>(shared_memory);
    for (int i = threadIdx.x; i < toeplitz_at / 16; i += threads) words[i] = make_uint4(0, 0, 0, 0);
    for (int i = threadIdx.x; i < (shared_bytes - toeplitz_at) / 16; i += threads) words[toeplitz_at / 16 + i] = p.toeplitz[i];
    __syncthreads();
    unroll<0, S::n_in>([&](auto input) EQ_INLINE {  // the same branch for the whole block
      constexpr int m = decltype(input)::value, first = first_job(m), last = first_job(m + 1);
      if constexpr (tiles(m) > 0)
        if (int(blockIdx.y) >= first && int(blockIdx.y) < last) run<m>(p, blockIdx.y - first);
    });
  }
};

}  // namespace equiconv
