// Fast CUDA kernels for the shapes that detectors use: 4 points on 1, 3 or 4 levels, and a number
// of channels that is a multiple of a 16-byte load. Other shapes use the general kernels in
// cuda.cu.
//
// Three properties make them fast. A load reads 4 or 8 channels, which share the arithmetic of the
// sampling point. Indices are 32 bits wide. Levels and points are template arguments, so loops are
// unrolled and attention weights stay in registers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "sampling.h"

namespace vitadapter_zoo {

constexpr int VECTOR_THREADS = 256;
constexpr int VECTOR_POINTS = 4;
constexpr int WARP = 32;

// The sizes of one call, as in cuda.cu; every tensor has fewer than 2^31 elements.
struct SmallSizes {
  int batch, pixels, heads, channels, queries;
};

// A level in the device's memory. The host cannot check its numbers before the launch without a
// synchronization. A level that reaches beyond `value` gets height 0, and the kernels skip it.
struct SmallLevel {
  int height, width, start;

  __device__ __forceinline__ SmallLevel(
      const std::int64_t* shapes, int level, int first, int pixels)
      : start(first) {
    const std::int64_t h = __ldg(shapes + 2 * level), w = __ldg(shapes + 2 * level + 1);
    const bool fits = h > 0 && w > 0 && h <= pixels && w <= pixels && h * w <= pixels - first;
    height = fits ? int(h) : 0;
    width = fits ? int(w) : 0;
  }

  __device__ __forceinline__ int end() const {
    return start + height * width;
  }
};

// Reads `N` consecutive numbers as float, with the widest loads that their size allows.
template <int N, typename T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  constexpr int BYTES = N * sizeof(T);
  static_assert(BYTES == 8 || BYTES % 16 == 0);
  if constexpr (BYTES == 8) {
    union {
      uint2 raw;
      unsigned short bits[4];
      float wide[2];
    } u;
    u.raw = __ldg(reinterpret_cast<const uint2*>(from));
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if constexpr (sizeof(T) == 2) to[k] = float(T(u.bits[k], T::from_bits()));
      else to[k] = u.wide[k];
    }
  } else {
#pragma unroll
    for (int part = 0; part < BYTES / 16; ++part) {
      constexpr int EACH = 16 / sizeof(T);
      union {
        uint4 raw;
        unsigned short bits[8];
        float wide[4];
      } u;
      u.raw = __ldg(reinterpret_cast<const uint4*>(from) + part);
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        if constexpr (sizeof(T) == 2) to[part * EACH + k] = float(T(u.bits[k], T::from_bits()));
        else to[part * EACH + k] = u.wide[k];
      }
    }
  }
}

// Four consecutive numbers: 8 or 16 bytes.
template <typename T>
__device__ __forceinline__ void load_four(const T* from, float* to) {
  float four[4];
  load<4>(from, four);
#pragma unroll
  for (int k = 0; k < 4; ++k) to[k] = four[k];
}

// Adds to four consecutive numbers in memory. From sm_90 on this is a single instruction.
__device__ __forceinline__ void add_four(float* to, float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :: "l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#else
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
  atomicAdd(to + 2, c);
  atomicAdd(to + 3, d);
#endif
}

// The attention weights of a head of a query, `LEVELS` x 4 numbers. With FUSED they are the softmax
// of the logits.
template <int LEVELS, bool FUSED, typename W>
__device__ __forceinline__ void read_shares(
    const W* weights, float (&shares)[LEVELS * VECTOR_POINTS]) {
  constexpr int COUNT = LEVELS * VECTOR_POINTS;
#pragma unroll
  for (int l = 0; l < LEVELS; ++l) load_four(weights + l * 4, shares + l * 4);
  if constexpr (FUSED) {
    float most = shares[0], sum = 0;
#pragma unroll
    for (int i = 1; i < COUNT; ++i) most = fmaxf(most, shares[i]);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sum += shares[i] = expf(shares[i] - most);
    const float scale = 1 / sum;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) shares[i] *= scale;
  }
}

