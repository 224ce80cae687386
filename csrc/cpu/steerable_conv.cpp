// Tile by tile: z of some fields of the source, then the matrix products that they take part in. Pixels are the lanes of
// the vectors.
#include "../steerable_conv.h"

#include "complex_product.h"
#include "functions.h"
#include "harmonics.h"
#include "packed_weights.h"
#include "simd.h"

namespace equiconv::EQUICONV_ISA {
namespace {

using namespace equiconv::steerable;

// ---- rows of numbers -------------------------------------------------------------------------------------------

template <class T>
void set_zero(T* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = 0;
}

template <int kForWriting, class T>
void prefetch_row(const T* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, kForWriting, 2);
}

// ---- activations -----------------------------------------------------------------------------------------------

template <class T>
inline __attribute__((always_inline)) Vector<T> activated(Activation activation, T alpha, Vector<T> x) {
  switch (activation) {
    case Activation::identity: return x;
    case Activation::relu: return Relu::value<T>(x);
    case Activation::leaky_relu: return x > T(0) ? x : alpha * x;
    case Activation::elu: return x > T(0) ? x : alpha * expm1<T>(x);
    case Activation::sigmoid: return Sigmoid::value<T>(x);
    case Activation::tanh: return Tanh::value<T>(x);
  }
  __builtin_unreachable();
}

// `count` numbers that lie `step` apart
template <class T>
void activate_row(Activation activation, T alpha, T* row, int64_t step, int64_t count) {
  constexpr int64_t kWide = kWidth<T>;
  int64_t i = 0;
  if (step == 1)
    for (; i + kWide <= count; i += kWide) store_vector(activated<T>(activation, alpha, load<Vector<T>>(row + i)), row + i);
  for (; i < count; i += kWide) {
    const int64_t left = count - i < kWide ? count - i : kWide;
    T some[kWide] = {};
    for (int64_t j = 0; j < left; ++j) some[j] = row[(i + j) * step];
    store_vector(activated<T>(activation, alpha, load<Vector<T>>(some)), some);
    for (int64_t j = 0; j < left; ++j) row[(i + j) * step] = some[j];
  }
}

// ---- one worker ------------------------------------------------------------------------------------------------

constexpr int kMaxTerms = 1024;  // of a row of z: components of an irrep times harmonics

template <class T>
struct Worker {
  const Params& p;
  const Header& h;
  const Tile& tile;
  T *raw, *hat, *planes, *u, *z, *y, *rows, *transposed;
  T* grad_packed;
  int64_t image, conv_group, q[kAxes], valid[kAxes];  // of the task: where its tile begins, how much of it there is
  const ResolvedPhase* phase;
  WindowRow* window_rows;      // of the task's tile, those that lie in the image
  int64_t num_window_rows, window_step;
  T no_bias[kMaxTerms] = {};
  int64_t vectors_at[kMaxPixels / kWidth<T>];  // where the vectors of the tile's pixels begin in the window

  explicit Worker(const Params& p)
      : p(p), h(*reinterpret_cast<const Header*>(p.index)), tile(p.tile) {
    T* scratch = reinterpret_cast<T*>(p.scratch);
    set_zero(scratch + p.raw_start, p.u_start - p.raw_start);  // what is read beyond a row must be finite
    raw = scratch + p.raw_start, hat = scratch + p.hat_start, planes = scratch + p.planes_start;
    u = scratch + p.u_start, z = scratch + p.z_start, y = scratch + p.y_start;
    rows = scratch + p.rows_start, transposed = scratch + p.transposed_start;
    window_rows = reinterpret_cast<WindowRow*>(scratch + p.window_rows_start);
    int64_t* at = vectors_at;
    for (int64_t r = 0; r < tile.runs; ++r) {
      const int64_t middles = tile.runs > tile.size[0] ? tile.size[1] : 1;  // runs with the same outer position
      const int64_t start = (r / middles * tile.window[1] + r % middles) * tile.pitch;
      for (int64_t i = 0; i < tile.run; i += kWidth<T>) *at++ = start + i;
    }
  }

