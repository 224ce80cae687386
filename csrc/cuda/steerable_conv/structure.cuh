// The tables that specialise the kernels for a layer (equiconv/fused/structure.py writes them), and what follows from them.
#pragma once
#include "device.cuh"

namespace equiconv {

// Copies of an irrep, padded to a multiple of 8, in channels: channel + component * stride + copy.
struct Irrep { int size, copies, channel, stride; bool complex; };
struct Range { int first, last; };
// Toeplitz operand of two harmonics (one if not full) for tap rows +-row; its place in the table, counted in harmonics.
struct Fragment { int pair, row; bool odd, full; int place; };
// Those that read the same lines: tap planes +-plane, one phase. After it, the responses of the pairs `done` are complete.
struct Slab { int plane, phase; bool odd; Range fragments, done; };
struct Group { int pairs; Range slabs; };                 // harmonics that are computed together, in 2 * pairs slots
struct Step { int out, z0, z1; };                         // complex: one z; real: two z, or one and -1
struct Term { int component, slot; float coefficient; };  // z[a] = sum of coefficient * u[slot][component]

// A convolution with zeros around it. What it reads at stride * y + tap - pad_y, it writes at y; likewise along z (in the
// plane: one plane) and x. The source is `up` times as large as its memory, with zeros in between.
struct Image {
  int depth, height, width, out_depth, out_height, out_width, pad_z, pad_y, pad_x;
  int tiles_z, tiles_y, tiles_x;  // of the output, for each image of the batch
};

template <class T>
struct Structure {
  static constexpr int radius = T::taps / 2, depth_radius = T::depth_taps / 2;
  static constexpr int phases = T::stride, columns = 8 + (T::taps - 1) / T::stride;  // of a line that 8 pixels read
  static constexpr int rows = T::taps + T::stride;                                   // lines that 2 rows of pixels read
  static constexpr int n_in = sizeof(T::in) / sizeof(Irrep), n_out = sizeof(T::out) / sizeof(Irrep);
  static constexpr int n_groups = sizeof(T::groups) / sizeof(Group);
  static_assert(T::taps % 2 == 1 && columns <= 16, "the window of a Toeplitz operand has 16 columns");

  static constexpr int channels_in = T::in[n_in - 1].channel + T::in[n_in - 1].size * T::in[n_in - 1].stride;

  EQ_TABLE static int max_size() {
    int most = 0;
    for (auto& i : T::in) most = i.size > most ? i.size : most;
    return most;
  }
  EQ_TABLE static int harmonics_of_fragments() {
    int n = 0;
    for (auto& f : T::fragments) n += f.full ? 2 : 1;
    return n;
  }
  EQ_TABLE static bool copies_fit() {
    for (auto& i : T::in) if (i.copies % 8 || i.channel % 8 || i.stride % 8) return false;
    for (auto& i : T::out) if (i.copies % 8 || i.channel % 8 || i.stride % 8) return false;
    return true;
  }
  static_assert(copies_fit(), "16 bytes are read at a time");

  // The z's of a group of harmonics that come from one input irrep.
  EQ_TABLE static Range z_of(int m, int group) {
    Range r{-1, -1};
    for (int i = T::steps_of[m][group].first; i < T::steps_of[m][group].last; ++i) {
      const Step s = T::steps[i];
      const int size = T::out[s.out].size, last = (s.z1 > s.z0 ? s.z1 : s.z0) + size;
      const int first = s.z1 >= 0 && s.z1 < s.z0 ? s.z1 : s.z0;
      if (r.first < 0 || first < r.first) r.first = first;
      if (last > r.last) r.last = last;
    }
    return r;
  }

  // Accumulator tiles (16 pixels x 8 copies) are numbered [irrep, component, block of 8 copies].
  EQ_TABLE static int tile(int n, int component, int block) {
    int t = component * T::out[n].copies / 8 + block;
    for (int i = 0; i < n; ++i) t += T::out[i].size * T::out[i].copies / 8;
    return t;
  }
  static constexpr int n_tiles = tile(n_out - 1, T::out[n_out - 1].size, 0);
  // Whether registers suffice for the lines of a window while all groups of harmonics are computed.
  static constexpr bool keeps_lines = T::depth_taps == 1 && phases == 1 && T::taps <= (n_tiles <= 16 ? 5 : 3);

  // unroll over all of them: f(tile, its first channel)
  template <class F>
  EQ_DEVICE static void each_tile(F&& f) {
    unroll<0, n_out>([&](auto out) EQ_INLINE {
      constexpr Irrep irrep = T::out[decltype(out)::value];
      unroll<0, irrep.size * (irrep.copies / 8)>([&](auto at) EQ_INLINE {
        constexpr int component = at / (irrep.copies / 8), block = at % (irrep.copies / 8);
        f(Index<tile(decltype(out)::value, component, block)>{}, Index<irrep.channel + component * irrep.stride + 8 * block>{});
      });
    });
  }

  // Mixing weights: for each input irrep, 8 of its copies and step, one operand for 16 copies of the output.
  EQ_TABLE static int operand(int m, int step) {  // place among those of 8 copies
    int o = 0;
    for (int s = T::steps_of[m][0].first; s < step; ++s) o += (T::out[T::steps[s].out].copies + 15) / 16;
    return o;
  }
  EQ_TABLE static int operands(int m) { return operand(m, T::steps_of[m][n_groups - 1].last); }
  EQ_TABLE static int operand_base(int m) {
    int o = 0;
    for (int i = 0; i < m; ++i) o += operands(i) * (T::in[i].copies / 8);
    return o;
  }
  EQ_TABLE static int max_operands() {
    int most = 0;
    for (int m = 0; m < n_in; ++m) most = operands(m) > most ? operands(m) : most;
    return most;
  }
};

}  // namespace equiconv
