// Gradient of the mixing weights: the sum over pixels and components a of z_(m, copy, path), a * gradient_(n, copy'), a.
//
// The forward with the roles of pixels and channels exchanged. A warp owns 16 copies of one input irrep m and one group of
// harmonics, and walks over pairs of rows of 8 pixels:
//   1. harmonics: u^T = (16 copies x 16 window columns) * (16 columns x 8 pixels, the same Toeplitz operands);
//   2. Clebsch-Gordan in registers, as in the forward;
//   3. z^T (16 copies x 16 pixels) * gradient (16 pixels x 8 output copies), accumulated over all pixels of the block.
// Each row of warps of each block writes its own partial sum; `reduce` of maps.cuh adds them in a fixed order.
#pragma once
#include "structure.cuh"

namespace equiconv {

struct GradWeightParams {
  const u16* x;           // [batch, height, width, channels_in]
  const u16* gradient;    // [batch, out_height, out_width, gradient_channels]: reads those that the irreps have
  const uint4* toeplitz;  // [n_fragments, 32 lanes]
  float4* partial;        // [gridDim.x * ROW_WARPS, n_tiles, 32 lanes]
  int gradient_channels;
  int tiles;              // of all images
  Image image;
};

template <class T, class Number, int ROW_WARPS>
struct GradWeight {
  using S = Structure<T>;
  static constexpr int warps = S::n_groups * ROW_WARPS, threads = warps * 32;
  static constexpr int tile_rows = 2 * ROW_WARPS, staged_rows = tile_rows + 2 * S::radius, tile_pixels = tile_rows * 8;
  static constexpr int x_plane = staged_rows * 16 * 16 + 64;  // bytes: rows x 16 columns x 8 copies; + 64 against bank conflicts
  static constexpr int g_plane = (tile_pixels + 1) * 16;      // bytes: pixels x 8 channels; + 1 against bank conflicts
  static constexpr int gradient_at = 2 * S::max_size() * x_plane;
  static constexpr int stage = gradient_at + (S::n_tiles + S::n_tiles % 2) * g_plane;  // channels are read 16 at a time
  static constexpr int shared_bytes = 2 * stage + S::n_fragments * 512;

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
  EQ_DEVICE static void stage_tile(const GradWeightParams& p, u32 at, int tile, int chunk) {
    constexpr Irrep in = T::in[M];
    const Image& im = p.image;
    const int x0 = tile % im.tiles_x * 8, y0 = tile / im.tiles_x % im.tiles_y * tile_rows, batch = tile / (im.tiles_x * im.tiles_y);
#pragma unroll 1
    for (int i = threadIdx.x; i < in.size * staged_rows * S::columns * 2; i += threads) {
      const int half = i % 2, col = i / 2 % S::columns, row = i / (2 * S::columns) % staged_rows, b = i / (2 * S::columns * staged_rows);
      if (in.copies % 16 && chunk * 16 + half * 8 >= in.copies) continue;  // that plane stays zero
      const int y = y0 + row - im.pad_y, x = x0 + col - im.pad_x;
      const bool inside = unsigned(y) < unsigned(im.height) && unsigned(x) < unsigned(im.width);
      const long long pixel = inside ? ((long long)batch * im.height + y) * im.width + x : 0;
      copy_async(at + (b * 2 + half) * x_plane + (row * 16 + col) * 16,
                 p.x + pixel * S::channels_in + in.channel + b * in.stride + chunk * 16 + half * 8, inside);
    }
    unroll<0, S::n_out>([&](auto out) EQ_INLINE {
      constexpr Irrep irrep = T::out[decltype(out)::value];
      constexpr int first = S::tile(decltype(out)::value, 0, 0), blocks = irrep.copies / 8, all = irrep.size * blocks;
#pragma unroll 1
      for (int i = threadIdx.x; i < tile_pixels * all; i += threads) {
        const int block = i % all, at_pixel = i / all, y = y0 + at_pixel / 8, x = x0 + at_pixel % 8;
        const bool inside = y < im.out_height && x < im.out_width;
        const long long pixel = inside ? ((long long)batch * im.out_height + y) * im.out_width + x : 0;
        const int channel = irrep.channel + block / blocks * irrep.stride + block % blocks * 8;
        copy_async(at + gradient_at + (first + block) * g_plane + at_pixel * 16,
                   p.gradient + pixel * p.gradient_channels + channel, inside);
      }
    });
    commit_copies();
  }

  template <int SIZE, int SLOTS>
  struct Responses {
    float u[SLOTS][SIZE][2][4];  // [..][pixel row][copy, pixel]
  };

  template <int G, int B, class R>
  EQ_DEVICE static void harmonics(R& r, u32 at, const uint4* toeplitz) {
    u32 window[S::rows][4];
#pragma unroll
    for (int row = 0; row < S::rows; ++row) load_transposed(window[row], at + row * 256);
    unroll<T::groups[G].fragments.first, T::groups[G].fragments.last>([&](auto index) EQ_INLINE {
      constexpr Fragment f = T::fragments[decltype(index)::value];
      const uint4 t = toeplitz[index * 32 + threadIdx.x % 32];
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const u32(&above)[4] = window[y + S::radius + f.row], (&below)[4] = window[y + S::radius - f.row];
        u32 v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          v[i] = f.row == 0 ? above[i] : f.odd ? Number::subtract(above[i], below[i]) : Number::add(above[i], below[i]);
        Number::mma(r.u[2 * f.pair][B][y], v, t.x, t.z);
        if (f.full) Number::mma(r.u[2 * f.pair + 1][B][y], v, t.y, t.w);
      }
    });
  }

