#include "../field_dropout.h"

#include "../cpu/isa.h"
#include "field_tensor.h"

EQUICONV_DECLARE_CPU(field_dropout, FieldDropoutParams)

namespace equiconv {
namespace {

using torch::headeronly::ScalarType;

Tensor field_dropout_glue(const Tensor& x, const Tensor& seed, const Tensor& fields, double p) {
  STD_TORCH_CHECK(fields.dim() == 2 && fields.size(1) * sizeof(int64_t) == sizeof(FieldDropoutField) &&
                      fields.scalar_type() == ScalarType::Long && fields.is_contiguous(),
                  "field_dropout: fields must be the int64 table of a field type");
  STD_TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == ScalarType::Long, "field_dropout: seed must be one int64 number");
  STD_TORCH_CHECK(p >= 0 && p <= 1, "field_dropout: p must be between 0 and 1, got ", p);
  FieldDropoutParams params{};
  params.x = field_tensor("field_dropout", x);
  params.fields = static_cast<const FieldDropoutField*>(fields.const_data_ptr());
  int64_t channels = 0;
  for (int64_t f = 0; f < fields.size(0); ++f) {
    STD_TORCH_CHECK(params.fields[f].channel == channels && params.fields[f].size > 0, "field_dropout: the fields do not follow each other");
    channels += params.fields[f].size;
  }
  STD_TORCH_CHECK(channels == params.x.channels, "field_dropout: x must have ", channels, " channels, got ", params.x.channels);
  const uint64_t key = uint64_t(*static_cast<const int64_t*>(seed.const_data_ptr()));
  params.key[0] = uint32_t(key), params.key[1] = uint32_t(key >> 32);
  params.threshold = uint32_t(std::min(p * 0x1p32, 0x1p32 - 1));
  params.scale = p < 1 ? 1 / (1 - p) : 0;
  Tensor y = empty_fields(x, x.size(1));
  const std::vector<FieldRun> runs = runs_of(params.fields, fields.size(0), run_channels(params.x));
  params.work = divide(params.x, runs, dtype_of(x));
  params.y = field_tensor_like("field_dropout", y, params.x, params.work.dtype);
  run_items(params, field_dropout_scratch(widest(runs), params.work.lanes), field_dropout_cpu(), 4);
  return y;
}

}  // namespace
}  // namespace equiconv

STABLE_TORCH_LIBRARY_IMPL(equiconv, CPU, m) { m.impl("field_dropout", EQUICONV_BOX(equiconv::field_dropout_glue)); }