// Computes one axis of a sampling point. `place` is a location in 0..1. With FUSED it is an offset
// in pixels from `reference`, which is in 0..1.
template <bool FUSED>
__device__ __forceinline__ Axis<float, int> point_axis(float place, float reference, int size) {
  if constexpr (FUSED) return axis_at<float, int>(reference * float(size) + place - 0.5f, size);
  else return axis<float, int>(place, size);
}

// One thread computes 16 bytes of channels of a head of a query. `places` are locations, or offsets
// with FUSED. Only FUSED uses `references` [queries, 2].
template <typename V, typename W, typename P, int LEVELS, bool FUSED>
__global__ void __launch_bounds__(VECTOR_THREADS) forward_vector_kernel(
    SmallSizes s, const V* __restrict__ value, const std::int64_t* __restrict__ shapes,
    const float* __restrict__ references, const P* __restrict__ places,
    const W* __restrict__ weights, V* __restrict__ output) {
  constexpr int LANES = 16 / sizeof(V), COUNT = LEVELS * VECTOR_POINTS;
  const int groups = s.channels / LANES, stride = s.heads * s.channels;
  const int total = s.batch * s.queries * s.heads * groups;
  for (int i = blockIdx.x * VECTOR_THREADS + threadIdx.x; i < total;
       i += gridDim.x * VECTOR_THREADS) {
    const int group = i % groups, row = i / groups;
    const int head = row % s.heads, place_of_query = row / s.heads;
    const int query = place_of_query % s.queries, image = place_of_query / s.queries;
    const V* pixels = value + (image * s.pixels) * stride + head * s.channels + group * LANES;
    float2 reference{0, 0};
    if constexpr (FUSED) reference = __ldg(reinterpret_cast<const float2*>(references) + query);
    float shares[COUNT], sum[LANES];
    read_shares<LEVELS, FUSED>(weights + row * COUNT, shares);
#pragma unroll
    for (int k = 0; k < LANES; ++k) sum[k] = 0;
    int start = 0;
#pragma unroll
    for (int l = 0; l < LEVELS; ++l) {
      const SmallLevel level(shapes, l, start, s.pixels);
      float at[2 * VECTOR_POINTS];
      const P* of_level = places + (row * COUNT + l * VECTOR_POINTS) * 2;
      load_four(of_level, at);
      load_four(of_level + 4, at + 4);
#pragma unroll
      for (int p = 0; p < VECTOR_POINTS; ++p) {
        const Axis<float, int> x = point_axis<FUSED>(at[2 * p], reference.x, level.width);
        const Axis<float, int> y = point_axis<FUSED>(at[2 * p + 1], reference.y, level.height);
        if (level.height == 0 || !x.inside || !y.inside) continue;
        const float share = shares[l * VECTOR_POINTS + p];
        const float upper = share * y.near_weight, lower = share * y.far_weight;
        const float corner_share[4] = {
            upper * x.near_weight, upper * x.far_weight, lower * x.near_weight,
            lower * x.far_weight};
        const int top = start + y.near_index * level.width;
        const int bottom = start + y.far_index * level.width;
        const int corner[4] = {
            top + x.near_index, top + x.far_index, bottom + x.near_index, bottom + x.far_index};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float channels[LANES];
          load<LANES>(pixels + corner[k] * stride, channels);
#pragma unroll
          for (int c = 0; c < LANES; ++c) sum[c] += corner_share[k] * channels[c];
        }
      }
      start = level.end();
    }
    alignas(16) V result[LANES];
#pragma unroll
    for (int c = 0; c < LANES; ++c) result[c] = V(sum[c]);
    *reinterpret_cast<uint4*>(output + i * LANES) = *reinterpret_cast<const uint4*>(result);
  }
}

