// What the ops on fields of features share: the tensors they read and write, and how their work is divided. No torch.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace equiconv {

// [B, C, *spatial] as [batch, channels, pixels], contiguous or channels_last. Where the channels come last, all pixels of
// the batch are those of one image.
struct FieldTensor {
  void* data;
  int64_t batch, channels, pixels;
  int64_t stride_batch, stride_channel, stride_pixel;  // in elements
};

// Consecutive channels that are treated together, those of whole fields.
struct FieldRun {
  int32_t channel, channels, field, fields;
};

// Scratch for a tile in numbers. Not a multiple of a page: a load from one tile would wait for a store to another.
constexpr int64_t field_tile_scratch(int64_t channels, int64_t lanes) { return channels * (lanes + 16) + 112; }

// Items of work: every part of the pixels of every run. Threads take one after the other.
struct FieldWork {
  const FieldRun* runs;
  int64_t num_runs;
  int64_t parts;       // of the batch: some whole images each, or, if there are more parts than images, pieces of them
  int64_t lanes;       // pixels that are treated together, at most
  int64_t* next_item;  // shared by the threads
  char* scratch;       // of the calling thread, 64-byte aligned
  DType dtype;         // of the tensors in memory

  // The pixels of a part, counted through the batch: [begin, end). Parts that are taken at a time lie far apart: threads
  // that write to neighbouring pixels of a channel would wait for each other's cache lines.
  struct Range { int64_t begin, end; };
  Range part_range(const FieldTensor& x, int64_t part) const {
    part = part % 2 ? (parts + part) / 2 : part / 2;
    return {part_begin(x, part), part_begin(x, part + 1)};
  }

 private:
  int64_t part_begin(const FieldTensor& x, int64_t part) const {
    if (parts <= x.batch) return x.batch * part / parts * x.pixels;
    const int64_t pieces = parts / x.batch, vectors = (x.pixels + 63) / 64, begin = vectors * (part % pieces) / pieces * 64;
    return part / pieces * x.pixels + begin;
  }
};

}  // namespace equiconv
