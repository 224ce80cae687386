// One launch for all pairs, whose sizes only the device knows: its blocks walk over the tiles of all pairs.
//
// A pair has two axes, `out` and `in`. They are treated alike, so they go by `near` and `far`: near is the one whose
// channels lie closer together in the filter, for long runs. A tile has kLanes channels of the far axis ("lanes"), which
// one thread computes together, and a range of channels of the near axis ("columns").
#include "expand_filter.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

namespace equiconv {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 4;
constexpr int kLanes = 4;
constexpr int kItems = 512;          // (column, tap) of a tile: about as many, where fields are small enough
constexpr int kSharedBytes = 46080;  // of the staged arrays, within the 48 KB that need no permission
constexpr int kOwned = 8;            // backward: a tile owns the irreps that start within so many far components

template <class Acc>
struct alignas(16) Lanes {
  Acc at[kLanes];
};

template <class Acc>
__device__ void add_product(Lanes<Acc>& sum, Acc factor, const Lanes<Acc>& x) {
#pragma unroll
  for (int v = 0; v < kLanes; ++v) sum.at[v] += factor * x.at[v];
}

template <class To, class From>
__device__ To convert(From x) {
  if constexpr (std::is_same_v<From, __nv_bfloat16>) return To(__bfloat162float(x));
  else if constexpr (std::is_same_v<From, __half>) return To(__half2float(x));
  else if constexpr (std::is_same_v<To, __nv_bfloat16>) return __float2bfloat16(float(x));
  else if constexpr (std::is_same_v<To, __half>) return __float2half(float(x));
  else return To(x);
}

__device__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// Elements between two columns of a staged array: odd, against bank conflicts.
__device__ int pitch_of(int elements) { return elements | 1; }

struct Axis {
  int size, fields, channels_start, basis_start;
  int row_step;     // between components, in rows (n, m, h) of the terms
  int weight_step;  // between fields, in weights
  int block_start;  // place of the axis's first component in the table of blocks
  int64_t stride;   // between channels, in the filter

  __device__ bool is_split() const { return basis_start < 0; }
  // With a change of basis, the lanes of a thread must belong to one field: then each field is padded.
  __device__ int lanes_per_field() const { return is_split() ? size : divide_up(size, kLanes) * kLanes; }
};

struct Axes {
  Axis near, far;
};

// In shared memory: they would cost 40 registers.
struct SharedPair {
  ExpandFilterPair pair;
  Axes axes;
  int tile;
};

__device__ Axes axes_of(const ExpandFilterPair& pair, const ExpandFilterParams& p) {
  const Axis out{pair.out_size, pair.out_fields, pair.out_channels_start, pair.out_basis_start,
                 pair.in_size * pair.harmonics, pair.in_fields * pair.paths, 0, p.stride_out};
  const Axis in{pair.in_size, pair.in_fields, pair.in_channels_start, pair.in_basis_start,
                pair.harmonics, pair.paths, 2, p.stride_in};
  return p.stride_in <= p.stride_out ? Axes{in, out} : Axes{out, in};
}

struct Columns {  // of all near fields, one after the other
  int begin, end;
  __device__ int count() const { return end - begin; }
};

struct ColumnTap {
  int column, tap;
};

// What both directions know of a pair.
template <class Acc, class Filter>
struct Tile {
  const ExpandFilterParams& p;
  const ExpandFilterPair& pair;
  const Axes& axes;
  const Acc* const values;
  const int taps;
  int lane_field[kLanes], lane_component[kLanes];  // field -1: no such lane

  __device__ Tile(const ExpandFilterParams& p, const SharedPair& shared)
      : p(p), pair(shared.pair), axes(shared.axes), values(static_cast<const Acc*>(p.values)), taps(int(p.taps)) {}

