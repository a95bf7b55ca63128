// The CPU kernels, included by one translation unit per instruction set. This unit defines the
// set's name (ZOO_INSTRUCTION_SET) and its vector width in bytes (ZOO_VECTOR_BYTES). It includes
// cpu_includes.h before it enables the instruction set, so that code of the standard library does
// not use the set.
//
// The kernels process blocks of a few hundred sampling points, which fit into the L1 cache, in two
// steps. `locate` computes offsets and weights from locations, a vector of points at a time. Then
// each head's output is gathered, a vector of channels at a time. Everything is in an anonymous
// namespace, so that no other translation unit can call code for a newer processor.

#include "sampling.h"

namespace vitadapter_zoo {
namespace {

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(ZOO_VECTOR_BYTES)));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int lanes = ZOO_VECTOR_BYTES / sizeof(T);

typedef std::uint16_t HalfVector __attribute__((vector_size(ZOO_VECTOR_BYTES / 2)));

// Loads a value or a vector of consecutive values as F, which is the type of the sums or a vector
// of it.
template <typename F, typename T>
ZOO_INLINE F load(const T* from) {
  F value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename F>
ZOO_INLINE F load(const BFloat16* from) {
  constexpr bool scalar = std::is_same_v<F, float>;
  using Half = std::conditional_t<scalar, std::uint16_t, HalfVector>;
  using Bits = std::conditional_t<scalar, std::uint32_t, Vector<std::uint32_t>>;
  const Bits bits = convert<Bits>(load<Half>(&from->bits)) << 16;
  return load<F>(&bits);
}

template <typename F, typename T>
ZOO_INLINE void store(T* to, F value) {
  static_assert(sizeof value % sizeof *to == 0);
  std::memcpy(to, &value, sizeof value);
}

// Rounds to the nearest value, ties to even, like PyTorch.
template <typename F>
ZOO_INLINE void store(BFloat16* to, F value) {
  constexpr bool scalar = std::is_same_v<F, float>;
  using Half = std::conditional_t<scalar, std::uint16_t, HalfVector>;
  using Bits = std::conditional_t<scalar, std::uint32_t, Vector<std::uint32_t>>;
  const Bits bits = load<Bits>(&value);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store(&to->bits, convert<Half>(value == value ? rounded : Bits{} + 0x7fc0));
}

// Integers as wide as the type of the sums, so that vectors convert lane by lane.
template <typename A>
using Index = std::conditional_t<sizeof(A) == 8, std::int64_t, std::int32_t>;

constexpr int BLOCK = 256;  // sampling points in a block, if a query does not have more
constexpr int AHEAD = 16;   // number of points that prefetching is ahead

// The level and head of each point of a block, as `locate` needs them.
template <typename A>
struct Plan {
  std::int64_t queries;                  // in a block
  std::int64_t points;                   // of a query: heads * levels * points
  std::vector<Index<A>> width, height;   // of the point's level
  std::vector<Index<A>> start;           // of the level's first pixel, and
  std::vector<Index<A>> stride;          // from a row to the next, in vectors of channels

  explicit Plan(const Shape& s) {
    points = s.heads * s.levels * s.points;
    queries = std::max<std::int64_t>(1, BLOCK / points);
    for (std::int64_t query = 0; query < queries; ++query)
      for (std::int64_t h = 0; h < s.heads; ++h)
        for (std::int64_t l = 0; l < s.levels; ++l)
          for (std::int64_t p = 0; p < s.points; ++p) {
            width.push_back(s.level[l].width);
            height.push_back(s.level[l].height);
            start.push_back(Index<A>(s.level[l].start * s.heads + h));
            stride.push_back(Index<A>(s.level[l].width * s.heads));
          }
  }
};

// Weight and position of the four corners of a block's sampling points.
template <typename A>
struct Corners {
  std::vector<A> weight[4];
  std::vector<Index<A>> offset[4];  // in vectors of channels; the first is -1 outside the level

  explicit Corners(std::size_t points) {
    for (int corner = 0; corner < 4; ++corner) {
      weight[corner].resize(points);
      offset[corner].resize(points + AHEAD);
    }
  }
};

// Splits x, y, x, y, ... into the x and y coordinates of as many points as F has lanes.
template <typename A>
ZOO_INLINE void load_points(const A* from, A& x, A& y) {
  x = from[0];
  y = from[1];
}

template <typename A, int... LANE>
ZOO_INLINE void load_points(
    const A* from, Vector<A>& x, Vector<A>& y, std::integer_sequence<int, LANE...>) {
  const Vector<A> low = load<Vector<A>>(from), high = load<Vector<A>>(from + lanes<A>);
  x = __builtin_shufflevector(low, high, (2 * LANE)...);
  y = __builtin_shufflevector(low, high, (2 * LANE + 1)...);
}

template <typename A>
ZOO_INLINE void load_points(const A* from, Vector<A>& x, Vector<A>& y) {
  load_points<A>(from, x, y, std::make_integer_sequence<int, lanes<A>>());
}

// F and I are A and Index<A> for a single point, or vectors of them for several points.
template <typename F, typename I, typename A, typename W>
ZOO_INLINE void locate_points(
    const Plan<A>& plan, Index<A> heads, const A* locations, const W* weights, std::int64_t i,
    Corners<A>& corners) {
  F location_x, location_y;
  load_points<A>(locations + 2 * i, location_x, location_y);
  const Axis<F, I> x = axis(location_x, load<I>(&plan.width[i]));
  const Axis<F, I> y = axis(location_y, load<I>(&plan.height[i]));
  const I start = load<I>(&plan.start[i]), stride = load<I>(&plan.stride[i]);
  const I left = start + x.near_index * heads, right = start + x.far_index * heads;
  const I upper = y.near_index * stride, lower = y.far_index * stride;
  const auto inside = x.inside & y.inside;
  store(&corners.offset[0][i], inside ? upper + left : I{} - 1);
  store(&corners.offset[1][i], upper + right);
  store(&corners.offset[2][i], lower + left);
  store(&corners.offset[3][i], lower + right);
  const F weight = load<F>(weights + i);
  const F top = weight * y.near_weight, bottom = weight * y.far_weight;
  store(&corners.weight[0][i], top * x.near_weight);
  store(&corners.weight[1][i], top * x.far_weight);
  store(&corners.weight[2][i], bottom * x.near_weight);
  store(&corners.weight[3][i], bottom * x.far_weight);
}

template <typename A, typename W>
void locate(
    const Plan<A>& plan, Index<A> heads, std::int64_t points, const A* locations,
    const W* weights, Corners<A>& corners) {
  std::int64_t i = 0;
  for (; i + lanes<A> <= points; i += lanes<A>)
    locate_points<Vector<A>, Vector<Index<A>>>(plan, heads, locations, weights, i, corners);
  for (; i < points; ++i)
    locate_points<A, Index<A>>(plan, heads, locations, weights, i, corners);
}

// Computes N vectors of channels of a head's output. The sum over its points stays in registers.
template <int N, typename V, typename A>
ZOO_INLINE void gather(
    const Corners<A>& corners, std::int64_t first, std::int64_t points, const V* value,
    std::int64_t channels, V* output) {
  Vector<A> sum[N] = {};
  for (std::int64_t i = first; i < first + points; ++i) {
    for (int corner = 0; corner < 4; ++corner) {
      const V* later = value + std::int64_t(corners.offset[corner][i + AHEAD]) * channels;
      for (int n = 0; n < N; ++n) __builtin_prefetch(later + n * lanes<A>);
    }
    if (corners.offset[0][i] < 0) continue;
    for (int corner = 0; corner < 4; ++corner) {
      const V* pixel = value + std::int64_t(corners.offset[corner][i]) * channels;
      const A weight = corners.weight[corner][i];
      for (int n = 0; n < N; ++n) sum[n] += weight * load<Vector<A>>(pixel + n * lanes<A>);
    }
  }
  for (int n = 0; n < N; ++n) store(output + n * lanes<A>, sum[n]);
}

// C is the number of channels of a head, or 0 for any.
template <int C, typename V, typename A>
ZOO_INLINE void gather_head(
    const Corners<A>& corners, std::int64_t first, std::int64_t points, const V* value,
    std::int64_t channels, V* output) {
  if constexpr (C != 0) {
    gather<C / lanes<A>>(corners, first, points, value, std::int64_t(C), output);
    return;
  }
  std::int64_t c = 0;
  for (; c + lanes<A> <= channels; c += lanes<A>)
    gather<1>(corners, first, points, value + c, channels, output + c);
  for (; c < channels; ++c) {
    A sum = 0;
    for (std::int64_t i = first; i < first + points; ++i) {
      if (corners.offset[0][i] < 0) continue;
      for (int corner = 0; corner < 4; ++corner)
        sum += corners.weight[corner][i] *
            load<A>(value + std::int64_t(corners.offset[corner][i]) * channels + c);
    }
    store(output + c, sum);
  }
}

// Computes the output of the queries from begin to end. locate_block(plan, first, last, corners)
// computes the corners of a block of queries.
template <int C, typename V, typename A, typename F>
void forward_blocks(
    const Shape& s, const V* value, V* output, std::int64_t begin, std::int64_t end,
    const F& locate_block) {
  const Plan<A> plan(s);
  Corners<A> corners(plan.width.size());
  const std::int64_t per_head = s.levels * s.points;
  for (std::int64_t first = begin; first < end;) {
    const std::int64_t image = first / s.queries;
    const std::int64_t last = std::min({end, first + plan.queries, (image + 1) * s.queries});
    locate_block(plan, first, last, corners);
    const V* pixels = value + image * s.pixels * s.heads * s.channels;
    for (std::int64_t index = 0; index < (last - first) * s.heads; ++index)
      gather_head<C>(
          corners, index * per_head, per_head, pixels, s.channels,
          output + (first * s.heads + index) * s.channels);
    first = last;
  }
}

template <typename V, typename A, typename F>
void forward_queries(
    const Shape& s, const V* value, V* output, std::int64_t begin, std::int64_t end,
    const F& locate_block) {
  switch (s.channels) {
    case 32:
      return forward_blocks<32, V, A>(s, value, output, begin, end, locate_block);
    case 64:
      return forward_blocks<64, V, A>(s, value, output, begin, end, locate_block);
    default:
      return forward_blocks<0, V, A>(s, value, output, begin, end, locate_block);
  }
}

template <typename V, typename W, typename A>
void forward(
    const Shape& s, const V* value, const A* locations, const W* weights, V* output,
    std::int64_t begin, std::int64_t end) {
  const auto locate_block = [&](const Plan<A>& plan, std::int64_t first, std::int64_t last,
                                Corners<A>& corners) {
    const std::int64_t point = first * plan.points;
    locate(
        plan, Index<A>(s.heads), (last - first) * plan.points, locations + 2 * point,
        weights + point, corners);
  };
  forward_queries<V, A>(s, value, output, begin, end, locate_block);
}

// Computes exp for x <= 0, with an error of up to 2 units in the last place. Below -87 the result
// stays at 1e-38.
template <typename F>
ZOO_INLINE F exponential(F x) {
  using I = std::conditional_t<std::is_same_v<F, float>, std::int32_t, Vector<std::int32_t>>;
  const F lowest = F{} - 87.0f;
  x = x < lowest ? lowest : x;
  // x = n * log(2) + rest. Adding 1.5 * 2^23 puts n into the low bits.
  const F shifted = x * 1.44269504f + 12582912.0f;
  const F n = shifted - 12582912.0f;
  const F rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F sum = rest * (1.0f / 5040) + 1.0f / 720;  // the series of exp
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  const I bits = load<I>(&sum) + (load<I>(&shifted) << 23);
  return load<F>(&bits);
}

ZOO_INLINE void exponentials(float* values, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + lanes<float> <= count; i += lanes<float>)
    store(values + i, exponential(load<Vector<float>>(values + i)));
  for (; i < count; ++i) values[i] = exponential(values[i]);
}

