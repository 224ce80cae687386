// What every op's glue shares. Only torch's stable C++ API (TORCH_TARGET_VERSION, set in setup.py).
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "../dtype.h"

namespace equiconv {

using torch::stable::Tensor;

// The dispatcher checks how many arguments a boxed function takes, never their types: a `float` or `int` parameter
// would silently read half of the double or int64_t that was passed.
template <class T>
inline constexpr bool is_schema_type =
    std::is_same_v<T, Tensor> || std::is_same_v<T, double> || std::is_same_v<T, int64_t> || std::is_same_v<T, bool> ||
    std::is_same_v<T, std::string> || std::is_same_v<T, torch::headeronly::ScalarType> || std::is_same_v<T, std::vector<int64_t>> ||
    std::is_same_v<T, std::vector<Tensor>> || std::is_same_v<T, std::optional<Tensor>> ||
    std::is_same_v<T, std::optional<double>> || std::is_same_v<T, std::optional<int64_t>>;

template <class> struct has_schema_types;
template <class R, class... A>
struct has_schema_types<R(A...)> : std::bool_constant<(is_schema_type<std::decay_t<A>> && ...)> {};

#define EQUICONV_BOX(f)                                                                            \
  []() {                                                                                           \
    static_assert(equiconv::has_schema_types<decltype(f)>::value, #f ": use double and int64_t");  \
    return TORCH_BOX(&f);                                                                          \
  }()

inline DType dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "expected a tensor of float16, bfloat16, float32 or float64");
  }
}

}  // namespace equiconv