  template <int Z, class R>
  EQ_DEVICE static void operand(u32 (&a)[4], const R& r) {  // one component of one z, transposed
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      float z[4] = {};
      unroll<T::z[Z].first, T::z[Z].last>([&](auto index) EQ_INLINE {
        constexpr Term t = T::terms[decltype(index)::value];
#pragma unroll
        for (int i = 0; i < 4; ++i) z[i] += t.coefficient * r.u[t.slot][t.component][y][i];
      });
      a[2 * y] = Number::pack(z[0], z[1]);
      a[2 * y + 1] = Number::pack(z[2], z[3]);
    }
  }

  // Gradients of one output irrep as operands: [component][pair of blocks of 8 copies].
  template <int SIZE, int PAIRS>
  struct Gradient {
    u32 g[SIZE][PAIRS][4];
  };

  template <int STEP, int TILE, int N_TILES, class R>
  EQ_DEVICE static void accumulate(float (&acc)[N_TILES][4], const R& r, u32 at) {
    static constexpr Step s = T::steps[STEP];
    static constexpr Irrep out = T::out[s.out];
    constexpr int first = S::tile(s.out, 0, 0), blocks = out.copies / 8, pairs = (blocks + 1) / 2;
    Gradient<out.size, pairs> d;
#pragma unroll
    for (int c = 0; c < out.size; ++c)
#pragma unroll
      for (int b = 0; b < pairs; ++b) load_transposed(d.g[c][b], at + (first + c * blocks + 2 * b) * g_plane);
    if constexpr (out.complex) {
      u32 z0[4], z1[4];
      operand<s.z0>(z0, r);
      operand<s.z0 + 1>(z1, r);
#pragma unroll
      for (int b = 0; b < blocks; ++b) {
        const u32 *g0 = d.g[0][b / 2] + b % 2 * 2, *g1 = d.g[1][b / 2] + b % 2 * 2;
        float(&w1)[4] = acc[TILE + b], (&w2)[4] = acc[TILE + blocks + b];
        Number::mma(w1, z0, g0[0], g0[1]);
        Number::mma(w2, z0, g1[0], g1[1]);
        Number::mma(w1, z1, g1[0], g1[1]);
        Number::mma(w2, z1, negate(g0[0]), negate(g0[1]));
      }
    } else {
      unroll<0, out.size * (s.z1 < 0 ? 1 : 2)>([&](auto index) EQ_INLINE {
        constexpr int c = decltype(index)::value % out.size, path = decltype(index)::value / out.size;
        u32 z[4];
        operand<(path ? s.z1 : s.z0) + c>(z, r);
#pragma unroll
        for (int b = 0; b < blocks; ++b)
          Number::mma(acc[TILE + path * blocks + b], z, d.g[c][b / 2][b % 2 * 2], d.g[c][b / 2][b % 2 * 2 + 1]);
      });
    }
  }

  template <int M>
  EQ_DEVICE static void run(const GradWeightParams& p, int chunk) {
    constexpr int size = T::in[M].size, most = max_tiles(M);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp % ROW_WARPS, warp_group = warp / ROW_WARPS;
    const uint4* const toeplitz = reinterpret_cast<const uint4*>(shared_memory + 2 * stage);
    const u32 base = shared_address(shared_memory);
    const u32 x_at = base + lane / 8 % 2 * x_plane + (warp_row * 2 * 16 + lane % 8 + lane / 16 * 8) * 16;
    const u32 g_at = base + gradient_at + lane / 16 * g_plane + ((warp_row * 2 + lane / 8 % 2) * 8 + lane % 8) * 16;
    float acc[most][4] = {};
    int buffer = 0;
    if (blockIdx.x < p.tiles) stage_tile<M>(p, base, blockIdx.x, chunk);
#pragma unroll 1
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
      if (tile + gridDim.x < p.tiles) {
        stage_tile<M>(p, base + (buffer ^ 1) * stage, tile + gridDim.x, chunk);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      __syncthreads();
      unroll<0, S::n_groups>([&](auto group) EQ_INLINE {
        constexpr int g = decltype(group)::value;
        constexpr Range steps = T::steps_of[M][g];
        if constexpr (steps.first < steps.last)
          if (warp_group == g) {
            Responses<size, 2 * T::groups[g].pairs> r = {};
            unroll<0, size>([&](auto b) EQ_INLINE {
              harmonics<g, decltype(b)::value>(r, x_at + buffer * stage + b * 2 * x_plane, toeplitz);
            });
            unroll<T::steps_of[M][g].first, T::steps_of[M][g].last>([&](auto step) EQ_INLINE {
              constexpr int s = decltype(step)::value;
              accumulate<s, tiles(T::steps_of[M][decltype(group)::value].first, s)>(acc, r, g_at + buffer * stage);
            });
          }
      });
      __syncthreads();
      buffer ^= 1;
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
    for (int i = threadIdx.x; i < 2 * stage / 16; i += threads) words[i] = make_uint4(0, 0, 0, 0);
    for (int i = threadIdx.x; i < S::n_fragments * 32; i += threads) words[2 * stage / 16 + i] = p.toeplitz[i];
    __syncthreads();
    unroll<0, S::n_in>([&](auto input) EQ_INLINE {  // the same branch for the whole block
      constexpr int m = decltype(input)::value, first = first_job(m), last = first_job(m + 1);
      if constexpr (tiles(m) > 0)
        if (int(blockIdx.y) >= first && int(blockIdx.y) < last) run<m>(p, blockIdx.y - first);
    });
  }
};

}  // namespace equiconv
