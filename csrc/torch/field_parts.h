// Parts of fields, whose channels share a variance: their statistics, the parameters that belong to them, and the
// gradients of these. A few numbers for each channel, between the passes over features.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>

#include "../field_norm.h"
#include "glue.h"

namespace equiconv {

using torch::headeronly::ScalarType;

// Calls body(pointer) with the tensor's numbers as they are.
template <class Body>
void with_numbers(const char* op, const Tensor& t, Body body) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": parameters and running statistics must be contiguous");
  switch (t.scalar_type()) {
    case ScalarType::Float: return body(static_cast<float*>(t.data_ptr()));
    case ScalarType::Double: return body(static_cast<double*>(t.data_ptr()));
    case ScalarType::BFloat16: return body(static_cast<torch::headeronly::BFloat16*>(t.data_ptr()));
    case ScalarType::Half: return body(static_cast<torch::headeronly::Half*>(t.data_ptr()));
    default: STD_TORCH_CHECK(false, op, ": parameters and running statistics must be floating point");
  }
}

// The numbers of some tensors, one after the other.
class NumberList {
 public:
  NumberList(const char* op, const std::vector<Tensor>& tensors) : op_(op), tensors_(tensors) {
    for (const Tensor& t : tensors)
      with_numbers(op, t, [&](const auto* from) { values_.insert(values_.end(), from, from + t.numel()); });
  }

  bool empty() const { return tensors_.empty(); }
  int64_t size() const { return int64_t(values_.size()); }
  double& operator[](int64_t place) { return values_[place]; }
  double operator[](int64_t place) const { return values_[place]; }

  // Writes them back.
  void store() const {
    const double* from = values_.data();
    for (const Tensor& t : tensors_) {
      with_numbers(op_, t, [&](auto* to) {
        for (int64_t i = 0; i < t.numel(); ++i) to[i] = static_cast<std::decay_t<decltype(*to)>>(from[i]);
      });
      from += t.numel();
    }
  }

 private:
  const char* op_;
  const std::vector<Tensor>& tensors_;
  std::vector<double> values_;
};

// Numbers of a part's running mean
inline int64_t means_of(const FieldNormPart& part) {
  return part.mean_group < 0 ? 0 : part.kind == int64_t(Mean::projected) ? part.size : 1;
}

// The table of parts, checked against the channels.
struct FieldParts {
  const FieldNormPart* rows;
  int64_t count, matrix_numbers;
  const Tensor& matrices;

  FieldParts(const char* op, const Tensor& parts, const Tensor& matrices, int64_t channels, ScalarType computed)
      : rows(static_cast<const FieldNormPart*>(parts.const_data_ptr())), count(parts.size(0)), matrix_numbers(matrices.numel()), matrices(matrices) {
    STD_TORCH_CHECK(parts.dim() == 2 && parts.size(1) * sizeof(int64_t) == sizeof(FieldNormPart) &&
                        parts.scalar_type() == ScalarType::Long && parts.is_contiguous(),
                    op, ": parts must be the int64 table of a batch norm");
    STD_TORCH_CHECK(matrices.is_contiguous() && matrices.scalar_type() == computed, op, ": matrices must be float64 with float64, else float32");
    int64_t channel = 0;
    for (const FieldNormPart& part : *this) {
      STD_TORCH_CHECK(part.channel == channel && part.size > 0, op, ": the parts do not follow each other");
      STD_TORCH_CHECK(part.kind >= 0 && part.kind <= int64_t(Mean::projected), op, ": there is no such mean");
      check_matrix(op, part.kind == int64_t(Mean::projected) ? part.projection : -1, part.size * part.size);
      check_matrix(op, part.spread, part.size * part.biases);
      channel += part.size;
    }
    STD_TORCH_CHECK(channel == channels, op, ": x must have ", channel, " channels, got ", channels);
  }

  const FieldNormPart* begin() const { return rows; }
  const FieldNormPart* end() const { return rows + count; }

  void check_matrix(const char* op, int64_t start, int64_t numbers) const {
    STD_TORCH_CHECK(start < 0 || start + numbers <= matrix_numbers, op, ": there is no such matrix");
  }

  // Every place of the table in a list of parameters: variances are those of weights, too.
  void check_parameters(const char* op, int64_t weights, int64_t biases) const {
    for (const FieldNormPart& part : *this) {
      STD_TORCH_CHECK(part.variance >= 0 && (weights == 0 || part.variance < weights), op, ": there are too few weights");
      STD_TORCH_CHECK(part.bias >= 0 && (biases == 0 || part.bias + part.biases <= biases), op, ": there are too few biases");
    }
  }

  void check_running(const char* op, int64_t means, int64_t vars) const {
    for (const FieldNormPart& part : *this) {
      STD_TORCH_CHECK(vars == 0 || part.variance < vars, op, ": there are too few running variances");
      STD_TORCH_CHECK(vars == 0 || part.mean + means_of(part) <= means, op, ": there are too few running means");
    }
  }
};

inline int64_t count_numbers(const std::vector<Tensor>& tensors) {
  int64_t count = 0;
  for (const Tensor& t : tensors) count += t.numel();
  return count;
}

// What moves running statistics, and by what channels are normalised.
struct StatisticsOptions {
  double eps;
  std::optional<double> momentum;
  bool batch;
  Statistics statistics;
};

// Statistics of parts from mean and variance of each channel; T: the numbers of the computation.
template <class T>
class PartStatistics {
 public:
  PartStatistics(const FieldParts& parts, const StatisticsOptions& options, NumberList& means, NumberList& vars, const std::vector<int64_t>& batches)
      : parts_(parts), options_(options), means_(means), vars_(vars), batches_(batches), matrices_(static_cast<const T*>(parts.matrices.const_data_ptr())) {}