ZOO_INLINE void exponentials(double* values, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) values[i] = std::exp(values[i]);
}

// Computes the softmax of each group of consecutive values.
template <typename A, typename W>
void softmax(const W* logits, std::int64_t groups, std::int64_t size, A* weights) {
  for (std::int64_t first = 0; first < groups * size; first += size) {
    A most = load<A>(logits + first);
    for (std::int64_t i = first + 1; i < first + size; ++i)
      most = std::max(most, load<A>(logits + i));
    for (std::int64_t i = first; i < first + size; ++i) weights[i] = load<A>(logits + i) - most;
  }
  exponentials(weights, groups * size);
  for (std::int64_t first = 0; first < groups * size; first += size) {
    A sum = 0;
    for (std::int64_t i = first; i < first + size; ++i) sum += weights[i];
    for (std::int64_t i = first; i < first + size; ++i) weights[i] /= sum;
  }
}

// Like `forward`, but from the outputs of the network's layers. It computes the locations and
// weights block by block, so they stay in the L1 cache.
template <typename V, typename W, typename A>
void forward_fused(
    const Shape& s, const V* value, const A* reference_points, const W* offsets, const W* logits,
    V* output, std::int64_t begin, std::int64_t end) {
  std::vector<A> locations, weights;
  const auto locate_block = [&](const Plan<A>& plan, std::int64_t first, std::int64_t last,
                                Corners<A>& corners) {
    const std::int64_t points = (last - first) * plan.points;
    locations.resize(2 * points);
    weights.resize(points);
    const W* from = offsets + 2 * first * plan.points;
    for (std::int64_t query = first, i = 0; query < last; ++query) {
      const A* at = reference_points + 2 * (query % s.queries);
      for (std::int64_t end_of_query = i + plan.points; i < end_of_query; ++i) {
        locations[2 * i] = at[0] + load<A>(from + 2 * i) / A(plan.width[i]);
        locations[2 * i + 1] = at[1] + load<A>(from + 2 * i + 1) / A(plan.height[i]);
      }
    }
    const std::int64_t group = s.levels * s.points;
    softmax(logits + first * plan.points, points / group, group, weights.data());
    locate(plan, Index<A>(s.heads), points, locations.data(), weights.data(), corners);
  };
  forward_queries<V, A>(s, value, output, begin, end, locate_block);
}

