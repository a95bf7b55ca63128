// The operator on the CPU: checks arguments, selects the instruction set and starts threads.

#include <cstdlib>
#include <string_view>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "arguments.h"
#include "cpu_kernels.h"
#include "pieces.h"

namespace vitadapter_zoo {
namespace {

const InstructionSet& choose() {
#if defined(__x86_64__)
  const char* variable = std::getenv("VITADAPTER_ZOO_CPU");
  const std::string_view most = variable ? variable : "";
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl");
  if (has_avx512 && most != "portable" && most != "avx2") return avx512;
  if (has_avx2 && most != "portable") return avx2;
#endif
  return portable;
}

}  // namespace

const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

namespace {

// Calls `run` with the kernels for the types of these arguments.
template <typename F>
void dispatch(const Arguments& a, const F& run) {
  const InstructionSet& set = instruction_set();
  switch (a.type) {
    case ScalarType::Float:
      return run(set.float32);
    case ScalarType::Double:
      return run(set.float64);
    case ScalarType::BFloat16:
      if (a.weights_type == ScalarType::Float) return run(set.bfloat16_float_weights);
      return run(set.bfloat16);
    default:
      require(false, "on the CPU value must be float32, float64 or bfloat16");
  }
}

std::vector<Level> read_levels(const Arguments& a) {
  const std::int64_t* sizes = data<std::int64_t>(a.spatial_shapes);
  std::vector<Level> levels;
  std::int64_t start = 0;
  for (std::int64_t l = 0; l < a.levels; ++l) {
    const std::int64_t height = sizes[2 * l], width = sizes[2 * l + 1];
    // The comparison divides, because the product of two wrong numbers might overflow.
    require(
        height > 0 && width > 0 && height <= (a.pixels - start) / width,
        "spatial_shapes do not add up to the pixels of value");
    levels.push_back({int(height), int(width), start});
    start += height * width;
  }
  require(start == a.pixels, "spatial_shapes do not add up to the pixels of value");
  return levels;
}

Shape shape_of(const Arguments& a, const std::vector<Level>& levels) {
  return {a.batch, a.pixels, a.heads, a.channels, a.queries, a.levels, a.points, levels.data()};
}

// Asks for huge pages. A large output is often new memory, and mapping it in pages of 4 KB can take
// longer than computing it.
void use_huge_pages(const Tensor& output) {
#if defined(__linux__)
  constexpr std::size_t PAGE = 2 << 20;
  const std::size_t begin = reinterpret_cast<std::size_t>(output.mutable_data_ptr());
  const std::size_t end = begin + output.numel() * output.element_size();
  const std::size_t first = (begin + PAGE - 1) / PAGE * PAGE, last = end / PAGE * PAGE;
  // The result is ignored: if the system rejects the advice, pages stay small.
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

constexpr std::int64_t GRAIN = 64;  // fewest queries of a piece

// run(kernels, shape, output, begin, end) computes the queries from begin to end.
template <typename F>
Tensor run_forward(const Arguments& a, const F& run) {
  const std::vector<Level> levels = read_levels(a);
  const Shape shape = shape_of(a, levels);
  Tensor output = a.new_output();
  if (a.empty()) return torch::stable::zero_(output);
  use_huge_pages(output);
  dispatch(a, [&]<typename V, typename W, typename A>(const Kernels<V, W, A>& kernels) {
    in_pieces(a.batch * a.queries, GRAIN, [&](std::int64_t begin, std::int64_t end) {
      run(kernels, shape, mutable_data<V>(output), begin, end);
    });
  });
  return output;
}

Tensor forward(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& sampling_locations,
    const Tensor& attention_weights) {
  const Arguments a(value, spatial_shapes, sampling_locations, attention_weights);
  return run_forward(
      a, [&]<typename V, typename W, typename A>(
             const Kernels<V, W, A>& kernels, const Shape& shape, V* output, std::int64_t begin,
             std::int64_t end) {
        kernels.forward(
            shape, data<V>(a.value), data<A>(a.locations), data<W>(a.weights), output, begin, end);
      });
}

Tensor forward_fused(
    const Tensor& value, const Tensor& spatial_shapes, const Tensor& reference_points,
    const Tensor& sampling_offsets, const Tensor& attention_logits) {
  const Arguments a(value, spatial_shapes, sampling_offsets, attention_logits, true);
  const Tensor points = a.check_reference_points(reference_points);
  return run_forward(
      a, [&]<typename V, typename W, typename A>(
             const Kernels<V, W, A>& kernels, const Shape& shape, V* output, std::int64_t begin,
             std::int64_t end) {
        kernels.forward_fused(
            shape, data<V>(a.value), data<A>(points), data<W>(a.locations), data<W>(a.weights),
            output, begin, end);
      });
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad_output, const Tensor& value, const Tensor& spatial_shapes,
    const Tensor& sampling_locations, const Tensor& attention_weights) {
  const Arguments a(value, spatial_shapes, sampling_locations, attention_weights);
  const std::vector<Level> levels = read_levels(a);
  const Shape shape = shape_of(a, levels);
  const Gradients grads(a, grad_output);
  if (a.empty()) return grads.result(a);
  dispatch(a, [&]<typename V, typename W, typename A>(const Kernels<V, W, A>& kernels) {
    in_pieces(a.batch * a.heads, 1, [&](std::int64_t begin, std::int64_t end) {
      kernels.backward(
          shape, data<V>(grads.output), data<V>(a.value), data<A>(a.locations),
          data<W>(a.weights), mutable_data<A>(grads.value), mutable_data<A>(grads.locations),
          mutable_data<W>(grads.weights), begin, end);
    });
  });
  return grads.result(a);
}

}  // namespace
}  // namespace vitadapter_zoo

extern "C" const char* vitadapter_zoo_instruction_set() {
  return vitadapter_zoo::instruction_set().name;
}

// Python declares these operators (ops/deform_attn.py). The public operator calls them after the
// check of the loaded library.
STABLE_TORCH_LIBRARY_IMPL(vitadapter_zoo, CPU, m) {
  m.impl("_ms_deform_attn", TORCH_BOX(&vitadapter_zoo::forward));
  m.impl("_ms_deform_attn_fused", TORCH_BOX(&vitadapter_zoo::forward_fused));
  m.impl("_ms_deform_attn_backward", TORCH_BOX(&vitadapter_zoo::backward));
}