  template <class R> const R* record(int64_t start) const { return reinterpret_cast<const R*>(p.index + start); }
  const T* values(int64_t start) const { return static_cast<const T*>(p.values) + start; }

  void run(int64_t task) {
    begin(task);
    if (p.companion) load_companion();
    if (p.target)
      for (int64_t g = 0; g < p.num_groups; ++g) set_zero(y + p.groups[g].y_start, p.groups[g].height * p.groups[g].row);
    const Source* sources = record<Source>(h.sources_start);
    int64_t done = 0;
    for (int64_t s = 0; s < p.num_sources; ++s)
      for (int64_t first = 0; first < sources[s].fields; first += p.chunk[s]) {
        const int64_t left = sources[s].fields - first, fields = left < p.chunk[s] ? left : p.chunk[s];
        for (int64_t f = 0; f < fields; ++f) {
          if (p.target) prefetch_target(done++);
          field(sources[s], first + f, f);
        }
        mix(sources[s], s, first, fields);
      }
    if (p.target) store();
  }

  void begin(int64_t task) {
    phase = p.phases;
    while (task >= phase->tasks) task -= phase++->tasks;
    for (int a = kAxes - 1; a >= 0; --a) {
      const int64_t number = task % phase->tiles[a], start = number * tile.size[a];
      task /= phase->tiles[a];
      q[a] = phase->first[a] + start;
      valid[a] = phase->count[a] - start < tile.size[a] ? phase->count[a] - start : tile.size[a];
    }
    conv_group = task % p.conv_groups;
    image = task / p.conv_groups;
    find_window_rows();
    set_zero(raw, p.planes_start - p.raw_start);  // what of the windows lies outside the image stays so
  }

  // ---- the source ----

  static int64_t numbers(const int64_t (&size)[kAxes]) { return size[0] * size[1] * size[2]; }

  const T* channel(const void* tensor, int64_t channels, const int64_t (&size)[kAxes], int64_t number) const {
    const int64_t at = image * channels + conv_group * (channels / p.conv_groups) + number;
    return static_cast<const T*>(tensor) + at * numbers(size);
  }

  // What the tile's pixels read of the source along an axis: [base, end), in steps.
  struct Window {
    int64_t base, end, step;
  };

  Window window(int a) const {
    const int64_t step = p.up ? 1 : p.stride[a], reach = p.up ? phase->shift[a] : p.reach[a];
    const int64_t base = p.up ? q[a] - reach : q[a] * step - p.padding[a];
    return {base, clamp(base + (valid[a] - 1) * step + reach + 1, p.source_size[a]), step};
  }

  // The rows of a component, [inner phase, outer phase, middle phase, *window], as far as they lie in the image.
  void find_window_rows() {
    const Window outer = window(0), middle = window(1), inner = window(2);
    const auto& size = p.source_size;
    int64_t row = 0;
    num_window_rows = 0, window_step = inner.step;
    for (int64_t pi = 0; pi < p.source_phases[2]; ++pi) {
      const int64_t start = inner.base + pi, step = inner.step;
      const int64_t first = clamp(start < 0 ? (-start + step - 1) / step : 0, tile.window[2]);
      const int64_t last = clamp(start < inner.end ? (inner.end - start + step - 1) / step : 0, tile.window[2]);
      for (int64_t po = 0; po < p.source_phases[0]; ++po)
        for (int64_t pm = 0; pm < p.source_phases[1]; ++pm)
          for (int64_t o = 0; o < tile.window[0]; ++o)
            for (int64_t m = 0; m < tile.window[1]; ++m, row += tile.window[2]) {
              const int64_t at_o = outer.base + o * outer.step + po, at_m = middle.base + m * middle.step + pm;
              if (at_o < 0 || at_o >= outer.end || at_m < 0 || at_m >= middle.end || first >= last) continue;
              const int64_t from = (at_o * size[1] + at_m) * size[2] + start + first * step;
              window_rows[num_window_rows++] = {row + first, from, last - first};
            }
    }
  }

