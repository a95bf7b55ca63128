// The 3x3 convolution over maps in channels-last order: checks arguments and starts threads.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "cpu_kernels.h"
#include "pieces.h"

namespace vitadapter_zoo {
namespace {

constexpr char NAME[] = "conv3x3";
constexpr std::int64_t LANES = 16;  // channels are multiples of this
constexpr std::int64_t MOST_CHANNELS = 512;
// The largest piece, in tiles and in bytes of its transformed input, which must stay in the
// second-level cache while the weights of all output channels are read.
constexpr std::int64_t PIECE_TILES = 24;
constexpr std::int64_t PIECE_BYTES = 1 << 20;

bool fits(std::int64_t channels) {
  return channels > 0 && channels <= MOST_CHANNELS && channels % LANES == 0;
}

std::int64_t values(std::int64_t tile) {
  return (tile + 2) * (tile + 2);
}

// Memory for floats, aligned to a line of the cache.
class Scratch {
 public:
  explicit Scratch(std::int64_t size)
      : memory_(std::make_unique_for_overwrite<float[]>(size + LANES)), data_(memory_.get()) {
    while (reinterpret_cast<std::size_t>(data_) % (LANES * sizeof(float))) ++data_;
  }
  float* data() const { return data_; }

 private:
  std::unique_ptr<float[]> memory_;
  float* data_;
};

// Returns the number of tiles of a piece: as many as fit into the cache, and fewer if there would
// not be enough pieces for all threads.
std::int64_t tiles_per_piece(const ConvShape& s, std::int64_t tiles, std::int64_t rows) {
  const std::int64_t bytes = values(s.tile) * s.channels * std::int64_t(sizeof(float));
  const std::int64_t pieces = PIECES_PER_THREAD * std::int64_t(torch::stable::get_num_threads());
  const std::int64_t most = std::min(PIECE_TILES, PIECE_BYTES / bytes) / rows * rows;
  const std::int64_t wanted = (tiles / pieces + rows - 1) / rows * rows;
  return std::max(rows, std::min(most, wanted));
}

// Transforms the weights [K, C, 3, 3]. This is done in every call, because keeping the result would
// take four times the memory of the weights.
template <typename V>
Scratch pack(const ConvShape& s, const ConvKernels<V>& kernels, const V* weight) {
  Scratch packed(values(s.tile) * s.channels * s.outputs);
  in_pieces(s.channels, LANES, [&](std::int64_t begin, std::int64_t end) {
    kernels.pack(s, weight, packed.data(), begin, end);
  });
  return packed;
}

template <typename V>
void run(
    const ConvShape& s, const ConvKernels<V>& kernels, const V* input, const V* weight,
    const float* bias, V* output) {
  const Scratch packed = pack(s, kernels, weight);
  const std::int64_t tiles = s.images * ((s.height + s.tile - 1) / s.tile) *
      ((s.width + s.tile - 1) / s.tile);
  const std::int64_t size = tiles_per_piece(s, tiles, kernels.rows);
  const std::int64_t pieces = (tiles + size - 1) / size;
  in_threads(pieces, [&](std::atomic<std::int64_t>& next) {
    std::optional<Scratch> scratch;
    for (std::int64_t piece = next++; piece < pieces; piece = next++) {
      if (!scratch) scratch.emplace(kernels.scratch(s, size));
      kernels.run(
          s, input, packed.data(), bias, output, scratch->data(), piece * size,
          std::min(tiles, (piece + 1) * size));
    }
  });
}

template <typename V>
std::vector<float> read_bias(const std::optional<Tensor>& bias, std::int64_t outputs) {
  std::vector<float> shift(outputs, 0.0f);
  if (!bias) return shift;
  const Tensor from = torch::stable::contiguous(*bias);
  for (std::int64_t k = 0; k < outputs; ++k) {
    if constexpr (std::is_same_v<V, float>)
      shift[k] = data<float>(from)[k];
    else {
      const std::uint32_t bits = std::uint32_t(data<BFloat16>(from)[k].bits) << 16;
      std::memcpy(&shift[k], &bits, sizeof bits);
    }
  }
  return shift;
}

Tensor forward(
    const Tensor& maps, const Tensor& weight, const std::optional<Tensor>& bias, std::int64_t tile,
    bool relu) {
  const ScalarType type = maps.scalar_type();
  require(tile == 4 || tile == 2, "tile must be 4 or 2", NAME);
  require(
      maps.dim() == 4 && (type == ScalarType::Float || type == ScalarType::BFloat16) &&
          fits(maps.size(3)),
      "maps must be float32 or bfloat16 [N, H, W, C], C a multiple of 16 up to 512", NAME);
  require(
      weight.dim() == 4 && fits(weight.size(0)) && weight.size(1) == maps.size(3) &&
          weight.size(2) == 3 && weight.size(3) == 3 && weight.scalar_type() == type,
      "weight must be [K, C, 3, 3] of the maps' dtype, K a multiple of 16 up to 512", NAME);
  require(
      !bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == type),
      "bias must be [K] of the maps' dtype", NAME);
  const Tensor cells = torch::stable::contiguous(maps);
  const Tensor filters = torch::stable::contiguous(weight);
  const ConvShape shape{cells.size(0),   cells.size(1), cells.size(2), cells.size(3),
                        weight.size(0), int(tile),     relu};
  const std::int64_t sizes[4] = {shape.images, shape.height, shape.width, shape.outputs};
  Tensor output = torch::stable::new_empty(cells, {sizes, 4});
  if (output.numel() == 0) return output;
  const auto run_as = [&]<typename V>(const ConvKernels<V>& kernels) {
    run(shape, kernels, data<V>(cells), data<V>(filters),
        read_bias<V>(bias, shape.outputs).data(), mutable_data<V>(output));
  };
  if (type == ScalarType::Float)
    run_as(instruction_set().conv3x3);
  else
    run_as(instruction_set().conv3x3_bfloat16);
  return output;
}

}  // namespace
}  // namespace vitadapter_zoo

// Python declares these operators (ops/conv3x3.py).
STABLE_TORCH_LIBRARY_IMPL(vitadapter_zoo, CPU, m) {
  m.impl("_conv3x3_maps", TORCH_BOX(&vitadapter_zoo::forward));
}
