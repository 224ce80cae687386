// Build information; the place for host-side numerics on NumPy arrays. No torch.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_host, m) {
  m.attr("compiler") = __VERSION__;
  m.attr("cuda_archs") = EQUICONV_CUDA_ARCHS;
}
