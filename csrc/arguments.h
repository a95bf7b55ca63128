// Checks the operator's arguments, so that the kernels never access memory out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>

namespace vitadapter_zoo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void require(
    bool condition, const std::string& message, const std::string& whose = "ms_deform_attn") {
  if (!condition) throw std::runtime_error(whose + ": " + message);
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

struct Arguments {
  Tensor value, spatial_shapes, locations, weights;  // contiguous
  std::int64_t batch, pixels, heads, channels, queries, levels, points;
  ScalarType type, weights_type, sums_type;

  // With `fused`, locations are offsets and weights are logits, and both have the same dtype.
  Arguments(
      const Tensor& v, const Tensor& s, const Tensor& l, const Tensor& w, bool fused = false)
      : value(torch::stable::contiguous(v)),
        spatial_shapes(torch::stable::contiguous(s)),
        locations(torch::stable::contiguous(l)),
        weights(torch::stable::contiguous(w)) {
    require(
        value.dim() == 4 && spatial_shapes.dim() == 2 && locations.dim() == 6 &&
            weights.dim() == 5,
        "wrong number of dimensions");
    batch = value.size(0);
    pixels = value.size(1);
    heads = value.size(2);
    channels = value.size(3);
    queries = locations.size(1);
    levels = spatial_shapes.size(0);
    points = locations.size(4);
    type = value.scalar_type();
    weights_type = weights.scalar_type();
    sums_type = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;

    const std::int64_t grouped[5] = {batch, queries, heads, levels, points};
    bool fits = spatial_shapes.size(1) == 2 && locations.size(5) == 2;
    for (int i = 0; i < 5; ++i)
      fits = fits && locations.size(i) == grouped[i] && weights.size(i) == grouped[i];
    require(fits, "the shapes of the arguments do not fit each other");
    require(spatial_shapes.scalar_type() == ScalarType::Long, "spatial_shapes must be int64");
    require(
        locations.scalar_type() == (fused ? weights_type : sums_type),
        fused ? "sampling_offsets and attention_logits must have one dtype"
              : "sampling_locations must be float32, or float64 with values of float64");
    require(
        weights_type == type || weights_type == sums_type,
        "attention_weights must have the dtype of value or of sampling_locations");
    for (const Tensor* other : {&spatial_shapes, &locations, &weights})
      require(
          other->device() == value.device(), "all arguments must be on the device of value");
    require(
        heads == 0 || pixels <= std::numeric_limits<int>::max() / heads,
        "value has more pixels * heads than int32 can count");
  }

  // True if there are no output elements or no points to add up.
  bool empty() const {
    return value.numel() == 0 || locations.numel() == 0;
  }

  Tensor new_output() const {
    const std::int64_t size[3] = {batch, queries, heads * channels};
    return torch::stable::new_empty(value, {size, 3});
  }

  Tensor check_reference_points(const Tensor& points) const {
    require(
        points.dim() == 2 && points.size(0) == queries && points.size(1) == 2 &&
            points.scalar_type() == sums_type && points.device() == value.device(),
        "reference_points must be [queries, 2], of the dtype of the sums, on value's device");
    return torch::stable::contiguous(points);
  }
};

// Checks the output's gradient and allocates the gradients of the inputs. The kernels add to
// `value`, which is zeros in the type of the sums.
struct Gradients {
  Tensor output, value, locations, weights;

  Gradients(const Arguments& a, const Tensor& grad_output)
      : output(torch::stable::contiguous(grad_output)),
        value(torch::stable::new_zeros(a.value, a.value.sizes(), a.sums_type)),
        locations(torch::stable::empty_like(a.locations)),
        weights(torch::stable::empty_like(a.weights)) {
    require(
        output.dim() == 3 && output.size(0) == a.batch && output.size(1) == a.queries &&
            output.size(2) == a.heads * a.channels && output.scalar_type() == a.type &&
            output.device() == a.value.device(),
        "the gradient's shape, dtype or device is not that of the output");
    if (a.empty()) {
      torch::stable::zero_(locations);
      torch::stable::zero_(weights);
    }
  }

  std::tuple<Tensor, Tensor, Tensor> result(const Arguments& a) const {
    return {torch::stable::to(value, a.type), locations, weights};
  }
};

}  // namespace vitadapter_zoo
