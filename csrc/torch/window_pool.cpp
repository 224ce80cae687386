#include "window_pool.h"

#include "../cpu/isa.h"

EQUICONV_DECLARE_CPU(window_pool, WindowPoolParams)
EQUICONV_DECLARE_CPU(window_pool_bwd, WindowPoolParams)

namespace equiconv {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kStripNumbers = 1 << 16;  // of x in a tile, about: several tiles fit into the second-level cache
constexpr int64_t kLanes = 16;              // at most

struct Call {
  WindowPoolParams params{};
  Sizes out;  // shape of the output

  // A window of taps without numbers: there is none.
  Call(const char* op, const Tensor& x, const std::optional<Tensor>& filter, const Sizes& window, const Sizes& window_padding,
       const Sizes& dilation, const Sizes& kernel, const Sizes& stride, const Sizes& padding, bool ceil_mode) {
    const int64_t dimensions = x.dim() - 2;
    STD_TORCH_CHECK(dimensions == 2 || dimensions == 3, op, ": x must have two or three spatial dimensions");
    WindowPoolParams& p = params;
    p.x = window_pool_tensor(op, x, x);
    p.batch = x.size(0), p.channels = x.size(1), p.dtype = dtype_of(x);
    p.has_largest = !window.empty();
    STD_TORCH_CHECK(filter.has_value() != kernel.empty() && (filter || p.has_largest), op, ": a filter and its kernel belong together");
    if (p.has_largest) {
      spread(op, window, dimensions, 1, 1, p.largest.taps);
      spread(op, window_padding, dimensions, 0, 0, p.largest.padding);
      spread(op, dilation, dimensions, 1, 1, p.largest.dilation);
      if (filter) for (int64_t& s : p.largest.stride) s = 1;
      else spread(op, stride, dimensions, 1, 1, p.largest.stride);
    }
    if (filter) {
      spread(op, kernel, dimensions, 1, 1, p.sum.taps);
      spread(op, padding, dimensions, 0, 0, p.sum.padding);
      spread(op, stride, dimensions, 1, 1, p.sum.stride);
      for (int64_t& d : p.sum.dilation) d = 1;
      STD_TORCH_CHECK(filter->dim() == 2 && filter->is_contiguous() && filter->size(1) == p.channels &&
                          filter->size(0) == p.sum.taps[0] * p.sum.taps[1] * p.sum.taps[2] &&
                          filter->scalar_type() == (p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float),
                      op, ": filter must be [taps, channels] in float32 (float64 with float64)");
      p.filter = filter->const_data_ptr();
    }
    int64_t size[3];
    for (int d = 0; d < 3; ++d) {
      p.between[d] = p.has_largest ? count_windows(p.largest, d, p.x.size[d], ceil_mode && !filter) : p.x.size[d];
      size[d] = filter ? count_windows(p.sum, d, p.between[d], false) : p.between[d];
      STD_TORCH_CHECK(size[d] > 0, op, ": x is too small for the window");
    }
    out = dimensions == 3 ? Sizes{x.size(0), x.size(1), size[0], size[1], size[2]} : Sizes{x.size(0), x.size(1), size[0], size[2]};
  }