  template <class F>
  void each_window_row(F f) const {
    for (int64_t r = 0; r < num_window_rows; ++r) f(window_rows[r]);
  }

  // The window of one channel, zero outside the image.
  void gather(const T* from, T* to) const {
    if (window_step == 1)
      return each_window_row([&](const WindowRow& row) { copy_row(from + row.from, row.count, to + row.to); });
    each_window_row([&](const WindowRow& row) {
      for (int64_t i = 0; i < row.count; ++i) to[row.to + i] = from[row.from + i * window_step];
    });
  }

  // x^ = A x in the window of a field, into `hat`: straight from the image where its rows are as long as vectors.
  void load_source(const Source& source, int64_t first) const {
    const Matrix<T> transform{values(source.transform_start), source.size, 1};
    const T* from = channel(p.source, p.source_channels, p.source_size, first);
    const int64_t channel_size = numbers(p.source_size);
    const Window inner = window(2);
    if (inner.step == 1 && clamp(inner.end - inner.base, inner.end) >= kWidth<T>)
      return transform_window_rows(transform, Rows<const T>{from, channel_size}, Rows<T>{hat, tile.component}, source.size);
    for (int64_t i = 0; i < source.size; ++i) gather(from + i * channel_size, raw + i * tile.component);
    multiply<T>(transform, Rows<const T>{raw, tile.component}, Rows<T>{hat, tile.component}, source.size, source.size, tile.component);
  }

  // Rows of one vector each are taken two by two.
  void transform_window_rows(const Matrix<T>& transform, const Rows<const T>& in, const Rows<T>& out, int64_t size) const {
    const WindowRow* end = window_rows + num_window_rows;
    for (const WindowRow* row = window_rows; row < end; ++row) {
      const Rows<const T> from{in.data + row->from, in.stride};
      const Rows<T> to{out.data + row->to, out.stride};
      if (row + 1 < end && row->count == kWidth<T> && row[1].count == kWidth<T>) {
        multiply_columns<2>(transform, from, {row[1].from - row->from, row[1].to - row->to}, to, Assign{}, 0, size, size);
        ++row;
      } else {
        multiply<T>(transform, from, to, size, size, row->count);
      }
    }
  }

  // Asks for what gather() will read of a channel.
  void prefetch_window(const T* from) const {
    each_window_row([&](const WindowRow& row) { prefetch_row<0>(from + row.from, row.count * window_step); });
  }

  static int64_t clamp(int64_t value, int64_t most) { return value < most ? value : most; }

  // z of one field, which is number `place` of those that are taken together
  void field(const Source& source, int64_t number, int64_t place) {
    const int64_t first = p.index[source.channels_start + number];
    const bool is_irreps = source.transform_start < 0;
    const int64_t next = number + 1 < source.fields ? p.index[source.channels_start + number + 1] : -1;
    if (!is_irreps) load_source(source, first);
    const Slot* slots = record<Slot>(source.slots_start);
    for (int64_t s = 0; s < source.slots; ++s) {
      const Slot& slot = slots[s];
      for (int64_t b = 0; b < slot.size; ++b) {
        if (next >= 0) prefetch_window(channel(p.source, p.source_channels, p.source_size, next + slot.component + b));
        if (is_irreps) gather(channel(p.source, p.source_channels, p.source_size, first + slot.component + b), hat);
        make_planes(is_irreps ? hat : hat + (slot.component + b) * tile.component);
        harmonics(source, slot, b, place);
      }
      combine_rows(source, slot, place);
    }
  }

  T* z_row(const Source& source, const Row& row, int64_t place) const {
    const ResolvedGroup& group = p.groups[row.group];
    const int64_t k = place * p.index[source.depth_start + row.group] + row.k;
    return z + group.z_start + k * group.row + row.component * tile.pixels;
  }

  T* u_row(int64_t b, int64_t harmonic) const { return u + (b * h.harmonics + harmonic) * (tile.pixels + 16); }