// Adds up a vector's lanes by halving the vector.
template <typename F, int... LANE>
ZOO_INLINE auto sum_lanes(F v, std::integer_sequence<int, LANE...>) {
  constexpr int half = sizeof...(LANE);
  const auto sums = __builtin_shufflevector(v, v, LANE...) +
      __builtin_shufflevector(v, v, (LANE + half)...);
  if constexpr (half == 1)
    return sums[0];
  else
    return sum_lanes(sums, std::make_integer_sequence<int, half / 2>());
}

// Processes a sampling point's four corners: adds `share[corner] * grad` to their gradients and
// computes the dot products `dot[corner]` of their values with `grad`. C as in gather_head.
template <int C, typename V, typename A>
ZOO_INLINE void scatter(
    const V* const value[4], A* const grad_value[4], const A share[4], const V* grad,
    std::int64_t channels, A dot[4]) {
  Vector<A> products[4] = {};
  std::int64_t c = 0;
  for (; c + lanes<A> <= (C ? C : channels); c += lanes<A>) {
    const Vector<A> g = load<Vector<A>>(grad + c);
    for (int corner = 0; corner < 4; ++corner) {
      products[corner] += g * load<Vector<A>>(value[corner] + c);
      A* to = grad_value[corner] + c;
      store(to, load<Vector<A>>(to) + share[corner] * g);
    }
  }
  for (int corner = 0; corner < 4; ++corner)
    dot[corner] = sum_lanes(products[corner], std::make_integer_sequence<int, lanes<A> / 2>());
  if constexpr (C == 0)
    for (; c < channels; ++c)
      for (int corner = 0; corner < 4; ++corner) {
        const A g = load<A>(grad + c);
        dot[corner] += g * load<A>(value[corner] + c);
        grad_value[corner][c] += share[corner] * g;
      }
}

