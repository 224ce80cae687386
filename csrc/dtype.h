#pragma once
#include <cstdint>

namespace equiconv {

enum class DType : int32_t { f32, f64, bf16, f16 };

}  // namespace equiconv
