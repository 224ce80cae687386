// Pointwise functions of vectors and their derivatives. Local to the file that includes it (see isa.h).
#pragma once
#include <type_traits>

#include "simd.h"

namespace equiconv::EQUICONV_ISA {
namespace {

// 2^n (1 + q) with q = exp(r) - 1 and |r| <= ln(2) / 2, for numbers of type T
template <class T> struct Exponential;
template <> struct Exponential<float> {
  using Bits = int32_t;
  static constexpr float kLowest = -87, kHighest = 88, kRound = 0x1.8p23f, kLog2 = 0x1.62e4p-1f, kLog2Rest = 0x1.7f7d1cp-20f;
  static constexpr int kMantissa = 23, kTerms = 7;
};
template <> struct Exponential<double> {
  using Bits = int64_t;
  static constexpr double kLowest = -708, kHighest = 709, kRound = 0x1.8p52, kLog2 = 0x1.62e42fefap-1,
                          kLog2Rest = 0x1.cf79abc9e3b3ap-40;
  static constexpr int kMantissa = 52, kTerms = 14;
};

// exp(x) - 1, exact also near zero, where x is NaN too
template <class T>
inline __attribute__((always_inline)) Vector<T> expm1(Vector<T> given) {
  using E = Exponential<T>;
  using Bits = Vector<typename E::Bits>;
  Vector<T> x = given < E::kLowest ? E::kLowest + Vector<T>{} : given;
  x = x > E::kHighest ? E::kHighest + Vector<T>{} : x;
  const Vector<T> shifted = x * T(1.44269504088896340736) + E::kRound;  // its last bits are the integer n
  const Vector<T> n = shifted - E::kRound, r = x - n * E::kLog2 - n * E::kLog2Rest;
  T inverse_factorial[E::kTerms + 1] = {1};
  for (int k = 1; k <= E::kTerms; ++k) inverse_factorial[k] = inverse_factorial[k - 1] / T(k);
  Vector<T> q = inverse_factorial[E::kTerms] + Vector<T>{};
  for (int k = E::kTerms - 1; k >= 1; --k) q = q * r + inverse_factorial[k];
  q = q * r;
  const Bits one = reinterpret_cast<Bits>(T(1) + Vector<T>{});
  const Vector<T> power = reinterpret_cast<Vector<T>>(one + (reinterpret_cast<Bits>(shifted) << E::kMantissa));
  return given != given ? given : power * q + (power - T(1));
}

struct Relu {
  template <class T> static Vector<T> value(Vector<T> x) { return x <= T(0) ? Vector<T>{} : x; }
  template <class T> static Vector<T> slope(Vector<T> x) { return x <= T(0) ? Vector<T>{} : T(1) + Vector<T>{}; }
};

struct Elu {
  template <class T> static Vector<T> value(Vector<T> x) { return x > T(0) ? x : expm1<T>(x); }
  template <class T> static Vector<T> slope(Vector<T> x) { return x > T(0) ? T(1) + Vector<T>{} : expm1<T>(x) + T(1); }
};

struct Sigmoid {
  template <class T> static Vector<T> value(Vector<T> x) { return T(1) / (expm1<T>(-x) + T(2)); }
  template <class T> static Vector<T> slope(Vector<T> x) {
    const Vector<T> y = value<T>(x);
    return y * (T(1) - y);
  }
};

struct Tanh {
  template <class T> static Vector<T> value(Vector<T> x) {
    const Vector<T> limited = x > T(20) ? T(20) + Vector<T>{} : x, e = expm1<T>(limited + limited);
    return e / (e + T(2));
  }
  template <class T> static Vector<T> slope(Vector<T> x) {
    const Vector<T> y = value<T>(x);
    return T(1) - y * y;
  }
};

struct Softplus {  // above 20 the identity, as in torch
  template <class T> static Vector<T> value(Vector<T> x) {  // max(x, 0) + log(1 + u), u = exp(-|x|)
    const Vector<T> u = expm1<T>(x > T(0) ? -x : x) + T(1), z = u / (u + T(2)), square = z * z;
    constexpr int kTerms = sizeof(T) == 4 ? 9 : 18;  // of the series of 2 atanh(z), z <= 1/3
    Vector<T> sum = {};
    for (int k = kTerms - 1; k >= 0; --k) sum = sum * square + T(1) / T(2 * k + 1);
    return x > T(20) ? x : (x > T(0) ? x : Vector<T>{}) + (z + z) * sum;
  }
  template <class T> static Vector<T> slope(Vector<T> x) { return x > T(20) ? T(1) + Vector<T>{} : Sigmoid::value<T>(x); }
};

struct Squash {  // of a number that is not negative
  template <class T> static Vector<T> value(Vector<T> x) { return x / (T(1) + x); }
  template <class T> static Vector<T> slope(Vector<T> x) { return T(1) / ((T(1) + x) * (T(1) + x)); }
};

template <class T>
inline Vector<T> square_root(Vector<T> x) {
  T lanes[kWidth<T>];  // through memory: the compiler makes one instruction of it
  *reinterpret_cast<Vector<T>*>(lanes) = x;
  for (int i = 0; i < kWidth<T>; ++i)
    if constexpr (std::is_same_v<T, float>)
      lanes[i] = __builtin_sqrtf(lanes[i]);
    else
      lanes[i] = __builtin_sqrt(lanes[i]);
  return *reinterpret_cast<const Vector<T>*>(lanes);
}

}  // namespace
}  // namespace equiconv::EQUICONV_ISA
