// The interface of the CPU kernels, which are compiled for each instruction set and selected at run
// time.
#pragma once

#include <cstdint>

namespace vitadapter_zoo {

struct BFloat16 {
  std::uint16_t bits;
};

// The size and position of a level of the feature pyramid in `value`.
struct Level {
  int height, width;
  std::int64_t start;  // index of its first pixel
};

// value [batch, pixels, heads, channels], locations [batch, queries, heads, levels, points, 2],
// weights [batch, queries, heads, levels, points], output [batch, queries, heads, channels].
struct Shape {
  std::int64_t batch, pixels, heads, channels, queries, levels, points;
  const Level* level;  // `levels` of them
};

// V is the type of value and output, W the type of the weights, A the type of the locations and of
// all sums. A is double if V is double, otherwise float.
template <typename V, typename W, typename A>
struct Kernels {
  // Computes the output of the queries begin <= batch * queries + query < end.
  void (*forward)(
      const Shape&, const V* value, const A* locations, const W* weights, V* output,
      std::int64_t begin, std::int64_t end);
  // Computes the same from reference_points [queries, 2], offsets [batch, queries, heads, levels,
  // points, 2] in pixels and logits [batch, queries, heads, levels, points]. A point's location is
  // `reference + offset / (width, height)`. Its weight is the softmax over levels and points.
  void (*forward_fused)(
      const Shape&, const V* value, const A* reference_points, const W* offsets, const W* logits,
      V* output, std::int64_t begin, std::int64_t end);
  // Computes the gradients of the heads begin <= batch * heads + head < end. A single thread adds
  // up a head in the order of its queries, so sums do not depend on the number of threads. The
  // caller fills grad_value with zeros.
  void (*backward)(
      const Shape&, const V* grad_output, const V* value, const A* locations, const W* weights,
      A* grad_value, A* grad_locations, W* grad_weights, std::int64_t begin, std::int64_t end);
};

// The bins of a region along one axis. Bin b covers `count[b]` cells starting at `first[b]`. Their
// weights start at `weights + b * most`.
struct Bins {
  const int *first, *count;
  const float* weights;
  int most;
};

// maps [images, height, width, channels], output [rows, size, size, channels]. The arrays have an
// element for each region.
struct RoiShape {
  std::int64_t height, width, channels, regions;
  int size;
  const std::int64_t *image, *row;  // a region's image and its row of the output
  const Bins *x, *y;
};

struct RoiKernels {
  // Computes the output of the regions begin <= region < end.
  void (*forward)(
      const RoiShape&, const float* maps, float* output, std::int64_t begin, std::int64_t end);
  void (*forward_bfloat16)(
      const RoiShape&, const BFloat16* maps, BFloat16* output, std::int64_t begin,
      std::int64_t end);
  // Adds the gradients of the channels begin <= channel < end to grad_maps.
  void (*backward)(
      const RoiShape&, const float* grad_output, float* grad_maps, std::int64_t begin,
      std::int64_t end);
};

// A 3x3 convolution with stride 1 and padding 1, computed tile by tile. A tile is a square of `tile`
// by `tile` pixels of the output. Tiles are counted row by row, image after image.
struct ConvShape {
  std::int64_t images, height, width, channels, outputs;  // channels: multiples of 16
  int tile;                                               // 4 or 2
  bool relu;
};

// V is the type of maps, weights and output. The transforms and the products are float.
template <typename V>
struct ConvKernels {
  // Transforms weight [outputs, channels, 3, 3] for the input channels begin <= channel < end.
  void (*pack)(
      const ConvShape&, const V* weight, float* packed, std::int64_t begin, std::int64_t end);
  // Returns how many floats of scratch memory `run` needs for this number of tiles.
  std::int64_t (*scratch)(const ConvShape&, std::int64_t tiles);
  // Computes the tiles begin <= tile < end of output [images, height, width, outputs] from input
  // [images, height, width, channels]. `scratch` is aligned to 64 bytes.
  void (*run)(
      const ConvShape&, const V* input, const float* packed, const float* bias, V* output,
      float* scratch, std::int64_t begin, std::int64_t end);
  int rows;  // tiles that the products process at a time; the best `end - begin` is a multiple
};

struct InstructionSet {
  const char* name;
  Kernels<float, float, float> float32;
  Kernels<double, double, double> float64;
  Kernels<BFloat16, BFloat16, float> bfloat16;
  Kernels<BFloat16, float, float> bfloat16_float_weights;
  RoiKernels roi_align;
  ConvKernels<float> conv3x3;
  ConvKernels<BFloat16> conv3x3_bfloat16;
};

extern const InstructionSet portable;
#if defined(__x86_64__)
extern const InstructionSet avx2;
extern const InstructionSet avx512;
#endif

// The best instruction set of this processor, or a lower one that VITADAPTER_ZOO_CPU selects.
const InstructionSet& instruction_set();

}  // namespace vitadapter_zoo

// Returns the name of the instruction set in use. Python calls it too.
extern "C" __attribute__((visibility("default"))) const char* vitadapter_zoo_instruction_set();