template <int C, typename V, typename W, typename A>
void backward_heads(
    const Shape& s, const V* grad_output, const V* value, const A* locations, const W* weights,
    A* grad_value, A* grad_locations, W* grad_weights, std::int64_t begin, std::int64_t end) {
  for (std::int64_t index = begin; index < end; ++index) {
    const std::int64_t image = index / s.heads, head = index % s.heads;
    const std::int64_t base = (image * s.pixels * s.heads + head) * s.channels;
    for (std::int64_t query = 0; query < s.queries; ++query) {
      const std::int64_t row = (image * s.queries + query) * s.heads + head;
      const V* grad = grad_output + row * s.channels;
      std::int64_t point = row * s.levels * s.points;
      for (std::int64_t l = 0; l < s.levels; ++l)
        for (std::int64_t p = 0; p < s.points; ++p, ++point) {
          const Level& level = s.level[l];
          const Axis<A, int> x = axis(locations[2 * point], level.width);
          const Axis<A, int> y = axis(locations[2 * point + 1], level.height);
          PointGradient<A> gradient{0, 0, 0};
          if (x.inside && y.inside) {
            const A weight = load<A>(weights + point);
            const A by_row[2] = {weight * y.near_weight, weight * y.far_weight};
            const A share[4] = {
                by_row[0] * x.near_weight, by_row[0] * x.far_weight, by_row[1] * x.near_weight,
                by_row[1] * x.far_weight};
            const std::int64_t stride = s.heads * s.channels;
            const std::int64_t top =
                base + (level.start + std::int64_t(y.near_index) * level.width) * stride;
            const std::int64_t bottom =
                base + (level.start + std::int64_t(y.far_index) * level.width) * stride;
            const std::int64_t offset[4] = {
                top + x.near_index * stride, top + x.far_index * stride,
                bottom + x.near_index * stride, bottom + x.far_index * stride};
            const V* values[4];
            A* grads[4];
            for (int corner = 0; corner < 4; ++corner) {
              values[corner] = value + offset[corner];
              grads[corner] = grad_value + offset[corner];
            }
            A dot[4];
            scatter<C>(values, grads, share, grad, s.channels, dot);
            gradient = point_gradient(x, y, dot, weight, level.width, level.height);
          }
          store(grad_weights + point, gradient.weight);
          grad_locations[2 * point] = gradient.x;
          grad_locations[2 * point + 1] = gradient.y;
        }
    }
  }
}

