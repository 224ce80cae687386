#include "../norm_max_pool.h"

#include "../cpu/isa.h"
#include "window_pool.h"

EQUICONV_DECLARE_CPU(norm_max_pool, NormMaxPoolParams)
EQUICONV_DECLARE_CPU(norm_max_pool_bwd, NormMaxPoolParams)

namespace equiconv {
namespace {

struct Call {
  NormMaxPoolParams params{};
  Sizes out;  // shape of the output

  Call(const char* op, const Tensor& x, const Tensor& fields, const Sizes& window, const Sizes& stride, const Sizes& padding,
       const Sizes& dilation, bool ceil_mode) {
    NormMaxPoolParams& p = params;
    const int64_t dimensions = x.dim() - 2;
    STD_TORCH_CHECK(dimensions == 2 || dimensions == 3, op, ": x must have two or three spatial dimensions");
    STD_TORCH_CHECK(fields.dim() == 2 && fields.size(1) * sizeof(int64_t) == sizeof(FieldPoolField) &&
                        fields.scalar_type() == torch::headeronly::ScalarType::Long && fields.is_contiguous(),
                    op, ": fields must be the int64 table of a field type");
    p.x = window_pool_tensor(op, x, x);
    p.dtype = dtype_of(x);
    p.fields = static_cast<const FieldPoolField*>(fields.const_data_ptr());
    p.batch = x.size(0), p.num_fields = fields.size(0);
    int64_t channels = 0;
    for (int64_t f = 0; f < p.num_fields; ++f) {
      STD_TORCH_CHECK(p.fields[f].channel == channels && p.fields[f].size > 0, op, ": the fields do not follow each other");
      channels += p.fields[f].size;
    }
    STD_TORCH_CHECK(channels == x.size(1), op, ": x must have ", channels, " channels, got ", x.size(1));
    spread(op, window, dimensions, 1, 1, p.window.taps);
    spread(op, stride, dimensions, 1, 1, p.window.stride);
    spread(op, padding, dimensions, 0, 0, p.window.padding);
    spread(op, dilation, dimensions, 1, 1, p.window.dilation);
    out = {x.size(0), x.size(1)};
    for (int d = 0; d < 3; ++d) {
      const int64_t count = count_windows(p.window, d, p.x.size[d], ceil_mode);
      STD_TORCH_CHECK(count > 0, op, ": x is too small for the window");
      if (d != 1 || dimensions == 3) out.push_back(count);
    }
    STD_TORCH_CHECK(p.x.size[0] * p.x.plane() <= INT32_MAX, op, ": an image must have less than 2^31 pixels");
  }

  template <class Kernel>
  void run(Kernel kernel) {
    const NormMaxPoolParams& p = params;
    const int64_t pixels = p.x.size[0] * p.x.plane(), items = p.batch * p.num_fields;
    const int64_t bytes = norm_max_pool_scratch(pixels, p.y.size[0] * p.y.plane()) * (p.dtype == DType::f64 ? 8 : 4);
    const int64_t threads = items * pixels < kSerialNumbers / 4 ? 1 : torch::stable::get_num_threads();
    int64_t next_item = 0;
    torch::stable::parallel_for(0, std::min(threads, items), 1, [&](int64_t begin, int64_t end) {
      NormMaxPoolParams mine = p;
      mine.next_item = &next_item;
      mine.scratch = thread_scratch(bytes);
      kernel(mine, begin, end);
    });
  }
};

// The table of elements is for derivatives and the definition.
Tensor norm_max_pool_glue(const Tensor& x, const Tensor& fields, const Tensor&, Sizes window, Sizes stride, Sizes padding,
                          Sizes dilation, bool ceil_mode) {
  Call call("norm_max_pool", x, fields, window, stride, padding, dilation, ceil_mode);
  Tensor y = empty_fields(x, call.out);
  call.params.y = window_pool_tensor("norm_max_pool", y, x);
  call.run(norm_max_pool_cpu());
  return y;
}

Tensor norm_max_pool_bwd_glue(const Tensor& grad, const Tensor& x, const Tensor& fields, const Tensor&, Sizes window, Sizes stride,
                              Sizes padding, Sizes dilation, bool ceil_mode) {
  Call call("norm_max_pool_bwd", x, fields, window, stride, padding, dilation, ceil_mode);
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(grad.dim() == x.dim() && grad.size(d) == call.out[d], "norm_max_pool_bwd: grad must have the shape of the output");
  Tensor grad_x = empty_fields(x, x.size(1));
  call.params.y = window_pool_tensor("norm_max_pool_bwd", grad, x);
  call.params.grad_x = window_pool_tensor("norm_max_pool_bwd", grad_x, x);
  call.run(norm_max_pool_bwd_cpu());
  return grad_x;
}

}  // namespace
}  // namespace equiconv

STABLE_TORCH_LIBRARY_IMPL(equiconv, CPU, m) {
  m.impl("norm_max_pool", EQUICONV_BOX(equiconv::norm_max_pool_glue));
  m.impl("norm_max_pool_bwd", EQUICONV_BOX(equiconv::norm_max_pool_bwd_glue));
}