  // Writes numbers [4, channels]; mean, var: of the channels, over so many values each
  void compute(const double* mean, const double* var, double values, const NumberList& weights, const NumberList& biases, T* numbers, int64_t channels) {
    for (const FieldNormPart& part : parts_) {
      double variance = 0;
      used_.assign(part.size, 0.0);
      if (options_.batch) variance = of_batch(part, mean + part.channel, var + part.channel, values);
      if (options_.statistics == Statistics::running) variance = running(part);
      const double deviation = 1 / std::sqrt(variance + options_.eps);
      const double scale = weights.empty() ? deviation : weights[part.variance] * deviation;
      for (int64_t i = 0; i < part.size; ++i) {
        T* of_channel = numbers + part.channel + i;
        of_channel[0] = T(scale);
        of_channel[channels] = T(bias(part, biases, i) - used_[i] * scale);
        of_channel[2 * channels] = T(used_[i]);
        of_channel[3 * channels] = T(deviation);
      }
    }
  }

 private:
  double of_batch(const FieldNormPart& part, const double* mean, const double* var, double values) {
    const Mean kind = Mean(part.kind);
    if (kind == Mean::average) {
      double sum = 0;
      for (int64_t i = 0; i < part.size; ++i) sum += mean[i];
      used_.assign(part.size, sum / double(part.size));
    } else if (kind == Mean::projected) {
      const T* matrix = matrices_ + part.projection;
      for (int64_t i = 0; i < part.size; ++i)
        for (int64_t j = 0; j < part.size; ++j) used_[i] += double(matrix[i * part.size + j]) * mean[j];
    }
    double variance = 0;
    for (int64_t i = 0; i < part.size; ++i) {
      const double apart = kind == Mean::zero || kind == Mean::average ? mean[i] - used_[i] : 0.0;
      variance += var[i] + apart * apart;
    }
    variance /= double(part.size);
    const double observed = values * double(part.samples);
    const double estimate = variance * (observed / std::max(observed - 1, 1.0));
    if (!vars_.empty()) {
      const double rate = options_.momentum ? *options_.momentum : 1.0 / double(batches_[std::min<size_t>(part.group, batches_.size() - 1)]);
      move(vars_[part.variance], estimate, rate);
      for (int64_t i = 0; i < means_of(part); ++i) move(means_[part.mean + i], used_[i], rate);
    }
    return options_.statistics == Statistics::values ? variance : estimate;
  }

  double running(const FieldNormPart& part) {
    const int64_t count = means_of(part);
    for (int64_t i = 0; i < part.size && count > 0; ++i) used_[i] = means_[part.mean + (count > 1 ? i : 0)];
    if (count == 0) used_.assign(part.size, 0.0);
    return vars_[part.variance];
  }

  // As torch's lerp_
  static void move(double& running, double value, double rate) {
    running = rate < 0.5 ? running + rate * (value - running) : value - (value - running) * (1 - rate);
  }

  double bias(const FieldNormPart& part, const NumberList& biases, int64_t i) const {
    if (biases.empty() || part.biases == 0) return 0;
    if (part.spread < 0) return biases[part.bias];
    double sum = 0;
    for (int64_t b = 0; b < part.biases; ++b) sum += double(matrices_[part.spread + i * part.biases + b]) * biases[part.bias + b];
    return sum;
  }

  const FieldParts& parts_;
  const StatisticsOptions& options_;
  NumberList &means_, &vars_;
  const std::vector<int64_t>& batches_;
  const T* matrices_;
  std::vector<double> used_;  // means of the channels of a part
};

// Gradients of weights and biases from the sums of g * (z - mean) and of g of each channel, where g is the gradient of
// what was multiplied by scale; T: the numbers of the computation.
template <class T>
void gradients_of_parts(const FieldParts& parts, const double* products, const double* sums, const T* deviation, T* weights, T* biases) {
  const T* matrices = static_cast<const T*>(parts.matrices.const_data_ptr());
  for (const FieldNormPart& part : parts) {
    double product = 0, sum = 0;
    for (int64_t c = part.channel; c < part.channel + part.size; ++c) product += products[c], sum += sums[c];
    if (weights) weights[part.variance] = T(product * double(deviation[part.channel]));
    if (!biases) continue;
    if (part.spread < 0 && part.biases > 0) biases[part.bias] = T(sum);
    for (int64_t b = 0; b < part.biases && part.spread >= 0; ++b) {
      double of_bias = 0;
      for (int64_t i = 0; i < part.size; ++i) of_bias += double(matrices[part.spread + i * part.biases + b]) * sums[part.channel + i];
      biases[part.bias + b] = T(of_bias);
    }
  }
}

// grad_x = scale * g + slope * (x - mean) + shift where mean and deviation are those of the values of each part.
template <class T>
void through_parts(const FieldParts& parts, const double* products, const double* sums, double values, const T* scale, const T* deviation,
                   T* slope, T* shift) {
  for (const FieldNormPart& part : parts) {
    double product = 0, sum = 0;
    for (int64_t c = part.channel; c < part.channel + part.size; ++c) product += products[c], sum += sums[c];
    const double count = values * double(part.size), d = deviation[part.channel], s = scale[part.channel];
    for (int64_t c = part.channel; c < part.channel + part.size; ++c) {
      slope[c] = T(-s * d * d * product / count);
      shift[c] = T(-s * sum / count);
    }
  }
}

}  // namespace equiconv