  void harmonics(const Source& source, const Slot& slot, int64_t b, int64_t place) {
    const int32_t* uses = p.index + slot.uses_start + b * h.harmonics;
    const Row* slot_rows = record<Row>(slot.rows_start);
    for (int64_t c = 0; c < phase->classes; ++c) {
      const ResolvedClass& resolved = p.classes[phase->classes_first + c];
      const Class& record = *resolved.record;
      T* out[kMaxEven + kMaxOdd];
      bool used = false;
      for (int64_t i = 0; i < record.even + record.odd; ++i) {
        const int32_t harmonic = p.index[record.harmonics_start + i], use = uses[harmonic];
        out[i] = use >= 0 ? z_row(source, slot_rows[use], place) : u_row(b, harmonic);
        used |= use != kUnused;
      }
      if (!used) continue;
      const HarmonicsCall<T> call{p.positions + resolved.first, resolved.counts, values(record.coefficients_start), planes,
                                  vectors_at, tile.pixels / kWidth<T>, out, record.even, record.odd};
      record.middle_odd ? select_even<kMaxEven, true>(call) : select_even<kMaxEven, false>(call);
    }
  }

  // From a component: for each single tap along the inner axis what it sees; for each pair the sum and the difference.
  void make_planes(const T* component) {
    if (phase->single != 1) return make_planes_of<-1>(component);
    switch (phase->pairs) {
      case 1: return make_planes_of<1>(component);
      case 2: return make_planes_of<2>(component);
      case 3: return make_planes_of<3>(component);
      default: return make_planes_of<-1>(component);
    }
  }

  // kPairs: their number where there is one single tap; -1: any numbers of both
  template <int kPairs>
  void make_planes_of(const T* component) {
    using V = Vector<T>;
    const int64_t single = kPairs < 0 ? phase->single : 1, pairs = kPairs < 0 ? phase->pairs : kPairs;
    const int64_t step = tile.window[2], row = tile.row, *pair_at = phase->taps_at + single;
    T* const plane_of_pairs = planes + single * tile.plane;
    for (int64_t r = 0; r < tile.plane_rows; ++r)
      for (int64_t i = 0; i < row; i += kWidth<T>) {
        const T* from = component + r * step + i;
        const int64_t to = r * row + i;
        for (int64_t t = 0; t < single; ++t) store_vector(load<V>(from + phase->taps_at[t]), planes + t * tile.plane + to);
        for (int64_t t = 0; t < pairs; ++t) {
          const V here = load<V>(from + pair_at[2 * t]), mirrored = load<V>(from + pair_at[2 * t + 1]);
          store_vector(here + mirrored, plane_of_pairs + 2 * t * tile.plane + to);
          store_vector(here - mirrored, plane_of_pairs + (2 * t + 1) * tile.plane + to);
        }
      }
  }

  void combine_rows(const Source& source, const Slot& slot, int64_t place) {
    const Row* slot_rows = record<Row>(slot.rows_start);
    const T* in[kMaxTerms];
    for (int64_t r = 0; r < slot.rows; ++r) {
      const Row& row = slot_rows[r];
      const int32_t* terms = p.index + row.terms_start;
      for (int64_t t = 0; t < row.terms; ++t) in[t] = u_row(terms[2 * t], terms[2 * t + 1]);
      combine(in, values(row.coefficients_start), row.terms, z_row(source, row, place), tile.pixels);
    }
  }

  // ---- the matrix products ----

  void mix(const Source& source, int64_t s, int64_t first, int64_t fields) {
    for (int64_t g = 0; g < p.num_groups; ++g) {
      const ResolvedGroup& group = p.groups[g];
      const int64_t depth = p.index[source.depth_start + g], k = p.k_start[s * p.num_groups + g] + first * depth;
      const int64_t rows = fields * depth;
      if (rows == 0) continue;
      const int64_t at = group.weights_start + k * group.weight_rows * group.pitch + conv_group * p.packed_size;
      T* const z_rows = z + group.z_start;
      if (p.target) multiply_add_weights(group, static_cast<const T*>(p.packed) + at, z_rows, rows);
      if (p.companion) add_gradient(group, z_rows, rows, grad_packed + at);
    }
  }

