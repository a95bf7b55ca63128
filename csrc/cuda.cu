// The operator on CUDA. Not run where it was written: its arithmetic is sampling.h, which the CPU
// kernels share and the tests exercise.

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "arguments.h"
#include "sampling.h"

namespace vitadapter_zoo {
namespace {

constexpr int THREADS = 256;
constexpr int WARP = 32;
constexpr std::int64_t MOST_BLOCKS = 1 << 20;  // beyond that, each takes several turns

// float, or double where the values are double.
template <typename V>
using Sum = std::conditional_t<std::is_same_v<V, double>, double, float>;

// value [batch, pixels, heads, channels], locations [batch, queries, heads, levels, points, 2],
// weights [batch, queries, heads, levels, points], output [batch, queries, heads, channels].
struct Sizes {
  std::int64_t batch, pixels, heads, channels, queries, levels, points;
};

// A level of spatial_shapes, [levels, 2] in the device's memory. Its numbers cannot be checked
// before the launch without waiting for the device: one that reaches beyond `value` gets height 0
// and is left out.
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
    const std::int64_t stride = s.heads * s.channels;  // from pixel to pixel
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

// One warp for each head of each query: its lanes share the channels. The sums over channels are
// made in a fixed order; those of grad_value are not, as queries meet at its pixels.
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
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor forward(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& sampling_locations,
    const Tensor& attention_weights) {
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Arguments a(value, spatial_shapes, sampling_locations, attention_weights);
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

}  // namespace
}  // namespace vitadapter_zoo

STABLE_TORCH_LIBRARY_IMPL(vitadapter_zoo, CUDA, m) {
  m.impl("_ms_deform_attn", TORCH_BOX(&vitadapter_zoo::forward));
  m.impl("_ms_deform_attn_backward", TORCH_BOX(&vitadapter_zoo::backward));
}