  __device__ void set_lanes(int first, int end) {
    const int per_field = axes.far.lanes_per_field();
#pragma unroll
    for (int v = 0; v < kLanes; ++v) {
      const int lane = first + v;
      lane_component[v] = lane % per_field;
      lane_field[v] = lane < end && lane_component[v] < axes.far.size ? lane / per_field : -1;
    }
  }

  // Neighbouring threads take neighbouring elements of the filter.
  __device__ ColumnTap column_tap(int item, int columns, int taps_here) const {
    if (p.stride_tap < axes.near.stride) return {item / taps_here, item % taps_here};
    return {item % columns, item / columns};
  }

  __device__ Filter* filter_at(int column, int tap) const {
    const int channel = __ldg(p.index + axes.near.channels_start + column / axes.near.size) + column % axes.near.size;
    return static_cast<Filter*>(p.filter) + channel * axes.near.stride + tap * p.stride_tap;
  }

  __device__ int64_t far_offset(int field, int component) const {
    return (__ldg(p.index + axes.far.channels_start + field) + component) * axes.far.stride;
  }

  __device__ const Acc* harmonic(int h) const { return values + pair.harmonics_start + int64_t(h) * taps; }

  __device__ int64_t weight_at(int near_field, int far_field) const {
    return pair.weights_start + int64_t(near_field) * axes.near.weight_step + int64_t(far_field) * axes.far.weight_step;
  }

  // to[column, h] = sum_m Q[column, m] from[m, h] over the columns of the same field in `source`, added to what was there
  // unless those are the first of the field. Q is [near.size, near.size], addressed by the steps.
  __device__ void change_basis(Lanes<Acc>* to, Columns columns, const Lanes<Acc>* from, Columns source, int harmonics,
                               int column_step, int source_step) const {
    const int size = axes.near.size, pitch = pitch_of(harmonics);
    for (int item = int(threadIdx.x); item < columns.count() * harmonics; item += kThreads) {
      const int column = item / harmonics, h = item % harmonics;
      const int component = (columns.begin + column) % size, field = columns.begin + column - component;
      const int begin = max(field, source.begin), end = min(field + size, source.end);
      const Acc* const basis = values + axes.near.basis_start + component * column_step;
      Lanes<Acc> sum{};
      if (begin > field) sum = to[column * pitch + h];
#pragma unroll 4
      for (int m = begin; m < end; ++m)
        add_product(sum, __ldg(basis + (m - field) * source_step), from[(m - source.begin) * pitch + h]);
      to[column * pitch + h] = sum;
    }
  }
};

// Calls body(shared pair) for this block's share of the tiles of all pairs; count_tiles(pair, axes): how many a pair has.
template <class Count, class Body>
__device__ void for_each_tile(const ExpandFilterParams& p, Count count_tiles, Body body) {
  __shared__ int counts[kThreads];
  __shared__ SharedPair shared;
  const int num_pairs = int(p.num_pairs), thread = int(threadIdx.x), blocks = int(gridDim.x);
  int tile = int(blockIdx.x);  // of those of the pairs from `first` on
  for (int first = 0; first < num_pairs; first += kThreads) {
    const int pairs = min(kThreads, num_pairs - first);
    const int count = thread < pairs ? count_tiles(p.pairs[first + thread], axes_of(p.pairs[first + thread], p)) : 0;
    counts[thread] = count;
    __syncthreads();
    int start = 0, total = 0;
    for (int i = 0; i < pairs; ++i) {
      if (i == thread) start = total;
      total += counts[i];
    }
    for (; tile < total; tile += blocks) {
      if (start <= tile && tile < start + count) {
        shared.pair = p.pairs[first + thread];
        shared.axes = axes_of(shared.pair, p);
        shared.tile = tile - start;
      }
      __syncthreads();
      body(shared);
      __syncthreads();
    }
    tile -= total;
    __syncthreads();  // all have read `counts`
  }
}

// ---------------------------------------------------------------------------------------------------------- forward
//
//   y[column, h, lane] = sum_n Q_far[lane, n] X[n, column, h]       X[n, m, h] = sum of coefficient * weight over its terms
//   z[column, h, lane] = sum_m Q_near[column, m] y[m, h, lane]
//   filter[lane, column, s] = sum_h z[column, h, lane] H[h, s]

struct ForwardTiles {
  int harmonics;  // on the stage at a time
  int columns;    // of a tile: whole fields, where one fits on the stage
  int near_tiles, far_tiles;
};

__device__ ForwardTiles forward_tiles(const ExpandFilterPair& pair, const Axes& axes, int taps, int stage) {
  const Axis &near = axes.near, &far = axes.far;
  ForwardTiles t;
  t.harmonics = min(pair.harmonics, stage - 1);
  t.columns = stage / pitch_of(t.harmonics);
  if (t.columns >= near.size) {
    const int fields = min(t.columns, max(near.size, kItems / taps)) / near.size;
    t.columns = divide_up(near.fields, divide_up(near.fields, fields)) * near.size;  // as many in every tile
  }
  t.near_tiles = divide_up(near.fields * near.size, t.columns);
  t.far_tiles = divide_up(far.fields * far.lanes_per_field(), kLanes);
  return t;
}

template <class Acc, class Filter>
struct Forward : Tile<Acc, Filter> {
  static constexpr int kStage = kSharedBytes / 2 / sizeof(Lanes<Acc>);
  using Tile<Acc, Filter>::axes, Tile<Acc, Filter>::pair, Tile<Acc, Filter>::p, Tile<Acc, Filter>::values;
  using Tile<Acc, Filter>::taps, Tile<Acc, Filter>::lane_field, Tile<Acc, Filter>::lane_component;

