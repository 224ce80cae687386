// Torch's tensors as FieldTensors, and the threads that share the work on them.
#pragma once
#include <algorithm>

#include "../field_tensor.h"
#include "glue.h"
#include "thread_scratch.h"

namespace equiconv {

inline bool is_channels_last(const Tensor& t) {
  if (t.dim() < 4 || t.dim() > 5 || t.is_contiguous()) return false;
  int64_t stride = t.size(1);
  if (t.stride(1) != 1) return false;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) != 1 && t.stride(d) != stride) return false;
    stride *= t.size(d);
  }
  return t.size(0) == 1 || t.stride(0) == stride;
}

inline FieldTensor field_tensor(const char* op, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 2, op, ": tensors must be [B, C, *spatial]");
  const bool channels_last = is_channels_last(t);
  STD_TORCH_CHECK(channels_last || t.is_contiguous(), op, ": tensors must be contiguous or channels_last");
  STD_TORCH_CHECK(t.numel() == 0 || t.const_data_ptr() != nullptr, op, ": the memory of a tensor was freed");
  FieldTensor f{};
  f.data = const_cast<void*>(t.const_data_ptr());
  f.batch = t.size(0), f.channels = t.size(1), f.pixels = 1;
  for (int64_t d = 2; d < t.dim(); ++d) f.pixels *= t.size(d);
  if (channels_last || f.pixels == 1) {
    f.pixels *= f.batch;
    f.batch = 1;
    f.stride_channel = 1, f.stride_pixel = f.channels;
  } else {
    f.stride_batch = f.channels * f.pixels, f.stride_channel = f.pixels, f.stride_pixel = 1;
  }
  return f;
}

// A tensor whose pixels are counted as those of x. One of a single channel lies in memory in either format.
inline FieldTensor field_tensor_like(const char* op, const Tensor& t, const FieldTensor& x, DType dtype) {
  FieldTensor f = field_tensor(op, t);
  if (f.channels == 1 && f.batch * f.pixels == x.batch * x.pixels) {
    f.batch = x.batch, f.pixels = x.pixels;
    f.stride_batch = x.pixels, f.stride_pixel = 1;
  }
  STD_TORCH_CHECK(f.batch == x.batch && f.pixels == x.pixels && dtype_of(t) == dtype,
                  op, ": tensors must have one dtype, memory format, batch and spatial size");
  return f;
}

// An uninitialised tensor of that shape in x's dtype and memory format.
inline Tensor empty_fields(const Tensor& x, const std::vector<int64_t>& shape) {
  const auto format = !is_channels_last(x) ? torch::headeronly::MemoryFormat::Contiguous
                      : x.dim() == 4       ? torch::headeronly::MemoryFormat::ChannelsLast
                                           : torch::headeronly::MemoryFormat::ChannelsLast3d;
  return torch::stable::empty(shape, x.scalar_type(), torch::headeronly::Layout::Strided, x.device(), false, format);
}

// One like x with another number of channels.
inline Tensor empty_fields(const Tensor& x, int64_t channels) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim(); ++d) shape.push_back(d == 1 ? channels : x.size(d));
  return empty_fields(x, shape);
}

// Fields in runs of about `channels` channels each: more where they lie side by side in memory.
template <class Field>
std::vector<FieldRun> runs_of(const Field* fields, int64_t num_fields, int64_t channels) {
  std::vector<FieldRun> runs;
  for (int64_t f = 0; f < num_fields; ++f) {
    const int32_t size = int32_t(fields[f].size);
    if (runs.empty() || runs.back().channels + size > channels)
      runs.push_back({int32_t(fields[f].channel), size, int32_t(f), 1});
    else
      runs.back().channels += size, runs.back().fields += 1;
  }
  return runs;
}

inline int64_t widest(const std::vector<FieldRun>& runs) {
  int64_t most = 1;
  for (const FieldRun& run : runs) most = std::max<int64_t>(most, run.channels);
  return most;
}

inline int64_t run_channels(const FieldTensor& x) { return x.stride_pixel == 1 ? 8 : 128; }

constexpr int64_t kTileNumbers = 8192;       // of one tensor: several fit into the first-level cache, or nearly
constexpr int64_t kPartNumbers = 16384;      // of a part of the work, at least
constexpr int64_t kRowNumbers = 1024;        // that lie side by side in memory, at least, where an image is divided
constexpr int64_t kSerialNumbers = 1 << 17;  // less than this is not worth a second thread
constexpr int64_t kItems = 32;               // enough for threads that do not run equally fast

// How the work on these runs is divided: it does not depend on the number of threads, nor do sums then.
inline FieldWork divide(const FieldTensor& x, const std::vector<FieldRun>& runs, DType dtype) {
  FieldWork work{};
  work.runs = runs.data(), work.num_runs = runs.size(), work.dtype = dtype;
  const int64_t most = widest(runs), pixels = x.batch * x.pixels, items = std::max<int64_t>(work.num_runs, 1);
  work.lanes = std::max<int64_t>(16, kTileNumbers / most / 16 * 16);
  work.parts = std::max<int64_t>(1, std::min((kItems + items - 1) / items, pixels * most / kPartNumbers));
  if (work.parts > x.batch) {  // pieces of images
    const int64_t row = x.stride_pixel == 1 ? x.pixels / kRowNumbers : work.parts;
    work.parts = x.batch * std::max<int64_t>(1, std::min(work.parts / std::max<int64_t>(x.batch, 1), row));
  }
  return work;
}

// Gives each thread its scratch of so many numbers and lets it take items. cost: of a number of x, 1 if it is read once.
template <class Params, class Kernel>
void run_items(const Params& params, int64_t numbers, Kernel kernel, int64_t cost = 1) {
  const int64_t items = params.work.num_runs * params.work.parts;
  const bool is_small = params.x.batch * params.x.channels * params.x.pixels * cost < kSerialNumbers;
  const int64_t threads = is_small ? 1 : torch::stable::get_num_threads();
  const int64_t bytes = numbers * (params.work.dtype == DType::f64 ? 8 : 4);
  int64_t next_item = 0;
  torch::stable::parallel_for(0, std::min(threads, items), 1, [&](int64_t begin, int64_t end) {
    Params mine = params;
    mine.work.next_item = &next_item;
    mine.work.scratch = thread_scratch(bytes);
    kernel(mine, begin, end);
  });
}

}  // namespace equiconv
