// Where the forward kernel writes its sums: the irreps as they are, or the fields that they are the irreps of.
#pragma once
#include "functions.cuh"
#include "structure.cuh"

namespace equiconv {

struct Output {
  void* y;            // [pixel, channels]
  const float* bias;  // [channels] or null; of fields only, like the function
  int channels;       // of all kernels of a layer
  int function;
};

// In the order of the accumulators; `unpack_channels` of maps.cuh makes fields of them.
template <class T, class Number>
struct Irreps {
  using S = Structure<T>;
  EQ_DEVICE static void write(const Output& p, const float (&acc)[S::n_tiles][4], int row, long long pixel) {
    S::each_tile([&](auto i, auto channel) EQ_INLINE {
      const float pair[2] = {acc[i][2 * row], acc[i][2 * row + 1]};
      write_numbers<Number, 2>(p.y, pixel * p.channels + channel + threadIdx.x % 4 * 2, pair);
    });
  }
};

// `count` fields of one type: channels channel + size * field + component. A component is a sum of shares, in copy
// 8 * block + field of their irreps.
struct Fields { int size, channel, count; Range components; };
struct Share { int irrep, component, block; float coefficient; };

// A thread has two neighbours of each 8 fields, with all of their irreps.
template <class T, class Number>
struct InFields {
  using S = Structure<T>;

  template <int TYPE, int BLOCK>
  EQ_DEVICE static void write_two(const Output& p, const float (&acc)[S::n_tiles][4], int row, long long pixel) {
    static constexpr Fields f = T::fields[TYPE];
    constexpr bool even = T::field_channels % 2 == 0 && f.channel % 2 == 0;
    constexpr int aligned = T::field_channels % 8 == 0 && f.channel % 8 == 0 && f.size % 4 == 0 ? 8 : even ? 2 : 1;
    const int first = 8 * BLOCK + threadIdx.x % 4 * 2, channel = f.channel + f.size * first;
    float y[2 * f.size];
    unroll<0, 2 * f.size>([&](auto index) EQ_INLINE {
      constexpr int copy = decltype(index)::value / f.size, c = f.components.first + decltype(index)::value % f.size;
      float sum = p.bias && first + copy < f.count ? p.bias[channel + index] : 0;
      unroll<T::components[c].first, T::components[c].last>([&](auto share) EQ_INLINE {
        constexpr Share s = T::shares[decltype(share)::value];
        sum += s.coefficient * acc[S::tile(s.irrep, s.component, s.block + BLOCK)][2 * row + copy];
      });
      y[index] = apply(p.function, sum);
    });
    const long long at = pixel * T::field_channels + channel;
    if (first + 1 < f.count) write_numbers<Number, aligned>(p.y, at, y);
    else if (first < f.count) write_numbers<Number, 1, f.size>(p.y, at, y);
  }

  EQ_DEVICE static void write(const Output& p, const float (&acc)[S::n_tiles][4], int row, long long pixel) {
    unroll<0, sizeof(T::fields) / sizeof(Fields)>([&](auto type) EQ_INLINE {
      unroll<0, (T::fields[decltype(type)::value].count + 7) / 8>([&](auto block) EQ_INLINE {
        write_two<decltype(type)::value, decltype(block)::value>(p, acc, row, pixel);
      });
    });
  }
};

}  // namespace equiconv
