// The operator on CUDA: kernels for every shape, and the selection of the faster kernels in
// cuda_vector.cuh. Their arithmetic is in sampling.h, which the CPU kernels share.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "arguments.h"
#include "cuda_vector.cuh"
#include "sampling.h"

namespace vitadapter_zoo {
namespace {

constexpr int THREADS = 256;
constexpr std::int64_t MOST_BLOCKS = 1 << 20;  // with more work, each block loops

// The type of sums: double if the values are double, otherwise float.
template <typename V>
using Sum = std::conditional_t<std::is_same_v<V, double>, double, float>;

// value [batch, pixels, heads, channels], locations [batch, queries, heads, levels, points, 2],
// weights [batch, queries, heads, levels, points], output [batch, queries, heads, channels].
struct Sizes {
  std::int64_t batch, pixels, heads, channels, queries, levels, points;
};

// A level of spatial_shapes, [levels, 2] in the device's memory. The host cannot check the numbers
// before the launch without waiting for the device. A level that reaches beyond `value` therefore
// gets height 0, and the kernels skip it.
struct Level {
  int height, width;
  std::int64_t start;

  __device__ Level(const std::int64_t* shapes, std::int64_t l, std::int64_t first, const Sizes& s)
      : start(first) {
    const std::int64_t h = shapes[2 * l], w = shapes[2 * l + 1];
    const bool fits = h > 0 && w > 0 && h <= (s.pixels - first) / w;
    height = fits ? int(h) : 0;
    width = fits ? int(w) : 0;
  }

