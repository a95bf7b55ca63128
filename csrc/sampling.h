// The arithmetic of bilinear sampling, forward and backward: the pixels around a location and their
// weights. The CPU and the CUDA kernels share it.
#pragma once

#include <type_traits>

#if defined(__CUDACC__)
#define ZOO_INLINE __host__ __device__ __forceinline__
#else
// Always inlined, because translation units for different instruction sets must not share a copy.
#define ZOO_INLINE inline __attribute__((always_inline))
#endif

namespace vitadapter_zoo {

// Computes T(value), lane by lane for vectors.
template <typename T, typename From>
ZOO_INLINE T convert(From value) {
#if !defined(__CUDACC__)
  if constexpr (!std::is_arithmetic_v<From>) return __builtin_convertvector(value, T);
  else
#endif
    return static_cast<T>(value);
}

// One coordinate of a sampling location on a level of `size` pixels, with the two nearest pixels.
// F is a floating-point type or a vector type. I is an integer type with the same number of lanes.
//
// Location 0..1 is at pixel `location * size - 0.5`. A neighbour outside of the border counts as
// zero: its weight and slope are 0. Its index is that of the other neighbour, which is safe
// to read. If both neighbours are outside, or for NaN, `inside` is false. Weights and slopes are
// then undefined, but the indices are still valid.
template <typename F, typename I>
struct Axis {
  I near_index, far_index;
  F near_weight, far_weight;  // 1 - distance to the pixel
  F near_slope, far_slope;    // derivative of the weight by the location in pixels
  decltype(F() < F()) inside;
};

template <typename F, typename I>
ZOO_INLINE Axis<F, I> axis_at(F pixel, I size) {
  const F zero{}, one = zero + 1;
  const I first{}, next = first + 1;
  const F extent = convert<F>(size);
  Axis<F, I> a;
  a.inside = (pixel > -one) & (pixel < extent);  // false for NaN
  pixel = a.inside ? pixel : zero;               // the conversion to an integer cannot overflow
  I floor = convert<I>(pixel);
  floor = pixel < convert<F>(floor) ? floor - next : floor;  // the conversion rounds towards zero
  const F fraction = pixel - convert<F>(floor);
  const auto has_near = floor >= first;
  const auto has_far = floor + next < size;
  a.near_index = has_near ? floor : first;
  a.far_index = has_far ? floor + next : size - next;
  a.near_weight = has_near ? one - fraction : zero;
  a.far_weight = has_far ? fraction : zero;
  a.near_slope = has_near ? -one : zero;
  a.far_slope = has_far ? one : zero;
  return a;
}

// Calls `axis_at` for a location in 0..1.
template <typename F, typename I>
ZOO_INLINE Axis<F, I> axis(F location, I size) {
  return axis_at<F, I>(location * convert<F>(size) - 0.5f, size);
}

// The gradients of a sampling point. They are computed from `dot[corner]`, the sums of output
// gradient times value at its four corners (top left, top right, bottom left, bottom right).
template <typename T>
struct PointGradient {
  T weight, x, y;  // x and y per unit of location, 0..1
};

template <typename T>
ZOO_INLINE PointGradient<T> point_gradient(
    const Axis<T, int>& x, const Axis<T, int>& y, const T dot[4], T weight, int width, int height) {
  const T top = x.near_weight * dot[0] + x.far_weight * dot[1];
  const T bottom = x.near_weight * dot[2] + x.far_weight * dot[3];
  const T left = y.near_weight * dot[0] + y.far_weight * dot[2];
  const T right = y.near_weight * dot[1] + y.far_weight * dot[3];
  PointGradient<T> g;
  g.weight = y.near_weight * top + y.far_weight * bottom;
  g.x = weight * T(width) * (x.near_slope * left + x.far_slope * right);
  g.y = weight * T(height) * (y.near_slope * top + y.far_slope * bottom);
  return g;
}

}  // namespace vitadapter_zoo