  // y^ += W z
  void multiply_add_weights(const ResolvedGroup& group, const T* weights, const T* z_rows, int64_t depth) const {
    T* const y_rows = y + group.y_start;
    if (group.complex)
      multiply_add_complex(weights, group.pitch, ComplexRows<const T>{z_rows, group.row, tile.pixels},
                           ComplexRows<T>{y_rows, group.row, tile.pixels}, group.height, depth, tile.pixels);
    else
      multiply_add<T>({weights, 1, group.pitch}, Rows<const T>{z_rows, group.row}, Rows<T>{y_rows, group.row}, group.height, depth,
                      group.components * tile.pixels);
  }

  // grad W += z g^T; of a complex W, each of its rows from another part of z and of g
  void add_gradient(const ResolvedGroup& group, T* z_rows, int64_t depth, T* grad) const {
    const int64_t pixels = tile.pixels, pitch = group.pitch;
    const T* const g = transposed + group.transposed_start;
    if (!group.complex)
      return multiply_add<T>({z_rows, group.row, 1}, Rows<const T>{g, pitch}, Rows<T>{grad, pitch}, depth, group.components * pixels, pitch);
    for (int64_t k = 0; k < depth; ++k) {
      T* const row = z_rows + k * group.row;
      add_parts(row, row + pixels, row + 2 * pixels, pixels);
    }
    const int64_t of_z[kComplexRows] = {2, 0, 1}, of_g[kComplexRows] = {2, 1, 0};
    for (int row = 0; row < kComplexRows; ++row)
      multiply_add<T>({z_rows + of_z[row] * pixels, group.row, 1}, Rows<const T>{g + of_g[row] * pixels * pitch, pitch},
                      Rows<T>{grad + row * pitch, kComplexRows * pitch}, depth, pixels, pitch);
  }

  // ---- the target ----

  T* place_row(const Target& target, int64_t t, int64_t field, int64_t component) const {
    const int32_t* place = p.index + target.places_start + 3 * component;
    const ResolvedGroup& group = p.groups[place[0]];
    const int64_t height = p.index[target.height_start + place[0]];
    const int64_t m = p.m_start[t * p.num_groups + place[0]] + field * height + place[1];
    return y + group.y_start + m * group.row + place[2] * tile.pixels;
  }

  // The tile's pixels whose positions in the target lie before some end: where they begin, and how many there are.
  struct Part {
    int64_t at[kAxes], step[kAxes], count[kAxes];
    bool in_vectors() const { return step[2] == 1 && count[2] >= kWidth<T>; }  // its rows
    bool is_all_of(const Tile& tile) const { return count[0] * count[1] * count[2] == tile.pixels; }
  };

  Part part(const int64_t (&end)[kAxes]) const {
    Part found;
    for (int a = 0; a < kAxes; ++a) {
      const int64_t step = p.up ? p.stride[a] : 1, at = q[a] * step + phase->target_offset[a];
      found.step[a] = step, found.at[a] = at;
      found.count[a] = clamp(end[a] > at ? (end[a] - at + step - 1) / step : 0, valid[a]);
    }
    return found;
  }

  // f(pixel, element of the target's channel, step between its elements, their number) for each row of the part; rows
  // that follow one another both in the tile and in the image are one
  template <class F>
  void each_row(const Part& part, F f) const {
    const auto &size = p.target_size, &at = part.at, &step = part.step;
    const bool join = step[1] == 1 && step[2] == 1 && part.count[2] == size[2] && tile.middle == size[2];
    const int64_t joined = join ? part.count[1] : 1;
    for (int64_t o = 0; o < part.count[0]; ++o)
      for (int64_t m = 0; m < part.count[1]; m += joined)
        f(o * tile.outer + m * tile.middle, ((at[0] + o * step[0]) * size[1] + at[1] + m * step[1]) * size[2] + at[2],
          step[2], joined * part.count[2]);
  }

  template <int kForWriting>
  void prefetch_channel(const void* tensor, int64_t number) const {
    const T* from = channel(tensor, p.target_channels, p.target_size, number);
    each_row(part(p.target_size), [&](int64_t, int64_t at, int64_t step, int64_t count) { prefetch_row<kForWriting>(from + at, count * step); });
  }