  __device__ std::int64_t end() const {
    return start + std::int64_t(height) * width;
  }
};

// One thread for each channel of each query.
template <typename V, typename W>
__global__ void forward_kernel(
    Sizes s, const V* __restrict__ value, const std::int64_t* __restrict__ shapes,
    const Sum<V>* __restrict__ locations, const W* __restrict__ weights, V* __restrict__ output) {
  using A = Sum<V>;
  const std::int64_t total = s.batch * s.queries * s.heads * s.channels;
  const std::int64_t step = std::int64_t(gridDim.x) * blockDim.x;
  for (std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total; i += step) {
    const std::int64_t channel = i % s.channels, row = i / s.channels;
    const std::int64_t head = row % s.heads, image = row / s.heads / s.queries;
    const std::int64_t stride = s.heads * s.channels;  // between consecutive pixels
    const V* pixels = value + image * s.pixels * stride + head * s.channels + channel;
    std::int64_t point = row * s.levels * s.points, start = 0;
    A sum = 0;
    for (std::int64_t l = 0; l < s.levels; ++l) {
      const Level level(shapes, l, start, s);
      for (std::int64_t p = 0; p < s.points; ++p, ++point) {
        const Axis<A, int> x = axis(locations[2 * point], level.width);
        const Axis<A, int> y = axis(locations[2 * point + 1], level.height);
        if (level.height == 0 || !x.inside || !y.inside) continue;
        const V* top = pixels + (start + std::int64_t(y.near_index) * level.width) * stride;
        const V* bottom = pixels + (start + std::int64_t(y.far_index) * level.width) * stride;
        const A upper = x.near_weight * A(top[x.near_index * stride]) +
            x.far_weight * A(top[x.far_index * stride]);
        const A lower = x.near_weight * A(bottom[x.near_index * stride]) +
            x.far_weight * A(bottom[x.far_index * stride]);
        sum += A(weights[point]) * (y.near_weight * upper + y.far_weight * lower);
      }
      start = level.end();
    }
    output[i] = V(sum);
  }
}

// One warp for each head of each query; its lanes share the channels. Sums over channels have a
// fixed order. Sums of grad_value do not, because several queries add to the same pixels.
template <typename V, typename W>
__global__ void backward_kernel(
    Sizes s, const V* __restrict__ grad_output, const V* __restrict__ value,
    const std::int64_t* __restrict__ shapes, const Sum<V>* __restrict__ locations,
    const W* __restrict__ weights, Sum<V>* grad_value, Sum<V>* __restrict__ grad_locations,
    W* __restrict__ grad_weights) {
  using A = Sum<V>;
  const int lane = threadIdx.x % WARP;
  const std::int64_t total = s.batch * s.queries * s.heads;
  const std::int64_t step = std::int64_t(gridDim.x) * blockDim.x / WARP;
  const std::int64_t first = (std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
  for (std::int64_t row = first; row < total; row += step) {
    const std::int64_t head = row % s.heads, image = row / s.heads / s.queries;
    const std::int64_t stride = s.heads * s.channels;
    const std::int64_t base = image * s.pixels * stride + head * s.channels;
    const V* grads = grad_output + row * s.channels;
    std::int64_t point = row * s.levels * s.points, start = 0;
    for (std::int64_t l = 0; l < s.levels; ++l) {
      const Level level(shapes, l, start, s);
      for (std::int64_t p = 0; p < s.points; ++p, ++point) {
        const Axis<A, int> x = axis(locations[2 * point], level.width);
        const Axis<A, int> y = axis(locations[2 * point + 1], level.height);
        PointGradient<A> gradient{0, 0, 0};
        if (level.height > 0 && x.inside && y.inside) {  // the same for all lanes of the warp
          const A weight = A(weights[point]);
          const std::int64_t top = base + (start + std::int64_t(y.near_index) * level.width) * stride;
          const std::int64_t bottom =
              base + (start + std::int64_t(y.far_index) * level.width) * stride;
          const std::int64_t corner[4] = {
              top + x.near_index * stride, top + x.far_index * stride,
              bottom + x.near_index * stride, bottom + x.far_index * stride};
          const A share[4] = {
              weight * y.near_weight * x.near_weight, weight * y.near_weight * x.far_weight,
              weight * y.far_weight * x.near_weight, weight * y.far_weight * x.far_weight};
          A dot[4] = {0, 0, 0, 0};
          for (std::int64_t c = lane; c < s.channels; c += WARP) {
            const A grad = A(grads[c]);
            for (int k = 0; k < 4; ++k) {
              dot[k] += grad * A(value[corner[k] + c]);
              atomicAdd(grad_value + corner[k] + c, share[k] * grad);
            }
          }
          for (int k = 0; k < 4; ++k)
            for (int distance = WARP / 2; distance > 0; distance /= 2)
              dot[k] += __shfl_xor_sync(0xffffffff, dot[k], distance);
          gradient = point_gradient(x, y, dot, weight, level.width, level.height);
        }
        if (lane == 0) {
          grad_weights[point] = W(gradient.weight);
          grad_locations[2 * point] = gradient.x;
          grad_locations[2 * point + 1] = gradient.y;
        }
      }
      start = level.end();
    }
  }
}

// Calls run(V(), W()) with the types of the values and the weights.
template <typename F>
void dispatch(const Arguments& a, const F& run) {
  const bool same = a.weights_type == a.type;
  switch (a.type) {
    case ScalarType::Float:
      return run(float(), float());
    case ScalarType::Double:
      return run(double(), double());
    case ScalarType::Half:
      if (same) return run(torch::headeronly::Half(), torch::headeronly::Half());
      return run(torch::headeronly::Half(), float());
    case ScalarType::BFloat16:
      if (same) return run(torch::headeronly::BFloat16(), torch::headeronly::BFloat16());
      return run(torch::headeronly::BFloat16(), float());
    default:
      require(false, "value must be float32, float64, float16 or bfloat16");
  }
}

Sizes sizes_of(const Arguments& a) {
  return {a.batch, a.pixels, a.heads, a.channels, a.queries, a.levels, a.points};
}

unsigned int blocks_for(std::int64_t threads) {
  return unsigned(std::min((threads + THREADS - 1) / THREADS, MOST_BLOCKS));
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  // torch's macro for this check is not used, because its name differs between 2.11 and 2.14.
  require(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
      "PyTorch has no CUDA stream for this device");
  return static_cast<cudaStream_t>(stream);
}

// Whether the kernels of cuda_vector.cuh can compute this.
bool fits_vectors(const Arguments& a, int lanes) {
  const bool shapes = a.points == VECTOR_POINTS &&
      (a.levels == 1 || a.levels == 3 || a.levels == 4) && a.type != ScalarType::Double;
  const std::int64_t team = a.channels / lanes;
  const bool teams = a.channels % lanes == 0 && team <= WARP && (team & (team - 1)) == 0;
  bool plain = true;
  for (const Tensor* tensor : {&a.value, &a.locations, &a.weights}) {
    plain = plain && tensor->numel() <= std::numeric_limits<int>::max();
    plain = plain && reinterpret_cast<std::uintptr_t>(tensor->const_data_ptr()) % 16 == 0;
  }
  return shapes && teams && plain &&
      a.batch * a.queries * a.heads * a.channels <= std::numeric_limits<int>::max();
}

SmallSizes small_sizes_of(const Arguments& a) {
  return {int(a.batch), int(a.pixels), int(a.heads), int(a.channels), int(a.queries)};
}

// Calls run(V(), W()) with the types of the values and the weights, as `dispatch`, without double.
template <typename F>
void dispatch_narrow(const Arguments& a, const F& run) {
  dispatch(a, [&](auto value_type, auto weight_type) {
    if constexpr (!std::is_same_v<decltype(value_type), double>) run(value_type, weight_type);
  });
}

// Calls run with the number of levels as a type. `fits_vectors` has checked the number.
template <typename F>
void dispatch_levels(const Arguments& a, const F& run) {
  if (a.levels == 1) return run(std::integral_constant<int, 1>());
  if (a.levels == 3) return run(std::integral_constant<int, 3>());
  run(std::integral_constant<int, 4>());
}

// Launches the vector kernel, plain or fused. Only FUSED uses `references`.
template <bool FUSED>
Tensor forward_by_vectors(const Arguments& a, const float* references) {
  Tensor output = a.new_output();
  dispatch_narrow(a, [&](auto value_type, auto weight_type) {
    using V = decltype(value_type);
    using W = decltype(weight_type);
    using P = std::conditional_t<FUSED, W, float>;
    dispatch_levels(a, [&](auto levels) {
      const std::int64_t threads = output.numel() * sizeof(V) / 16;
      forward_vector_kernel<V, W, P, levels(), FUSED>
          <<<blocks_for(threads), VECTOR_THREADS, 0, current_stream(a.value)>>>(
              small_sizes_of(a), data<V>(a.value), data<std::int64_t>(a.spatial_shapes),
              references, data<P>(a.locations), data<W>(a.weights), mutable_data<V>(output));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return output;
}

template <bool FUSED>
std::tuple<Tensor, Tensor, Tensor> backward_by_vectors(
    const Arguments& a, const Gradients& grads, const float* references) {
  dispatch_narrow(a, [&](auto value_type, auto weight_type) {
    using V = decltype(value_type);
    using W = decltype(weight_type);
    using P = std::conditional_t<FUSED, W, float>;
    dispatch_levels(a, [&](auto levels) {
      const std::int64_t threads = a.batch * a.queries * a.heads * a.channels / 4;
      backward_vector_kernel<V, W, P, levels(), FUSED>
          <<<blocks_for(threads), VECTOR_THREADS, 0, current_stream(a.value)>>>(
              small_sizes_of(a), data<V>(grads.output), data<V>(a.value),
              data<std::int64_t>(a.spatial_shapes), references, data<P>(a.locations),
              data<W>(a.weights), mutable_data<float>(grads.value),
              mutable_data<P>(grads.locations), mutable_data<W>(grads.weights));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return grads.result(a);
}

Tensor forward(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& sampling_locations,
    const Tensor& attention_weights) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Arguments a(value, spatial_shapes, sampling_locations, attention_weights);
  if (!a.empty() && fits_vectors(a, 16 / int(a.value.element_size())))
    return forward_by_vectors<false>(a, nullptr);
  Tensor output = a.new_output();
  if (a.empty()) return torch::stable::zero_(output);
  dispatch(a, [&](auto value_type, auto weight_type) {
    using V = decltype(value_type);
    using W = decltype(weight_type);
    forward_kernel<V, W><<<blocks_for(output.numel()), THREADS, 0, current_stream(a.value)>>>(
        sizes_of(a), data<V>(a.value), data<std::int64_t>(a.spatial_shapes),
        data<Sum<V>>(a.locations), data<W>(a.weights), mutable_data<V>(output));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Arguments a(value, spatial_shapes, sampling_locations, attention_weights);
  const Gradients grads(a, grad_output);
  if (a.empty()) return grads.result(a);
  if (fits_vectors(a, 4)) return backward_by_vectors<false>(a, grads, nullptr);
  dispatch(a, [&](auto value_type, auto weight_type) {
    using V = decltype(value_type);
    using W = decltype(weight_type);
    const unsigned int blocks = blocks_for(a.batch * a.queries * a.heads * WARP);
    backward_kernel<V, W><<<blocks, THREADS, 0, current_stream(a.value)>>>(
        sizes_of(a), data<V>(grads.output), data<V>(a.value),
        data<std::int64_t>(a.spatial_shapes), data<Sum<V>>(a.locations), data<W>(a.weights),
        mutable_data<Sum<V>>(grads.value), mutable_data<Sum<V>>(grads.locations),
        mutable_data<W>(grads.weights));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return grads.result(a);
}

Tensor forward_fused(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& reference_points,
    const Tensor& sampling_offsets, const Tensor& attention_logits) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Arguments a(value, spatial_shapes, sampling_offsets, attention_logits, true);
  const Tensor points = a.check_reference_points(reference_points);
  require(
      fits_vectors(a, 16 / int(a.value.element_size())),
      "the fused kernel does not take these shapes on CUDA");
  if (a.empty()) {
    Tensor output = a.new_output();
    return torch::stable::zero_(output);
  }
  return forward_by_vectors<true>(a, data<float>(points));
}

std::tuple<Tensor, Tensor, Tensor> backward_fused(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes,
    const Tensor& reference_points, const Tensor& sampling_offsets,
    const Tensor& attention_logits) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Arguments a(value, spatial_shapes, sampling_offsets, attention_logits, true);
  const Tensor points = a.check_reference_points(reference_points);
  const Gradients grads(a, grad_output);
  require(fits_vectors(a, 4), "the fused gradient does not take these shapes on CUDA");
  if (a.empty()) return grads.result(a);
  return backward_by_vectors<true>(a, grads, data<float>(points));
}

}  // namespace
}  // namespace vitadapter_zoo

STABLE_TORCH_LIBRARY_IMPL(vitadapter_zoo, CUDA, m) {
  m.impl("_ms_deform_attn", TORCH_BOX(&vitadapter_zoo::forward));
  m.impl("_ms_deform_attn_backward", TORCH_BOX(&vitadapter_zoo::backward));
  m.impl("_ms_deform_attn_fused", TORCH_BOX(&vitadapter_zoo::forward_fused));
  m.impl("_ms_deform_attn_fused_backward", TORCH_BOX(&vitadapter_zoo::backward_fused));
}
