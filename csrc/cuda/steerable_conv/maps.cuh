// What surrounds the fused kernels: changes between layouts, packing of the weights and unpacking of their gradient are all
// linear maps with a few terms for each number.
#pragma once
#include "functions.cuh"

namespace equiconv {

// to[i] = sum of coefficients[t] * from[index[t]] for t in start[i] .. start[i + 1].
struct Terms {
  const int *start, *index;
  const float* coefficients;
  int count, from_count;  // of i, and of the numbers in `from`
};

struct Channels {  // addresses [batch, pixel, channel], in elements
  long long batch_stride, pixel_stride, channel_stride;
};

struct ChangeChannelsParams {
  const void* from;
  void* to;
  Terms terms;
  const float* bias;  // [count] or null
  Channels from_channels, to_channels;
  int pixels;         // of an image
  int function;
};

// Grid: batch * ceil(pixels / PIXELS). Applies the terms to the channels of each pixel. PIXELS, 32 or less, are lanes; what
// comes and goes is staged in shared memory [channel][pixel], so that global memory is read and written in its own order.
template <class Number, int PIXELS>
struct ChangeChannels {
  using Stored = typename Number::Stored;
  static constexpr int threads = 256, pixels = PIXELS, pitch = pixels + 4 / sizeof(Stored);  // an odd number of words

  template <class F>
  EQ_DEVICE static void each(const Channels& c, int channels, int valid, F&& f) {
    for (int i = threadIdx.x; i < channels * pixels; i += threads) {
      const int channel = c.channel_stride == 1 ? i % channels : i / pixels, pixel = c.channel_stride == 1 ? i / channels : i % pixels;
      if (pixel < valid) f(channel * pitch + pixel, pixel * c.pixel_stride + channel * c.channel_stride);
    }
  }

  EQ_DEVICE static void run(const ChangeChannelsParams& p) {
    Stored *const from = reinterpret_cast<Stored*>(shared_memory), *const to = from + p.terms.from_count * pitch;
    const int tiles = (p.pixels + pixels - 1) / pixels, image = blockIdx.x / tiles, first = blockIdx.x % tiles * pixels;
    const int valid = p.pixels - first < pixels ? p.pixels - first : pixels;
    const Stored* const source = static_cast<const Stored*>(p.from) + image * p.from_channels.batch_stride + first * p.from_channels.pixel_stride;
    Stored* const target = static_cast<Stored*>(p.to) + image * p.to_channels.batch_stride + first * p.to_channels.pixel_stride;
    each(p.from_channels, p.terms.from_count, valid, [&](int at, long long global) { from[at] = source[global]; });
    __syncthreads();
    const int lane = threadIdx.x % pixels;
    for (int c = threadIdx.x / pixels; c < p.terms.count; c += threads / pixels) {
      float sum = p.bias ? p.bias[c] : 0;
      for (int t = p.terms.start[c]; t < p.terms.start[c + 1]; ++t)
        if (lane < valid) sum += p.terms.coefficients[t] * Number::value(from[p.terms.index[t] * pitch + lane]);
      to[c * pitch + lane] = Number::round(apply(p.function, sum));
    }
    __syncthreads();
    each(p.to_channels, p.terms.count, valid, [&](int at, long long global) { target[global] = to[at]; });
  }
};

struct MapParams {
  const float* from;
  void* to;
  Terms terms;
};

// One thread for each number of the result: packed weights, or their gradient in float.
template <class Number>
EQ_DEVICE void map_numbers(const MapParams& p) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= p.terms.count) return;
  float sum = 0;
  for (int t = p.terms.start[i]; t < p.terms.start[i + 1]; ++t) sum += p.terms.coefficients[t] * p.from[p.terms.index[t]];
  static_cast<typename Number::Stored*>(p.to)[i] = Number::round(sum);
}

struct ReduceParams {
  const float4* partial;  // [count, size]
  float4* sum;            // [size]
  int count, size;
};

// One thread for each four numbers; adds in order, so that the sum is always the same.
EQ_DEVICE void reduce(const ReduceParams& p) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= p.size) return;
  float4 s = p.partial[i];
  for (int j = 1; j < p.count; ++j) {
    const float4 v = p.partial[(long long)j * p.size + i];
    s = make_float4(s.x + v.x, s.y + v.y, s.z + v.z, s.w + v.w);
  }
  p.sum[i] = s;
}

}  // namespace equiconv