  Lanes<Acc>* const y;  // [column, h]
  Lanes<Acc>* const z;  // [column, h]; y itself where near is split

  __device__ Forward(const ExpandFilterParams& p, const SharedPair& shared, Lanes<Acc>* y, Lanes<Acc>* z)
      : Tile<Acc, Filter>(p, shared), y(y), z(axes.near.is_split() ? y : z) {}

  __device__ void run(int tile) {
    const ForwardTiles tiles = forward_tiles(pair, axes, taps, kStage);
    this->set_lanes(tile / tiles.near_tiles * kLanes, axes.far.fields * axes.far.lanes_per_field());
    const int begin = tile % tiles.near_tiles * tiles.columns;
    const Columns columns{begin, min(begin + tiles.columns, axes.near.fields * axes.near.size)};
    const int items = columns.count() * taps;
    for (int first = 0; first < items; first += kThreads) {
      const int item = first + int(threadIdx.x);
      const ColumnTap at = this->column_tap(item, columns.count(), taps);
      Lanes<Acc> sum{};
      for (int h = 0; h < pair.harmonics; h += tiles.harmonics) {
        const int harmonics = min(tiles.harmonics, pair.harmonics - h);
        if (first == 0 || harmonics < pair.harmonics) stage(columns, h, harmonics);
        if (item < items) add_harmonics(sum, at, h, harmonics);
      }
      if (item < items) store(sum, columns.begin + at.column, at.tap);
    }
  }

  __device__ void add_harmonics(Lanes<Acc>& sum, ColumnTap at, int first, int harmonics) const {
    const Lanes<Acc>* const column = z + at.column * pitch_of(harmonics);
    const Acc* const harmonic = this->harmonic(first) + at.tap;
#pragma unroll 4
    for (int h = 0; h < harmonics; ++h) add_product(sum, __ldg(harmonic + int64_t(h) * taps), column[h]);
  }

  __device__ void store(const Lanes<Acc>& sum, int column, int tap) const {
    Filter* const to = this->filter_at(column, tap);
#pragma unroll
    for (int v = 0; v < kLanes; ++v)
      if (lane_field[v] >= 0) to[this->far_offset(lane_field[v], lane_component[v])] = convert<Filter>(sum.at[v]);
  }