// A team of channels / 4 lanes processes a head of a query, 4 channels per lane. A team has 1, 2,
// 4, .. 32 lanes, so it is part of a single warp. With FUSED the gradients are those of offsets and
// logits.
template <typename V, typename W, typename P, int LEVELS, bool FUSED>
__global__ void __launch_bounds__(VECTOR_THREADS, 3) backward_vector_kernel(
    SmallSizes s, const V* __restrict__ grad_output, const V* __restrict__ value,
    const std::int64_t* __restrict__ shapes, const float* __restrict__ references,
    const P* __restrict__ places, const W* __restrict__ weights, float* grad_value,
    P* __restrict__ grad_places, W* __restrict__ grad_weights) {
  constexpr int COUNT = LEVELS * VECTOR_POINTS;
  const int team = s.channels / 4, stride = s.heads * s.channels;
  const int total = s.batch * s.queries * s.heads * team;
  for (int i = blockIdx.x * VECTOR_THREADS + threadIdx.x; i < total;
       i += gridDim.x * VECTOR_THREADS) {
    const int lane = i % team, row = i / team;
    const unsigned int first_lane = threadIdx.x % WARP - lane;
    const unsigned int mates = (team == WARP ? ~0u : (1u << team) - 1) << first_lane;
    const int head = row % s.heads, place_of_query = row / s.heads;
    const int query = place_of_query % s.queries, image = place_of_query / s.queries;
    const int base = (image * s.pixels) * stride + head * s.channels + lane * 4;
    float2 reference{0, 0};
    if constexpr (FUSED) reference = __ldg(reinterpret_cast<const float2*>(references) + query);
    float shares[COUNT], grad[4], grad_shares[COUNT];
    read_shares<LEVELS, FUSED>(weights + row * COUNT, shares);
    load<4>(grad_output + row * s.channels + lane * 4, grad);
    int start = 0;
#pragma unroll
    for (int l = 0; l < LEVELS; ++l) {
      const SmallLevel level(shapes, l, start, s.pixels);
#pragma unroll
      for (int p = 0; p < VECTOR_POINTS; ++p) {
        const int point = row * COUNT + l * VECTOR_POINTS + p;
        const float place_x = float(places[2 * point]), place_y = float(places[2 * point + 1]);
        const Axis<float, int> x = point_axis<FUSED>(place_x, reference.x, level.width);
        const Axis<float, int> y = point_axis<FUSED>(place_y, reference.y, level.height);
        PointGradient<float> gradient{0, 0, 0};
        if (level.height > 0 && x.inside && y.inside) {  // the same for all lanes of the team
          const float share = shares[l * VECTOR_POINTS + p];
          const int top = base + (start + y.near_index * level.width) * stride;
          const int bottom = base + (start + y.far_index * level.width) * stride;
          const int corner[4] = {
              top + x.near_index * stride, top + x.far_index * stride,
              bottom + x.near_index * stride, bottom + x.far_index * stride};
          const float upper = share * y.near_weight, lower = share * y.far_weight;
          const float part[4] = {
              upper * x.near_weight, upper * x.far_weight, lower * x.near_weight,
              lower * x.far_weight};
          float dot[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            float channels[4];
            load<4>(value + corner[k], channels);
            dot[k] = 0;
#pragma unroll
            for (int c = 0; c < 4; ++c) dot[k] += grad[c] * channels[c];
            add_four(
                grad_value + corner[k], part[k] * grad[0], part[k] * grad[1], part[k] * grad[2],
                part[k] * grad[3]);
          }
          // Offsets are in pixels, locations in fractions of the level's sides.
          gradient = point_gradient(
              x, y, dot, share, FUSED ? 1 : level.width, FUSED ? 1 : level.height);
          for (int distance = team / 2; distance > 0; distance /= 2) {
            gradient.weight += __shfl_xor_sync(mates, gradient.weight, distance);
            gradient.x += __shfl_xor_sync(mates, gradient.x, distance);
            gradient.y += __shfl_xor_sync(mates, gradient.y, distance);
          }
        }
        grad_shares[l * VECTOR_POINTS + p] = gradient.weight;
        if (lane == 0) {
          grad_places[2 * point] = P(gradient.x);
          grad_places[2 * point + 1] = P(gradient.y);
        }
      }
      start = level.end();
    }
    if (lane != 0) continue;
    float mean = 0;  // weighted mean of the gradients, which the softmax's derivative subtracts
    if constexpr (FUSED) {
#pragma unroll
      for (int k = 0; k < COUNT; ++k) mean += grad_shares[k] * shares[k];
    }
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
      grad_weights[row * COUNT + k] =
          W(FUSED ? shares[k] * (grad_shares[k] - mean) : grad_shares[k]);
  }
}

}  // namespace vitadapter_zoo