template <typename V, typename W, typename A>
void backward(
    const Shape& s, const V* grad_output, const V* value, const A* locations, const W* weights,
    A* grad_value, A* grad_locations, W* grad_weights, std::int64_t begin, std::int64_t end) {
  const auto run = s.channels == 32 ? backward_heads<32, V, W, A>
      : s.channels == 64            ? backward_heads<64, V, W, A>
                                    : backward_heads<0, V, W, A>;
  run(s, grad_output, value, locations, weights, grad_value, grad_locations, grad_weights, begin,
      end);
}

#include "roi_align.inl"
#include "conv3x3.inl"

}  // namespace

#define ZOO_TEXT(name) #name
#define ZOO_NAME(name) ZOO_TEXT(name)
extern const InstructionSet ZOO_INSTRUCTION_SET = {
    ZOO_NAME(ZOO_INSTRUCTION_SET),
    {forward<float, float, float>, forward_fused<float, float, float>,
     backward<float, float, float>},
    {forward<double, double, double>, forward_fused<double, double, double>,
     backward<double, double, double>},
    {forward<BFloat16, BFloat16, float>, forward_fused<BFloat16, BFloat16, float>,
     backward<BFloat16, BFloat16, float>},
    {forward<BFloat16, float, float>, forward_fused<BFloat16, float, float>,
     backward<BFloat16, float, float>},
    {roi_align<float>, roi_align<BFloat16>, roi_align_backward},
    {conv_pack<float>, conv_scratch, conv_run<float>, CONV_ROWS},
    {conv_pack<BFloat16>, conv_scratch, conv_run<BFloat16>, CONV_ROWS},
};

}  // namespace vitadapter_zoo
