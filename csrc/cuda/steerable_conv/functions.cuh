// Pointwise functions that follow a convolution.
#pragma once
#include "device.cuh"

namespace equiconv {

enum Function { identity, relu, elu };  // the order of ACTIVATIONS in equiconv/fused/layer.py

EQ_DEVICE float apply(int function, float x) {
  if (function == identity || x > 0) return x;
  return function == relu ? (x < 0 ? 0 : x) : expm1f(x);
}

}  // namespace equiconv
