#include "../field_pool.h"

#include "../cpu/isa.h"
#include "field_tensor.h"

EQUICONV_DECLARE_CPU(field_pool, FieldPoolParams)
EQUICONV_DECLARE_CPU(field_pool_bwd, FieldPoolParams)

namespace equiconv {
namespace {

using torch::headeronly::ScalarType;

struct Call {
  FieldPoolParams params{};
  std::vector<FieldRun> runs;

  Call(const char* op, const Tensor& x, const Tensor& fields, bool norms, const std::optional<Tensor>& directions) {
    STD_TORCH_CHECK(fields.dim() == 2 && fields.size(1) * sizeof(int64_t) == sizeof(FieldPoolField) &&
                        fields.scalar_type() == ScalarType::Long && fields.is_contiguous(),
                    op, ": fields must be the int64 table of a field type");
    params.x = field_tensor(op, x);
    params.fields = static_cast<const FieldPoolField*>(fields.const_data_ptr());
    params.norms = norms;
    params.numbers = directions ? directions->size(1) : 1;
    params.directions = directions ? directions->const_data_ptr() : nullptr;
    if (directions)
      STD_TORCH_CHECK(!norms && directions->dim() == 2 && directions->is_contiguous() && params.numbers > 0 &&
                          directions->scalar_type() == (x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
                      op, ": directions must be a contiguous matrix in float32 (float64 with float64), and norms false");
    int64_t channels = 0;
    for (int64_t f = 0; f < fields.size(0); ++f) {
      const FieldPoolField& field = params.fields[f];
      STD_TORCH_CHECK(field.channel == channels && field.size > 0 && field.subfield > 0 && field.size % field.subfield == 0 &&
                          (norms || field.subfield == 1) && (!directions || field.size <= directions->size(0)),
                      op, ": the fields do not follow each other, their subfields do not divide them, or directions are too few");
      channels += field.size;
    }
    STD_TORCH_CHECK(channels == params.x.channels, op, ": x must have ", channels, " channels, got ", params.x.channels);
    runs = runs_of(params.fields, fields.size(0), run_channels(params.x));
    params.work = divide(params.x, runs, dtype_of(x));
  }

  template <class Kernel>
  void run(Kernel kernel) {
    run_items(params, field_pool_scratch(widest(runs), widest(runs) * params.numbers, params.work.lanes), kernel);
  }
};

Tensor field_pool_glue(const Tensor& x, const Tensor& fields, const Tensor&, bool norms, const std::optional<Tensor>& directions) {
  Call call("field_pool", x, fields, norms, directions);
  Tensor y = empty_fields(x, fields.size(0) * call.params.numbers);
  call.params.y = field_tensor_like("field_pool", y, call.params.x, call.params.work.dtype);
  call.run(field_pool_cpu());
  return y;
}

Tensor field_pool_bwd_glue(const Tensor& grad, const Tensor& x, const Tensor& fields, const Tensor&, bool norms,
                           const std::optional<Tensor>& directions) {
  Call call("field_pool_bwd", x, fields, norms, directions);
  STD_TORCH_CHECK(grad.dim() == x.dim() && grad.size(1) == fields.size(0) * call.params.numbers,
                  "field_pool_bwd: grad must have the channels of the output");
  Tensor grad_x = empty_fields(x, x.size(1));
  call.params.grad = field_tensor_like("field_pool_bwd", grad, call.params.x, call.params.work.dtype);
  call.params.y = field_tensor_like("field_pool_bwd", grad_x, call.params.x, call.params.work.dtype);
  call.run(field_pool_bwd_cpu());
  return grad_x;
}

}  // namespace
}  // namespace equiconv

STABLE_TORCH_LIBRARY_IMPL(equiconv, CPU, m) {
  m.impl("field_pool", EQUICONV_BOX(equiconv::field_pool_glue));
  m.impl("field_pool_bwd", EQUICONV_BOX(equiconv::field_pool_bwd_glue));
}