  // z for some harmonics. It starts and ends with a barrier.
  __device__ void stage(Columns columns, int first, int harmonics) const {
    const int size = axes.near.size;
    Columns all = columns;  // of y
    if (!axes.near.is_split()) all = {columns.begin / size * size, divide_up(columns.end, size) * size};
    const int step = min(all.count(), kStage / pitch_of(harmonics));
    for (int begin = all.begin; begin < all.end; begin += step) {
      const Columns source{begin, min(begin + step, all.end)};
      __syncthreads();
      stage_y(source, first, harmonics);
      __syncthreads();
      if (!axes.near.is_split()) this->change_basis(z, columns, y, source, harmonics, size, 1);
    }
    __syncthreads();
  }

  __device__ void stage_y(Columns columns, int first, int harmonics) const {
    const Axis &near = axes.near, &far = axes.far;
    for (int item = int(threadIdx.x); item < columns.count() * harmonics; item += kThreads) {
      const int column = item / harmonics, h = item % harmonics;
      const int near_field = (columns.begin + column) / near.size, component = (columns.begin + column) % near.size;
      const int row = component * near.row_step + first + h;
      Lanes<Acc> sum{};
      if (far.is_split()) {
#pragma unroll
        for (int v = 0; v < kLanes; ++v)
          if (lane_field[v] >= 0) sum.at[v] = gather(row + lane_component[v] * far.row_step, near_field, lane_field[v]);
      } else {  // the lanes are of one field, and the first one exists
        const Acc* const basis = values + far.basis_start;
        for (int n = 0; n < far.size; ++n) {
          const Acc x = gather(row + n * far.row_step, near_field, lane_field[0]);
#pragma unroll
          for (int v = 0; v < kLanes; ++v)
            sum.at[v] += __ldg(basis + min(lane_component[v], far.size - 1) * far.size + n) * x;
        }
      }
      y[column * pitch_of(harmonics) + h] = sum;
    }
  }

  // X[row] of a pair of fields.
  __device__ Acc gather(int row, int near_field, int far_field) const {
    const int* const start = p.index + pair.row_start + row;
    const Acc* const weights = static_cast<const Acc*>(p.weights) + this->weight_at(near_field, far_field);
    const int end = __ldg(start + 1);
    Acc sum = 0;
    for (int t = __ldg(start); t < end; ++t)
      sum += __ldg(values + pair.coefficients_start + t) * __ldg(weights + __ldg(p.index + pair.terms_start + t));
    return sum;
  }
};

template <class Acc, class Filter>
__global__ void __launch_bounds__(kThreads, 3) expand_filter_kernel(const ExpandFilterParams p) {
  constexpr int kStage = Forward<Acc, Filter>::kStage;
  __shared__ Lanes<Acc> y[kStage], z[kStage];
  for_each_tile(
      p,
      [&](const ExpandFilterPair& pair, const Axes& axes) {
        const ForwardTiles t = forward_tiles(pair, axes, int(p.taps), kStage);
        return t.near_tiles * t.far_tiles;
      },
      [&](const SharedPair& shared) { Forward<Acc, Filter>(p, shared, y, z).run(shared.tile); });
}

// --------------------------------------------------------------------------------------------------------- backward
//
//   u[column, s, lane] = sum_i Q_far[i, lane] grad_filter[i, column, s]
//   y[column, h, lane] = sum_s u[column, s, lane] H[h, s]
//   z[column, h, lane] = sum_j Q_near[j, column] y[j, h, lane]
//   grad_weights[path] = sum of coefficient * z over the terms of the path
//
// A tile owns all paths of some fields or, where far fields are large, those to the irreps that start within one part of
// kOwned far components. So one thread sums up the gradient of a weight, always in the same order.

struct BackwardTiles {
  int near_fields, far_fields, far_parts;  // fields of a tile, parts of a far field
  int near_tiles, far_tiles;
};

__device__ BackwardTiles backward_tiles(const ExpandFilterPair& pair, const Axes& axes, int taps, int stage) {
  const Axis &near = axes.near, &far = axes.far;
  const int columns = min(stage / pitch_of(min(pair.harmonics, stage - 1)), kItems / taps);
  BackwardTiles t;
  t.near_tiles = divide_up(near.fields, max(1, columns / near.size));
  t.near_fields = divide_up(near.fields, t.near_tiles);  // as many in every tile
  t.near_tiles = divide_up(near.fields, t.near_fields);
  t.far_fields = max(1, kOwned / far.lanes_per_field());
  t.far_parts = divide_up(far.size, kOwned);
  t.far_tiles = divide_up(far.fields, t.far_fields) * t.far_parts;
  return t;
}

template <class Acc, class Filter>
struct Backward : Tile<Acc, Filter> {
  static constexpr int kGradStage = kSharedBytes / 5 / sizeof(Lanes<Acc>);
  static constexpr int kStage = 2 * kGradStage;  // y and z are best with all columns of a field, u needs only a few
  using Tile<Acc, Filter>::axes, Tile<Acc, Filter>::pair, Tile<Acc, Filter>::p, Tile<Acc, Filter>::values;
  using Tile<Acc, Filter>::taps, Tile<Acc, Filter>::lane_field, Tile<Acc, Filter>::lane_component;

