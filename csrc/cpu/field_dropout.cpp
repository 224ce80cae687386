// Pixels are the lanes of the vectors.
#include "../field_dropout.h"

#include "field_tile.h"

namespace equiconv::EQUICONV_ISA {
namespace {

constexpr int kWords = 4;  // of a block of random bits: those of four fields that follow each other

// Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3": the counters of kLanes pixels become bits.
template <int kLanes>
inline void philox(uint32_t (&words)[kWords][kLanes], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u)
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t a = uint64_t(0xD2511F53u) * words[0][i], b = uint64_t(0xCD9E8D57u) * words[2][i];
      words[0][i] = uint32_t(b >> 32) ^ words[1][i] ^ key0;
      words[2][i] = uint32_t(a >> 32) ^ words[3][i] ^ key1;
      words[1][i] = uint32_t(b), words[3][i] = uint32_t(a);
    }
}

template <class T>
struct Random {
  uint32_t words[kWords][kWidth<T>];

  // Of the pixels from `pixel` on, counted through the batch.
  Random(const FieldDropoutParams& p, int64_t pixel, int64_t field) {
    for (int i = 0; i < kWidth<T>; ++i) {
      const uint64_t n = uint64_t(pixel + i);
      words[0][i] = uint32_t(n), words[1][i] = uint32_t(n >> 32), words[2][i] = uint32_t(field / kWords), words[3][i] = 0;
    }
    philox(words, p.key[0], p.key[1]);
  }

  // What the pixels of a field are multiplied by.
  Vector<T> factors(const FieldDropoutParams& p, int64_t field) const {
    T found[kWidth<T>];
    for (int i = 0; i < kWidth<T>; ++i) found[i] = words[field % kWords][i] >= p.threshold ? T(p.scale) : T(0);
    return vector_at(const_cast<const T*>(found), 0);
  }
};

template <class T, class F>
void drop(const FieldDropoutParams& p, const FieldRun& run, const Pixels& pixels) {
  const int64_t lanes = padded<T>(pixels.count), first_pixel = pixels.batch * p.x.pixels + pixels.first;
  T *x_scratch = reinterpret_cast<T*>(p.work.scratch), *y_scratch = x_scratch + field_tile_scratch(run.channels, lanes);
  const Rows<const T> x = load_tile<T, F>(p.x, pixels, run.channel, run.channels, x_scratch);
  const Rows<T> y = target_tile<T, F>(p.y, pixels, run.channel, y_scratch);
  for (int64_t f = run.field, last; f < run.field + run.fields; f = last) {
    last = (f / kWords + 1) * kWords;
    if (last > run.field + run.fields) last = run.field + run.fields;
    for (int64_t l = 0; l < lanes; l += kWidth<T>) {
      const Random<T> random(p, first_pixel + l, f);
      for (int64_t g = f; g < last; ++g) {
        const Vector<T> factors = random.factors(p, g);
        const int64_t channel = p.fields[g].channel - run.channel;
        for (int64_t c = channel; c < channel + p.fields[g].size; ++c) vector_at(y[c], l) = factors * vector_at(x[c], l);
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
