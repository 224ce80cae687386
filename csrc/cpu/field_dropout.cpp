// Pixels are the lanes of the vectors.
#include "../field_dropout.h"

#include "field_tile.h"

namespace equiconv::EQUICONV_ISA {
namespace {

constexpr int kWords = 4;  // of a block of random bits: those of four fields that follow each other

using Bits = Vector<uint32_t>;
using WideBits = Vector<uint64_t>;
constexpr int kPixels = kWidth<uint32_t>;
constexpr uint64_t kLow = 0xFFFFFFFFu;

// high and low: of the products of 32 bits
inline void multiply(const Bits& x, uint64_t factor, Bits& high, Bits& low) {
  const WideBits pairs = reinterpret_cast<WideBits>(x), even = (pairs & kLow) * factor, odd = (pairs >> 32) * factor;
  low = reinterpret_cast<Bits>((even & kLow) | (odd << 32));
  high = reinterpret_cast<Bits>((even >> 32) | (odd & ~kLow));
}

// Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3": counters become random bits.
inline void philox(Bits (&words)[kWords], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    Bits high_a, low_a, high_b, low_b;
    multiply(words[0], 0xD2511F53u, high_a, low_a);
    multiply(words[2], 0xCD9E8D57u, high_b, low_b);
    words[0] = high_b ^ words[1] ^ key0, words[1] = low_b;
    words[2] = high_a ^ words[3] ^ key1, words[3] = low_a;
  }
}

// Of the pixels from `pixel` on, counted through the batch, and a block of fields.
inline void random_bits(const FieldDropoutParams& p, int64_t pixel, int64_t block, Bits (&words)[kWords]) {
  for (int i = 0; i < kPixels; ++i) words[0][i] = uint32_t(pixel + i), words[1][i] = uint32_t((pixel + i) >> 32);
  words[2] = uint32_t(block) + Bits{}, words[3] = Bits{};
  philox(words, p.key[0], p.key[1]);
}

// What the pixels from `first` on of these random bits are multiplied by.
template <class T>
inline Vector<T> factors(const FieldDropoutParams& p, const Bits& bits, int first) {
  if constexpr (kWidth<T> == kPixels) return bits >= p.threshold ? T(p.scale) + Vector<T>{} : Vector<T>{};
  Vector<T> found;
  for (int i = 0; i < kWidth<T>; ++i) found[i] = bits[first + i] >= p.threshold ? T(p.scale) : T(0);
  return found;
}

template <class T, class F>
void drop(const FieldDropoutParams& p, const FieldRun& run, const Pixels& pixels) {
  const int64_t lanes = padded<T>(pixels.count), first_pixel = pixels.batch * p.x.pixels + pixels.first;
  T *x_scratch = reinterpret_cast<T*>(p.work.scratch), *y_scratch = x_scratch + field_tile_scratch(run.channels, lanes);
  const Rows<const T> x = load_tile<T, F>(p.x, pixels, run.channel, run.channels, x_scratch);
  const Rows<T> y = target_tile<T, F>(p.y, pixels, run.channel, y_scratch);
  for (int64_t f = run.field, last; f < run.field + run.fields; f = last) {
    last = (f / kWords + 1) * kWords;
    if (last > run.field + run.fields) last = run.field + run.fields;
    for (int64_t l = 0; l < lanes; l += kPixels) {
      Bits words[kWords];
      random_bits(p, first_pixel + l, f / kWords, words);
      for (int64_t g = f; g < last; ++g) {
        const int64_t channel = p.fields[g].channel - run.channel;
        for (int first = 0; first < kPixels && l + first < lanes; first += kWidth<T>) {
          const Vector<T> factor = factors<T>(p, words[g % kWords], first);
          for (int64_t c = channel; c < channel + p.fields[g].size; ++c)
            vector_at(y[c], l + first) = factor * vector_at(x[c], l + first);
        }
      }
    }
  }
  store_tile<T, F>(p.y, pixels, run.channel, run.channels, y);
}

}  // namespace

void field_dropout(const FieldDropoutParams& p, int64_t, int64_t) {
  with_dtype(p.work.dtype, [&](auto number) {
    using F = decltype(number);
    using T = typename Computed<F>::type;
    each_item(p.work, [&](const FieldRun& run, int64_t part) {
      each_tile<T>(p.work, p.x, part, [&](const Pixels& pixels) { drop<T, F>(p, run, pixels); });
    });
  });
}

}  // namespace equiconv::EQUICONV_ISA