  // Asks for the part of the target's tile that comes with one of the source's fields.
  void prefetch_target(int64_t part) const {
    const int64_t channels = p.target_channels / p.conv_groups;
    for (int64_t c = channels * part / p.source_fields; c < channels * (part + 1) / p.source_fields; ++c)
      prefetch_channel<1>(p.target, c);
  }

  // f(target, rows of y^ of its components, first channel, first channel of the next field or -1) for each field
  template <class F>
  void each_target_field(F f) {
    const Target* targets = record<Target>(h.targets_start);
    for (int64_t t = 0; t < p.num_targets; ++t)
      for (int64_t i = 0; i < targets[t].fields; ++i) {
        T* places[kMaxTerms];
        for (int64_t c = 0; c < targets[t].size; ++c) places[c] = place_row(targets[t], t, i, c);
        const int32_t* channels = p.index + targets[t].channels_start + i;
        f(targets[t], places, channels[0], i + 1 < targets[t].fields ? channels[1] : -1);
      }
  }

  // y = activation(A' y^ + bias): straight to the image where its rows are as long as vectors.
  void store() {
    const Part part = this->part(p.target_size);
    const int64_t channel_size = numbers(p.target_size);
    each_target_field([&](const Target& target, T** y_hat, int64_t first, int64_t) {
      const Matrix<T> transform{values(target.transform_start), target.size, 1};
      const T* bias = p.bias ? static_cast<const T*>(p.bias) + conv_group * (p.target_channels / p.conv_groups) + first : no_bias;
      T* to = const_cast<T*>(channel(p.target, p.target_channels, p.target_size, first));
      if (target.transform_start < 0) {
        for (int64_t i = 0; i < target.size; ++i) store_channel(part, y_hat[i], bias[i], to + i * channel_size, target.adds);
      } else if (part.in_vectors() && !target.adds) {
        each_row(part, [&](int64_t pixel, int64_t at, int64_t, int64_t count) {
          multiply<T>(transform, ScatteredRows<T>{y_hat, pixel}, Rows<T>{to + at, channel_size}, target.size, target.size, count,
                      AssignWithBias<T>{bias});
        });
      } else {
        multiply<T>(transform, ScatteredRows<T>{y_hat, 0}, Rows<T>{rows, tile.pixels}, target.size, target.size, tile.pixels,
                    AssignWithBias<T>{no_bias});
        for (int64_t i = 0; i < target.size; ++i)
          store_channel(part, rows + i * tile.pixels, bias[i], to + i * channel_size, target.adds);
      }
      if (p.activation == Activation::identity || is_added_to(target)) return;
      for (int64_t i = 0; i < target.size; ++i)
        each_row(part, [&](int64_t, int64_t at, int64_t step, int64_t count) {
          activate_row(p.activation, T(p.alpha), to + i * channel_size + at, step, count);
        });
    });
  }

  // Whether a later target has the same fields.
  bool is_added_to(const Target& target) const {
    const Target* end = record<Target>(h.targets_start) + p.num_targets;
    for (const Target* later = &target + 1; later < end; ++later)
      if (later->adds && p.index[later->channels_start] == p.index[target.channels_start]) return true;
    return false;
  }

  void store_channel(const Part& part, const T* from, T bias, T* to, bool adds) const {
    each_row(part, [&](int64_t pixel, int64_t at, int64_t step, int64_t count) {
      if (adds)
        for (int64_t i = 0; i < count; ++i) to[at + i * step] += from[pixel + i];
      else if (step == 1)
        map_row([bias](auto v) { return v + bias; }, from + pixel, count, to + at);
      else
        for (int64_t i = 0; i < count; ++i) to[at + i * step] = from[pixel + i] + bias;
    });
  }