  Lanes<Acc>* const u;  // [column, s]
  Lanes<Acc>* const y;  // [column, h]
  Lanes<Acc>* const z;  // [column, h]; y itself where near is split
  int near_field, near_fields, far_field, far_fields, part, parts;

  __device__ Backward(const ExpandFilterParams& p, const SharedPair& shared, Lanes<Acc>* u, Lanes<Acc>* y, Lanes<Acc>* z)
      : Tile<Acc, Filter>(p, shared), u(u), y(y), z(axes.near.is_split() ? y : z) {}

  __device__ void run(int tile) {
    const BackwardTiles tiles = backward_tiles(pair, axes, taps, kStage);
    const int far_tile = tile / tiles.near_tiles, per_field = axes.far.lanes_per_field();
    near_field = tile % tiles.near_tiles * tiles.near_fields;
    near_fields = min(tiles.near_fields, axes.near.fields - near_field);
    far_field = far_tile / tiles.far_parts * tiles.far_fields;
    far_fields = min(tiles.far_fields, axes.far.fields - far_field);
    part = far_tile % tiles.far_parts;
    parts = tiles.far_parts;
    clear();
    const int lanes_end = (far_field + far_fields) * per_field, all_harmonics = min(pair.harmonics, kStage - 1);
    for (int lane = far_field * per_field + part * kOwned; lane < lanes_end; lane += kLanes) {
      if (parts > 1 && !__syncthreads_or(owns_any(lane - far_field * per_field))) continue;
      this->set_lanes(lane, lanes_end);
      for (int h = 0; h < pair.harmonics; h += all_harmonics)
        add_harmonics(lane, h, min(all_harmonics, pair.harmonics - h));
    }
  }

  __device__ Acc& grad_weight(int near, int far, int path) const {
    return static_cast<Acc*>(p.weights)[this->weight_at(near_field + near, far_field + far) + path];
  }

  __device__ const int* far_block(int path) const {  // (first component, size)
    return p.index + pair.blocks_start + 5 * path + axes.far.block_start;
  }

  __device__ bool owns(int path) const { return parts == 1 || __ldg(far_block(path)) / kOwned == part; }

  __device__ bool owns_any(int component) const {  // path to the kLanes components from this one on
    for (int path = int(threadIdx.x); path < pair.paths; path += kThreads) {
      const int begin = __ldg(far_block(path)), end = begin + __ldg(far_block(path) + 1);
      if (begin / kOwned == part && begin < component + kLanes && component < end) return true;
    }
    return false;
  }

