// The matrices of a call of steerable_conv, how it is cut into tiles, and where everything lies in a worker's scratch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "../steerable_conv.h"

namespace equiconv::steerable {

constexpr int64_t kWholeVectors = 16;                  // numbers; a multiple of every vector's width
constexpr int64_t kScratchNumbers = 320 << 10;         // of a worker, if the layer allows: the greater part of an L2 cache
constexpr int64_t kSlotsPerThread = 2;
constexpr int64_t kChunkDepth = 64;                    // k's of a group that are worth a matrix product

inline int64_t whole(int64_t numbers) { return (numbers + kWholeVectors - 1) / kWholeVectors * kWholeVectors; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// The matrices W: what Params needs to pack and unpack weights. Holds the arrays behind its pointers; must outlive them.
class Matrices {
 public:
  // p: index, conv_groups
  explicit Matrices(Params& p) : p_(p), h_(*record<Header>(0)) {
    find_groups();
    p.num_groups = h_.groups, p.num_sources = h_.sources, p.num_targets = h_.targets;
    p.groups = groups_.data(), p.k_start = k_start_.data(), p.m_start = m_start_.data();
  }
  Matrices(const Matrices&) = delete;

  // Tasks of packing: the fields of the source in all blocks and groups of the convolution.
  int64_t block_fields() const {
    int64_t fields = 0;
    for (int64_t b = 0; b < h_.blocks; ++b) fields += record<Source>(h_.sources_start)[record<Block>(h_.blocks_start)[b].source].fields;
    return fields * p_.conv_groups;
  }

 protected:
  template <class R> const R* record(int64_t start) const { return reinterpret_cast<const R*>(p_.index + start); }

  Params& p_;
  const Header& h_;
  std::vector<ResolvedGroup> groups_;
  std::vector<int64_t> k_start_, m_start_;

 private:
  void find_groups() {
    const Source* sources = record<Source>(h_.sources_start);
    const Target* targets = record<Target>(h_.targets_start);
    for (int64_t g = 0; g < h_.groups; ++g) {
      ResolvedGroup group{};
      const Group& record = this->record<Group>(h_.groups_start)[g];
      group.components = record.components, group.complex = record.complex;
      group.weight_rows = group.complex ? kComplexRows : 1, group.parts = group.components + (group.complex && p_.companion);
      for (int64_t t = 0; t < h_.targets; ++t) group.height += targets[t].fields * p_.index[targets[t].height_start + g];
      for (int64_t s = 0; s < h_.sources; ++s) group.depth += sources[s].fields * p_.index[sources[s].depth_start + g];
      group.pitch = whole(group.height);
      group.weights_start = p_.packed_size;
      p_.packed_size += group.depth * group.weight_rows * group.pitch;
      groups_.push_back(group);
    }
    for (int64_t s = 0, size = h_.groups; s < h_.sources; ++s)
      for (int64_t g = 0; g < size; ++g)
        k_start_.push_back(s == 0 ? 0 : k_start_[(s - 1) * size + g] + sources[s - 1].fields * p_.index[sources[s - 1].depth_start + g]);
    for (int64_t t = 0, size = h_.groups; t < h_.targets; ++t)
      for (int64_t g = 0; g < size; ++g)
        m_start_.push_back(t == 0 ? 0 : m_start_[(t - 1) * size + g] + targets[t - 1].fields * p_.index[targets[t - 1].height_start + g]);
  }
};

// All of a call.
class Layout : public Matrices {
 public:
  // p: everything but what this fills in: tile, groups, chunks, phases and their tables, places in the scratch, sizes
  Layout(Params& p, const int64_t (&kernel)[kAxes], const int64_t (&dilation)[kAxes], int64_t threads)
      : Matrices(p), kernel_(kernel), dilation_(dilation) {
    find_chunks();
    find_phases();
    choose_tile(threads);
    resolve();
    place_scratch();
    p.chunk = chunk_.data(), p.phases = phases_.data(), p.classes = classes_.data(), p.positions = positions_.data();
    p.slots = p.companion ? std::min(kSlotsPerThread * threads, p.tasks) : p.tasks;  // each sums its own gradient
  }

 private:
  void find_chunks() {
    const Source* sources = record<Source>(h_.sources_start);
    for (int64_t s = 0; s < h_.sources; ++s) {
      p_.source_fields += sources[s].fields;
      int64_t depth = 1;
      for (int64_t g = 0; g < h_.groups; ++g) depth = std::max<int64_t>(depth, p_.index[sources[s].depth_start + g] * (groups_[g].complex ? 2 : 1));
      chunk_.push_back(std::min<int64_t>(sources[s].fields, ceil_div(kChunkDepth, depth)));
    }
  }

  // Which of the target's positions each phase computes.
  void find_phases() {
    for (int a = 0; a < kAxes; ++a) p_.reach[a] = (kernel_[a] - 1) * dilation_[a];
    const Phase* records = record<Phase>(h_.phases_start);
    for (int64_t i = 0; i < h_.phases; ++i) {
      const int64_t residue[kAxes] = {records[i].outer, records[i].middle, records[i].inner};
      ResolvedPhase phase{};
      for (int a = 0; a < kAxes; ++a) {
        const int64_t last = p_.target_size[a] - 1, s = p_.stride[a];
        if (p_.up) {  // p = s q + residue - padding, where 0 <= p <= last
          phase.target_offset[a] = residue[a] - p_.padding[a];
          phase.first[a] = -floor_div(phase.target_offset[a], s);
          phase.count[a] = std::max<int64_t>(0, floor_div(last - phase.target_offset[a], s) - phase.first[a] + 1);
          phase.shift[a] = std::max<int64_t>(0, floor_div(p_.reach[a] - residue[a], s));
        } else {
          phase.count[a] = last + 1;
        }
      }
      phases_.push_back(phase);
    }
    for (int a = 0; a < kAxes; ++a) {
      p_.source_phases[a] = p_.up ? 1 : std::min(p_.stride[a], p_.reach[a] + 1);
      const int64_t last = p_.stride[a] * (p_.source_size[a] - 1) + p_.reach[a] - p_.padding[a];
      p_.target_reached[a] = p_.up ? std::min(p_.target_size[a], last + 1) : p_.target_size[a];
    }
  }

  // Positions of the source, beyond the tile's own, that a tile sees of one phase.
  int64_t halo(int a) const {
    int64_t most = 0;
    for (const ResolvedPhase& phase : phases_) most = std::max(most, phase.shift[a]);
    return p_.up ? most : p_.reach[a] / p_.stride[a];
  }

  // The three ways to lay out the pixels of a tile: rows of pixels, planes, or the whole tile as one run.
  void shape(const int64_t (&size)[kAxes], int way, Tile& tile) const {
    std::copy(size, size + kAxes, tile.size);
    int64_t phases = 1;
    for (int a = 0; a < kAxes; ++a) tile.window[a] = size[a] + halo(a), phases *= p_.source_phases[a];
    const int64_t window_rows = tile.window[0] * tile.window[1], plane_phases = p_.source_phases[0] * p_.source_phases[1];
    tile.component = whole(window_rows * tile.window[2] * phases);
    const int64_t in_plane = (size[1] - 1) * tile.window[2] + size[2];
    if (way == 0) {
      tile.runs = size[0] * size[1], tile.run = whole(size[2]);
      tile.middle = tile.run, tile.outer = size[1] * tile.run;
    } else if (way == 1) {
      tile.runs = size[0], tile.run = whole(in_plane);
      tile.middle = tile.window[2], tile.outer = tile.run;
    } else {
      tile.runs = 1, tile.run = whole((size[0] - 1) * tile.window[1] * tile.window[2] + in_plane);
      tile.middle = tile.window[2], tile.outer = tile.window[1] * tile.window[2];
    }
    tile.pitch = way == 0 ? tile.run : tile.window[2];
    tile.plane_rows = way == 0 ? window_rows * plane_phases : 1;
    tile.row = way == 0 ? tile.run : whole(window_rows * tile.window[2] * plane_phases);
    tile.plane = tile.plane_rows * tile.row;
    tile.pixels = tile.runs * tile.run;
  }

  void choose_tile(int64_t threads) {
    int64_t extent[kAxes] = {1, 1, 1}, images = p_.batch * p_.conv_groups;
    for (const ResolvedPhase& phase : phases_)
      for (int a = 0; a < kAxes; ++a) extent[a] = std::max(extent[a], phase.count[a]);
    double best = std::numeric_limits<double>::infinity();
    const double per_pixel = multiplications_per_pixel(), per_position = multiplications_per_position();
    for (int64_t outer = extent[0]; outer >= 1; outer = next_size(outer, extent[0]))
      for (int64_t middle = extent[1]; middle >= 1; middle = next_size(middle, extent[1]))
        for (int64_t parts = 1; parts <= ceil_div(extent[2], kWholeVectors); ++parts)
          for (int way = 0; way < 3; ++way) {
            const int64_t size[kAxes] = {outer, middle, ceil_div(extent[2], parts)};
            Tile tile{};
            shape(size, way, tile);
            const bool fits = tile.pixels <= kMaxPixels && scratch_numbers(tile) <= kScratchNumbers;
            const bool smallest = outer == 1 && middle == 1 && size[2] <= kWholeVectors;
            if (!fits && !smallest) continue;
            int64_t tasks = 0;
            for (const ResolvedPhase& phase : phases_)
              tasks += images * ceil_div(phase.count[0], size[0]) * ceil_div(phase.count[1], size[1]) * ceil_div(phase.count[2], size[2]);
            const double positions = double(tile.component) / tile.window[2] * whole(tile.window[2]);  // row by row, in vectors
            const double each = tile.pixels * per_pixel + positions * per_position;
            const double cost = double(ceil_div(tasks, threads)) * (each + kTaskCost) + (fits ? 0 : 1e30);
            if (cost < best) best = cost, p_.tile = tile;
          }
    p_.tasks = 0;
    for (ResolvedPhase& phase : phases_) {
      phase.tasks = images;
      for (int a = 0; a < kAxes; ++a) phase.tiles[a] = ceil_div(phase.count[a], p_.tile.size[a]), phase.tasks *= phase.tiles[a];
      p_.tasks += phase.tasks;
    }
  }

  static constexpr double kTaskCost = 50000;  // multiplications that beginning a tile costs, roughly

  // The next smaller size that cuts an axis into equal parts; 0 after 1.
  static int64_t next_size(int64_t size, int64_t extent) {
    return size > 1 ? std::min(size - 1, ceil_div(extent, ceil_div(extent, size) + 1)) : 0;
  }

  double multiplications_per_pixel() const {
    double mixing = 0, combining = 0;
    for (const ResolvedGroup& group : groups_)
      mixing += double(group.depth) * group.pitch * (group.complex ? group.weight_rows : group.components), combining += 4. * group.depth * group.components;
    return mixing + combining + 4. * h_.harmonics * source_channels();
  }
  double multiplications_per_position() const {
    const Source* sources = record<Source>(h_.sources_start);
    double transforms = 0;
    for (int64_t s = 0; s < h_.sources; ++s) transforms += double(sources[s].fields) * sources[s].size * (sources[s].transform_start >= 0 ? sources[s].size : 0);
    return transforms + (4. + kernel_[2]) * source_channels();
  }
  double source_channels() const { return double(p_.source_channels) / p_.conv_groups; }

  // ---- places in the scratch ----

  struct Sizes {
    int64_t window_rows, raw, planes, u, z, y, rows, transposed;
  };
  Sizes sizes(const Tile& tile) const {
    const Source* sources = record<Source>(h_.sources_start);
    const Target* targets = record<Target>(h_.targets_start);
    Sizes needed{};
    int64_t planes = 0, source_size = 1, target_size = 1, slot_size = 1;
    for (int64_t i = 0; i < h_.phases; ++i) {
      const Phase& phase = record<Phase>(h_.phases_start)[i];
      planes = std::max<int64_t>(planes, phase.single + 2 * phase.pairs);
    }
    for (int64_t s = 0; s < h_.sources; ++s) {
      source_size = std::max<int64_t>(source_size, sources[s].size);
      for (int64_t i = 0; i < sources[s].slots; ++i) slot_size = std::max<int64_t>(slot_size, record<Slot>(sources[s].slots_start)[i].size);
    }
    for (int64_t t = 0; t < h_.targets; ++t) target_size = std::max<int64_t>(target_size, targets[t].size);
    needed.window_rows = tile.component / tile.window[2] * int64_t(sizeof(WindowRow) / sizeof(float));
    needed.raw = source_size * tile.component + kSlack + tile.plane;
    needed.planes = (planes + 1) * tile.plane + kSlack;
    needed.u = slot_size * h_.harmonics * (tile.pixels + 16);
    for (int64_t g = 0; g < h_.groups; ++g) {
      const int64_t row = groups_[g].parts * tile.pixels + kWholeVectors;
      needed.z += chunk_depth(g) * row;
      needed.y += groups_[g].height * row;
      if (p_.companion) needed.transposed += groups_[g].parts * tile.pixels * groups_[g].pitch;
    }
    needed.rows = target_size * tile.pixels;
    return needed;
  }
  static constexpr int64_t kSlack = 64;

  int64_t scratch_numbers(const Tile& tile) const {
    const Sizes s = sizes(tile);
    return 2 * s.raw + s.planes + s.u + s.z + s.y + s.rows + s.transposed;
  }

  int64_t chunk_depth(int64_t g) const {
    int64_t most = 0;
    for (int64_t s = 0; s < h_.sources; ++s) most = std::max<int64_t>(most, chunk_[s] * p_.index[record<Source>(h_.sources_start)[s].depth_start + g]);
    return most;
  }

  void place_scratch() {
    const Tile& tile = p_.tile;
    const Sizes needed = sizes(tile);
    int64_t at = 0;
    const auto take = [&](int64_t numbers) { return at += whole(numbers), at - whole(numbers); };
    p_.window_rows_start = take(needed.window_rows), p_.raw_start = take(needed.raw), p_.hat_start = take(needed.raw), p_.planes_start = take(needed.planes);
    p_.u_start = take(needed.u), p_.z_start = take(needed.z), p_.y_start = take(needed.y);
    p_.rows_start = take(needed.rows), p_.transposed_start = take(needed.transposed);
    p_.scratch_size = at;
    int64_t z = 0, y = 0, transposed = 0;
    for (int64_t g = 0; g < h_.groups; ++g) {
      ResolvedGroup& group = groups_[g];
      group.row = group.parts * tile.pixels + kWholeVectors;  // not a power of two, or rows share cache sets
      group.z_start = z, group.y_start = y, group.transposed_start = transposed;
      z += chunk_depth(g) * group.row, y += group.height * group.row;
      transposed += group.parts * tile.pixels * group.pitch;
    }
  }

  // ---- taps ----

  // Where tap j along axis a lies: (which phase of the source, how many positions from the window's beginning).
  std::pair<int64_t, int64_t> place(const ResolvedPhase& phase, const Phase& record, int a, int64_t j) const {
    const int64_t at = j * dilation_[a], s = p_.stride[a];
    if (!p_.up) return {at % s, at / s};
    const int64_t residue[kAxes] = {record.outer, record.middle, record.inner};
    return {0, phase.shift[a] - (at - residue[a]) / s};
  }

  // The same in a component's window, along the inner axis.
  int64_t window_place(const ResolvedPhase& phase, const Phase& record, int64_t j) const {
    const Tile& tile = p_.tile;
    const auto [source_phase, position] = place(phase, record, 2, j);
    return source_phase * p_.source_phases[0] * p_.source_phases[1] * tile.window[0] * tile.window[1] * tile.window[2] + position;
  }

  // The same in a plane, along another axis.
  int64_t plane_place(const ResolvedPhase& phase, const Phase& record, int a, int64_t j) const {
    const Tile& tile = p_.tile;
    const int64_t step = a == 0 ? tile.window[1] * tile.pitch : tile.pitch, window = tile.window[0] * tile.window[1] * tile.pitch;
    const auto [source_phase, position] = place(phase, record, a, j);
    return source_phase * window * (a == 0 ? p_.source_phases[1] : 1) + position * step;
  }

  void resolve() {
    const Phase* records = record<Phase>(h_.phases_start);
    std::vector<int64_t> taps_first;
    for (int64_t i = 0; i < h_.phases; ++i) {
      const Phase& from = records[i];
      ResolvedPhase& phase = phases_[i];
      phase.single = from.single, phase.pairs = from.pairs;
      taps_first.push_back(taps_.size());
      for (int64_t t = 0; t < from.single; ++t) taps_.push_back(window_place(phase, from, p_.index[from.single_start + t]));
      for (int64_t t = 0; t < 2 * from.pairs; ++t) taps_.push_back(window_place(phase, from, p_.index[from.pairs_start + t]));
      phase.classes_first = classes_.size(), phase.classes = from.classes;
      for (int64_t c = 0; c < from.classes; ++c) classes_.push_back(resolve(phase, from, record<Class>(from.classes_start)[c]));
    }
    for (int64_t i = 0; i < h_.phases; ++i) phases_[i].taps_at = taps_.data() + taps_first[i];
  }

  ResolvedClass resolve(const ResolvedPhase& phase, const Phase& from, const Class& c) {
    ResolvedClass resolved{&c, int64_t(positions_.size()), {}};
    for (int64_t i = 0; i < c.positions; ++i) {
      const Position& position = record<Position>(c.positions_start)[i];
      const int64_t plane = position.plane * p_.tile.plane;
      const bool outer = position.outer_mirrored >= 0, middle = position.middle_mirrored >= 0;
      const int64_t o[2] = {plane_place(phase, from, 0, position.outer), outer ? plane_place(phase, from, 0, position.outer_mirrored) : 0};
      const int64_t m[2] = {plane_place(phase, from, 1, position.middle), middle ? plane_place(phase, from, 1, position.middle_mirrored) : 0};
      positions_.push_back({{plane + o[0] + m[0], plane + o[0] + m[1], plane + o[1] + m[0], plane + o[1] + m[1]}});
      ++resolved.counts[2 * outer + middle];
    }
    return resolved;
  }

  const int64_t (&kernel_)[kAxes];
  const int64_t (&dilation_)[kAxes];
  std::vector<int64_t> chunk_, taps_;
  std::vector<ResolvedPhase> phases_;
  std::vector<ResolvedClass> classes_;
  std::vector<ResolvedPosition> positions_;
};

}  // namespace equiconv::steerable