  // g^ = A'^T g, then transposed for the product with z. Zero where a run holds pixels that are not the tile's, and where
  // z is zero since no tap reaches: whatever is there, NaN too, has no part in the gradient.
  void load_companion() {
    const Part part = this->part(p.target_reached);
    const int64_t channel_size = numbers(p.target_size);
    each_target_field([&](const Target& target, T** g_hat, int64_t first, int64_t next) {
      const Matrix<T> transposed{values(target.transform_start), 1, target.size};
      const T* from = channel(p.companion, p.target_channels, p.target_size, first);
      if (next >= 0)
        for (int64_t i = 0; i < target.size; ++i) prefetch_channel<0>(p.companion, next + i);
      const bool is_irreps = target.transform_start < 0, straight = !is_irreps && part.in_vectors();
      for (int64_t i = 0; i < target.size; ++i) {
        T* row = is_irreps || straight ? g_hat[i] : rows + i * tile.pixels;
        if (!part.is_all_of(tile)) set_zero(row, tile.pixels);
        if (!straight) load_channel(part, from + i * channel_size, row);
      }
      if (straight)
        each_row(part, [&](int64_t pixel, int64_t at, int64_t, int64_t count) {
          multiply<T>(transposed, Rows<const T>{from + at, channel_size}, ScatteredRows<T>{g_hat, pixel}, target.size,
                      target.size, count);
        });
      else if (!is_irreps)
        multiply<T>(transposed, Rows<const T>{rows, tile.pixels}, ScatteredRows<T>{g_hat, 0}, target.size, target.size, tile.pixels);
    });
    for (int64_t g = 0; g < p.num_groups; ++g) transpose(p.groups[g]);
  }

  void load_channel(const Part& part, const T* from, T* to) const {
    each_row(part, [&](int64_t pixel, int64_t at, int64_t step, int64_t count) {
      if (step == 1) return copy_row(from + at, count, to + pixel);
      for (int64_t i = 0; i < count; ++i) to[pixel + i] = from[at + i * step];
    });
  }

  void transpose(const ResolvedGroup& group) {
    constexpr int kWide = kWidth<T>;
    const T* zero = raw;  // not yet in use
    set_zero(raw, kWide);
    if (group.complex)
      for (int64_t m = 0; m < group.height; ++m) {
        T* const row = y + group.y_start + m * group.row;
        add_parts(row, row + tile.pixels, row + 2 * tile.pixels, tile.pixels);
      }
    for (int64_t m = 0; m < group.pitch; m += kWide)
      for (int64_t n = 0; n < group.parts * tile.pixels; n += kWide) {
        const T* in[kWide];
        for (int64_t i = 0; i < kWide; ++i) in[i] = m + i < group.height ? y + group.y_start + (m + i) * group.row + n : zero;
        transpose_square<Vector<T>>(in, 0, transposed + group.transposed_start + n * group.pitch + m, group.pitch);
      }
  }
};

// ---- threads ---------------------------------------------------------------------------------------------------

// Threads take slots as they go. Each slot always has the same tasks, so that sums depend on the number of slots only.
template <class T>
void run_slots(const Params& p) {
  Worker<T> worker(p);
  const auto take = [&] { return __atomic_fetch_add(p.next_slot, 1, __ATOMIC_RELAXED); };
  for (int64_t slot = take(); slot < p.slots; slot = take()) {
    worker.grad_packed = static_cast<T*>(p.grad_packed) + slot * p.conv_groups * p.packed_size;
    for (int64_t task = p.tasks * slot / p.slots; task < p.tasks * (slot + 1) / p.slots; ++task) worker.run(task);
  }
}

}  // namespace

// One thread's part. How many threads there are does not matter: they share the slots.
void steerable_conv(const Params& p, int64_t, int64_t) {
  p.dtype == DType::f64 ? run_slots<double>(p) : run_slots<float>(p);
}

void steerable_conv_pack(const Params& p, int64_t begin, int64_t end) {
  p.dtype == DType::f64 ? pack<double>(p, begin, end) : pack<float>(p, begin, end);
}

void steerable_conv_unpack(const Params& p, int64_t begin, int64_t end) {
  p.dtype == DType::f64 ? unpack<double>(p, begin, end) : unpack<float>(p, begin, end);
}

}  // namespace equiconv::EQUICONV_ISA
