// steerable_conv: a steerable convolution by the stages of equiconv/layout/factorised.py, from the source to the target.
//
//   x^ = A x    u[b, h] = x^[b] * H[h]    z[k, a] = sum T u    y^[m, a] = sum_k W[m, k] z[k, a]    y = A' y^
//
// and, on the same z, the gradient of the weights: grad W[m, k] = sum over pixels and a of z[k, a] g^[m, a], where g^ is
// A'^T of the companion (the gradient with respect to y; where the plan is the adjoint, the layer's input). No torch in
// this file.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace equiconv::steerable {

// Records of the table that equiconv/layout/conv_tables.py makes, which says what each number is.
struct Header {
  int32_t harmonics, groups, groups_start, sources, sources_start, targets, targets_start, blocks, blocks_start, phases,
      phases_start;
};
struct Group {
  int32_t components, complex;
};
struct Source {
  int32_t size, fields, channels_start, transform_start, slots, slots_start, depth_start;
};
struct Slot {
  int32_t component, size, rows, rows_start, uses_start;
};
constexpr int32_t kUnused = -1, kShared = -2;  // in `uses`
struct Row {
  int32_t group, k, component, terms, terms_start, coefficients_start;
};
struct Target {
  int32_t size, fields, channels_start, transform_start, places_start, height_start, adds;
};
struct Block {
  int32_t source, target, weights_start, paths, stride_source, stride_target, stride_group, entries, entries_start,
      scales_start;
};
struct Phase {
  int32_t outer, middle, inner, single, single_start, pairs, pairs_start, classes, classes_start;
};
struct Class {
  int32_t even, odd, harmonics_start, middle_odd, positions, positions_start, coefficients_start;
};
struct Position {
  int32_t plane, outer, outer_mirrored, middle, middle_mirrored;
};
constexpr int kMaxEven = 8, kMaxOdd = 4;
constexpr int kComplexRows = 3;  // of real weights for each k of complex numbers z = c + i d: for c + d, c and d

// Axes are (outer, middle, inner); in the plane there is no middle.
constexpr int kAxes = 3;
constexpr int64_t kMaxPixels = 1024;  // of a tile

// One irrep of the target: the matrix product y^ = W z.
struct ResolvedGroup {
  int64_t components;          // a
  bool complex;                // whether these are real and imaginary parts: see cpu/complex_product.h
  int64_t height, pitch;       // m's; rounded up to whole vectors
  int64_t depth;               // k's
  int64_t weight_rows;         // of W for each k
  int64_t weights_start;       // of W [depth * weight_rows, pitch] in the packed weights
  int64_t z_start, y_start;    // in a worker's Z and Y
  int64_t parts;               // of a row of Z and of Y: the components and, of complex numbers with a companion, their sum
  int64_t row;                 // its length: parts * pixels, and some more
  int64_t transposed_start;    // of [parts * pixels, pitch] in a worker's transposed companion
};

// What one phase needs for its harmonics, with taps resolved to places in a component's planes.
struct ResolvedClass {
  const Class* record;
  int64_t first;               // of its positions
  int64_t counts[4];           // positions by (outer mirrored, middle mirrored): no no, no yes, yes no, yes yes
};
struct ResolvedPosition {
  int64_t at[4];               // the tap; mirrored along the middle; mirrored along the outer axis; along both
};
struct ResolvedPhase {
  int64_t first[kAxes], count[kAxes];  // the q's of the target: q = first ... first + count - 1
  int64_t tiles[kAxes];
  int64_t tasks;               // tiles of all images
  int64_t shift[kAxes];        // up: the window of a tile begins at the source's position q - shift
  int64_t target_offset[kAxes];        // of the target's positions p = stride * q + offset (up), or p = q
  int64_t single, pairs;       // taps along the inner axis: single + 2 * pairs planes
  const int64_t* taps_at;      // [single + 2 * pairs]: where they lie in a component's window
  int64_t classes_first, classes;
};

// A tile is computed at once: pixels [outer, middle, inner] of the target in `runs` of neighbours, each as long as its
// pixels lie apart in the source's window, so that some pixels of a run are not the tile's.
struct Tile {
  int64_t size[kAxes];
  int64_t window[kAxes];       // positions of the source, of one phase of a strided layer
  int64_t component;           // numbers in a window of all phases: [inner phase, outer phase, middle phase, *window]
  int64_t plane;               // numbers of [outer phase, middle phase, *window] for one tap along the inner axis
  int64_t plane_rows, row;     // it is made in rows of so many numbers, which lie window[2] apart in the component
  int64_t pitch;               // of the window's rows in a plane: whole vectors where the pixels' runs are such rows
  int64_t runs, run;           // their number and length
  int64_t pixels;              // runs * run
  int64_t outer, middle;       // steps to the next pixel along these axes
};

// What is done to each number of the target. ACTIVATIONS of equiconv/reference/steerable_conv.py
enum class Activation : int32_t { identity, relu, leaky_relu, elu, sigmoid, tanh };

// A row of a window, as far as it lies in the image.
struct WindowRow {
  int64_t to, from, count;     // places in a component and in a channel of the source; numbers
};

struct Params {
  const int32_t* index;
  const void* values;
  const void* weights;         // the layer's
  void* packed;                // W of all groups of the convolution: [conv_groups, packed_size]; only `pack` writes it
  const void* source;          // [batch, source_channels, *source_size], contiguous
  void* target;                // the same of the target; or null
  const void* bias;            // [target_channels]; or null
  Activation activation;       // of the target
  double alpha;                // of elu; or the slope of leaky_relu
  const void* companion;       // like the target; or null
  void* grad_packed;           // [slots, conv_groups, packed_size]; with a companion
  void* grad_weights;          // zeros, to which the gradient is added
  DType dtype;                 // f32 or f64
  int64_t batch, conv_groups, source_channels, target_channels, packed_size, slots, tasks;
  int64_t source_size[kAxes], target_size[kAxes], stride[kAxes], padding[kAxes];
  int64_t reach[kAxes];        // dilation * (taps - 1)
  int64_t target_reached[kAxes];       // end of the target's positions that a tap joins to the source
  bool up;
  int64_t source_phases[kAxes];        // of a strided layer: min(stride, taps) if not up, else 1
  Tile tile;
  int64_t num_groups, num_sources, num_targets;
  int64_t source_fields;       // of all sources
  const ResolvedGroup* groups;
  const int64_t* k_start;      // [sources, groups]: the first k of the source's first field
  const int64_t* m_start;      // [targets, groups]
  const int64_t* chunk;        // [sources]: fields that are taken together
  const ResolvedPhase* phases;
  const ResolvedClass* classes;
  const ResolvedPosition* positions;
  int64_t* next_slot;          // shared by the threads: counts the slots that one of them has taken
  // Of the calling worker, 64-byte aligned.
  char* scratch;
  int64_t window_rows_start, raw_start, hat_start, planes_start, u_start, z_start, y_start, rows_start, transposed_start,
      scratch_size;
};

}  // namespace equiconv::steerable
