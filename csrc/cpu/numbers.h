// Numbers as they lie in memory, and the conversion to those that are computed with. Local to the file that includes it
// (see isa.h).
#pragma once
#include <cstdint>
#include <cstring>

namespace equiconv::EQUICONV_ISA {
namespace {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline float widen(bf16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline float widen(f16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) bits = 0x7f800000 | (magnitude & 0x3ff) << 13;  // infinity, NaN
  else if (magnitude >= 0x400) bits = (magnitude << 13) + (112u << 23);
  else {
    const float subnormal = float(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &subnormal, sizeof bits);
  }
  bits |= sign;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline float widen(float v) { return v; }
inline double widen(double v) { return v; }

inline void narrow(float v, float* out) { *out = v; }
inline void narrow(double v, double* out) { *out = v; }
inline void narrow(float v, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
  out->bits = v != v ? uint16_t(0x7fc0) : uint16_t(rounded);
}
inline void narrow(float v, f16* out) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) half = 0x7e00;                  // NaN
  else if (magnitude >= 0x477ff000) half = 0x7c00;            // rounds to infinity
  else if (magnitude >= 0x38800000) half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  else {                                                      // subnormal: the addition rounds to its last place
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;
    std::memcpy(&half, &shifted, sizeof half);
    half -= 0x3f000000;
  }
  out->bits = uint16_t(sign | half);
}

template <class F> struct Computed { using type = float; };
template <> struct Computed<double> { using type = double; };

}  // namespace
}  // namespace equiconv::EQUICONV_ISA