  // Here and in add_terms a weight has the same thread, so nobody need wait.
  __device__ void clear() const {
    for (int item = int(threadIdx.x); item < near_fields * far_fields * pair.paths; item += kThreads) {
      const int path = item % pair.paths, fields = item / pair.paths;
      if (owns(path)) grad_weight(fields % near_fields, fields / near_fields, path) = 0;
    }
  }

  __device__ void add_harmonics(int lane, int first, int harmonics) const {
    const int size = axes.near.size;
    const Columns all{near_field * size, (near_field + near_fields) * size};
    const int step = min(all.count(), kStage / pitch_of(harmonics));
    for (int begin = all.begin; begin < all.end; begin += step) {
      const Columns columns{begin, min(begin + step, all.end)};
      if (axes.near.is_split()) {
        stage_y(columns, first, harmonics);
      } else {
        for (int from = all.begin; from < all.end; from += step) {
          const Columns source{from, min(from + step, all.end)};
          stage_y(source, first, harmonics);
          this->change_basis(z, columns, y, source, harmonics, 1, size);
        }
        __syncthreads();
      }
      add_terms(columns, lane, first, harmonics);
    }
  }

  // y for some columns and harmonics. It starts and ends with a barrier.
  __device__ void stage_y(Columns columns, int first, int harmonics) const {
    const int tap_step = min(taps, kGradStage - 1), step = kGradStage / pitch_of(tap_step);
    for (int begin = columns.begin; begin < columns.end; begin += step) {
      const Columns some{begin, min(begin + step, columns.end)};
      for (int tap = 0; tap < taps; tap += tap_step) {
        const int some_taps = min(tap_step, taps - tap);
        __syncthreads();
        stage_u(some, tap, some_taps);
        __syncthreads();
        for (int item = int(threadIdx.x); item < some.count() * harmonics; item += kThreads) {
          const int column = item % some.count(), h = item / some.count();
          const Acc* const harmonic = this->harmonic(first + h) + tap;
          Lanes<Acc>& to = y[(some.begin - columns.begin + column) * pitch_of(harmonics) + h];
          Lanes<Acc> sum{};
          if (tap > 0) sum = to;
#pragma unroll 4
          for (int s = 0; s < some_taps; ++s) add_product(sum, __ldg(harmonic + s), u[column * pitch_of(some_taps) + s]);
          to = sum;
        }
      }
    }
    __syncthreads();
  }

  __device__ void stage_u(Columns columns, int first_tap, int some_taps) const {
    const Axis& far = axes.far;
    for (int item = int(threadIdx.x); item < columns.count() * some_taps; item += kThreads) {
      const ColumnTap at = this->column_tap(item, columns.count(), some_taps);
      const Filter* const grad = this->filter_at(columns.begin + at.column, first_tap + at.tap);
      Lanes<Acc> sum{};
      if (far.is_split()) {
#pragma unroll
        for (int v = 0; v < kLanes; ++v)
          if (lane_field[v] >= 0) sum.at[v] = convert<Acc>(grad[this->far_offset(lane_field[v], lane_component[v])]);
      } else {  // the lanes are of one field, and the first one exists
        const Filter* const field = grad + this->far_offset(lane_field[0], 0);
        const Acc* const basis = values + far.basis_start;
#pragma unroll 4
        for (int i = 0; i < far.size; ++i) {
          const Acc x = convert<Acc>(field[i * far.stride]);
#pragma unroll
          for (int v = 0; v < kLanes; ++v) sum.at[v] += __ldg(basis + i * far.size + min(lane_component[v], far.size - 1)) * x;
        }
      }
      u[at.column * pitch_of(some_taps) + at.tap] = sum;
    }
  }

