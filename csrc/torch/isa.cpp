// equiconv::limit_isa(str widest) -> str: limits the CPU kernels to an instruction set; says which one is used.
#include "../cpu/isa.h"

#include "glue.h"

namespace equiconv {
namespace {

const char* const kNames[] = {"portable", "avx2", "avx512"};

std::string limit_isa_glue(const std::string& widest) {
  bool known = widest.empty();
  for (int64_t i = 0; i < 3; ++i)
    if (widest == kNames[i]) limit_isa(Isa(i)), known = true;
  STD_TORCH_CHECK(known, "limit_isa: expected 'portable', 'avx2' or 'avx512', got '", widest, "'");
  return kNames[int64_t(isa())];
}

}  // namespace
}  // namespace equiconv

STABLE_TORCH_LIBRARY_IMPL(equiconv, CompositeExplicitAutograd, m) {
  m.impl("limit_isa", EQUICONV_BOX(equiconv::limit_isa_glue));
}