  // Numbers of the tiles for so many rows of the output, or of x.
  int64_t tile_numbers(int64_t rows, bool backward) const {
    const WindowPoolParams& p = params;
    auto reached = [](const WindowPoolGrid& grid, int64_t rows, int64_t size) {
      return std::min(size, (rows - 1) * grid.stride[0] + (grid.taps[0] - 1) * grid.dilation[0] + 1);
    };
    auto reaching = [](const WindowPoolGrid& grid, int64_t rows, int64_t size) {
      return std::min(size, (rows - 1 + (grid.taps[0] - 1) * grid.dilation[0]) / grid.stride[0] + 1);
    };
    int64_t between = rows, of_y = rows, of_x = rows;
    if (backward) {
      between = p.has_largest ? reaching(p.largest, rows, p.between[0]) : rows;
      of_y = p.filter ? reaching(p.sum, between, p.y.size[0]) : between;
      of_x = p.has_largest ? std::min(p.x.size[0], reached(p.largest, between, p.x.size[0]) + rows) : rows;
    } else {
      between = p.filter ? reached(p.sum, rows, p.between[0]) : rows;
      of_x = p.has_largest ? reached(p.largest, between, p.x.size[0]) : between;
    }
    const WindowMargin read = p.filter ? margin_read(p.sum, p.y.size[2], p.between[2]) : WindowMargin{};
    const WindowMargin reaching_sum = p.filter ? margin_reaching(p.sum, p.between[2], p.y.size[2]) : WindowMargin{};
    auto numbers = [](int64_t rows, const int64_t (&size)[3], const WindowMargin& margin) {
      return rows * size[1] * (margin.left + size[2] + margin.right);
    };
    const int64_t x = numbers(of_x, p.x.size, read), y = numbers(of_y, p.y.size, reaching_sum);
    const int64_t taps = p.filter ? p.sum.taps[0] * p.sum.taps[1] * p.sum.taps[2] : 0;
    return kLanes * (taps + (backward ? 2 : 1) * x + numbers(between, p.between, read) + y + 2 * std::max({x, y, p.between[2]}));
  }

  template <class Kernel>
  void run(bool backward, Kernel kernel) {
    WindowPoolParams& p = params;
    if (p.batch * p.channels == 0) return;
    const int64_t rows = backward ? p.x.size[0] : p.y.size[0], numbers = p.x.size[0] * p.x.plane();
    const bool is_small = numbers * p.batch * p.channels < kSerialNumbers / 4;
    p.strips = std::max(numbers * kLanes / kStripNumbers, is_small ? 1 : (kItems / 4 + p.batch - 1) / p.batch);
    p.strips = std::min(std::max<int64_t>(p.strips, 1), rows);
    const int64_t threads = is_small ? 1 : torch::stable::get_num_threads();
    const int64_t bytes = tile_numbers((rows + p.strips - 1) / p.strips, backward) * (p.dtype == DType::f64 ? 8 : 4);
    int64_t next_item = 0;
    torch::stable::parallel_for(0, std::min(threads, p.batch * p.strips), 1, [&](int64_t begin, int64_t end) {
      WindowPoolParams mine = p;
      mine.next_item = &next_item;
      mine.scratch = thread_scratch(bytes);
      kernel(mine, begin, end);
    });
  }
};

Tensor window_pool_glue(const Tensor& x, const std::optional<Tensor>& filter, Sizes window, Sizes window_padding, Sizes dilation,
                        Sizes kernel, Sizes stride, Sizes padding, bool ceil_mode) {
  Call call("window_pool", x, filter, window, window_padding, dilation, kernel, stride, padding, ceil_mode);
  Tensor y = empty_fields(x, call.out);
  call.params.y = window_pool_tensor("window_pool", y, x);
  call.run(false, window_pool_cpu());
  return y;
}

Tensor window_pool_bwd_glue(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& filter, Sizes window,
                            Sizes window_padding, Sizes dilation, Sizes kernel, Sizes stride, Sizes padding, bool ceil_mode) {
  Call call("window_pool_bwd", x, filter, window, window_padding, dilation, kernel, stride, padding, ceil_mode);
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(grad.dim() == x.dim() && grad.size(d) == call.out[d], "window_pool_bwd: grad must have the shape of the output");
  Tensor grad_x = empty_fields(x, x.size(1));
  call.params.y = window_pool_tensor("window_pool_bwd", grad, x);
  call.params.grad_x = window_pool_tensor("window_pool_bwd", grad_x, x);
  call.run(true, window_pool_bwd_cpu());
  return grad_x;
}

}  // namespace
}  // namespace equiconv

STABLE_TORCH_LIBRARY_IMPL(equiconv, CPU, m) {
  m.impl("window_pool", EQUICONV_BOX(equiconv::window_pool_glue));
  m.impl("window_pool_bwd", EQUICONV_BOX(equiconv::window_pool_bwd_glue));
}