  // Adds what some columns, lanes and harmonics contribute to the gradients.
  __device__ void add_terms(Columns columns, int first_lane, int first, int harmonics) const {
    const Axis &near = axes.near, &far = axes.far;
    const int pitch = pitch_of(harmonics), per_field = far.lanes_per_field();
    for (int item = int(threadIdx.x); item < near_fields * far_fields * pair.paths; item += kThreads) {
      const int path = item % pair.paths, near_at = item / pair.paths % near_fields, far_at = item / pair.paths / near_fields;
      const int field_lane = (far_field + far_at) * per_field - first_lane;
      if (field_lane >= kLanes || field_lane + far.size <= 0 || !owns(path)) continue;
      const int field_column = (near_field + near_at) * near.size - columns.begin;
      const int* const start = p.index + pair.path_start + path;
      const int end = __ldg(start + 1);
      Acc sum = 0;
      for (int t = __ldg(start); t < end; ++t) {
        const int* const term = p.index + pair.path_terms_start + 2 * int64_t(t);
        const int row = __ldg(term), h = row % pair.harmonics - first;
        const int column = field_column + row / near.row_step % near.size, lane = field_lane + row / far.row_step % far.size;
        if (0 <= h && h < harmonics && 0 <= lane && lane < kLanes && 0 <= column && column < columns.count())
          sum += __ldg(values + pair.coefficients_start + __ldg(term + 1)) * z[column * pitch + h].at[lane];
      }
      grad_weight(near_at, far_at, path) += sum;
    }
  }
};

template <class Acc, class Filter>
__global__ void __launch_bounds__(kThreads, 2) expand_filter_bwd_kernel(const ExpandFilterParams p) {
  using Tile = Backward<Acc, Filter>;
  __shared__ Lanes<Acc> u[Tile::kGradStage], y[Tile::kStage], z[Tile::kStage];
  for_each_tile(
      p,
      [&](const ExpandFilterPair& pair, const Axes& axes) {
        const BackwardTiles t = backward_tiles(pair, axes, int(p.taps), Tile::kStage);
        return pair.paths == 0 ? 0 : t.near_tiles * t.far_tiles;
      },
      [&](const SharedPair& shared) { Tile(p, shared, u, y, z).run(shared.tile); });
}

// ----------------------------------------------------------------------------------------------------------- launch

using Kernel = void (*)(ExpandFilterParams);

const char* launch(Kernel kernel, const ExpandFilterParams& p, void* stream) {
  if (kernel == nullptr) return "expand_filter: float64 goes with float64 only";
  if (p.num_pairs == 0) return nullptr;
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kBlocksPerSm * processors);
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, p);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* expand_filter_cuda(const ExpandFilterParams& p, void* stream) {
  Kernel kernel = nullptr;
  if (p.dtype == DType::f64 && p.filter_dtype == DType::f64) kernel = expand_filter_kernel<double, double>;
  if (p.dtype == DType::f32 && p.filter_dtype == DType::f32) kernel = expand_filter_kernel<float, float>;
  if (p.dtype == DType::f32 && p.filter_dtype == DType::bf16) kernel = expand_filter_kernel<float, __nv_bfloat16>;
  if (p.dtype == DType::f32 && p.filter_dtype == DType::f16) kernel = expand_filter_kernel<float, __half>;
  return launch(kernel, p, stream);
}

const char* expand_filter_bwd_cuda(const ExpandFilterParams& p, void* stream) {
  Kernel kernel = nullptr;
  if (p.dtype == DType::f64 && p.filter_dtype == DType::f64) kernel = expand_filter_bwd_kernel<double, double>;
  if (p.dtype == DType::f32 && p.filter_dtype == DType::f32) kernel = expand_filter_bwd_kernel<float, float>;
  if (p.dtype == DType::f32 && p.filter_dtype == DType::bf16) kernel = expand_filter_bwd_kernel<float, __nv_bfloat16>;
  if (p.dtype == DType::f32 && p.filter_dtype == DType::f16) kernel = expand_filter_bwd_kernel<float, __half>;
  return launch(kernel, p, stream);
}

}  // namespace equiconv
