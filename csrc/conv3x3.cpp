// The 3x3 convolution over maps in channels-last order: checks arguments and starts threads.

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "arguments.h"
#include "cpu_kernels.h"

namespace vitadapter_zoo {
namespace {

constexpr char NAME[] = "conv3x3";
constexpr std::int64_t LANES = 16;  // channels are multiples of this
constexpr std::int64_t MOST_CHANNELS = 512;
// The largest piece, in tiles and in bytes of its transformed input, which must stay in the
// second-level cache while the weights of all output channels are read.
constexpr std::int64_t PIECE_TILES = 24;
constexpr std::int64_t PIECE_BYTES = 1 << 20;
constexpr std::int64_t PIECES = 4;  // fewest per thread, so that a late thread delays little

bool fits(std::int64_t channels) {
  return channels > 0 && channels <= MOST_CHANNELS && channels % LANES == 0;
}

std::int64_t values(std::int64_t tile) {
  require(tile == 4 || tile == 2, "tile must be 4 or 2", NAME);
  return (tile + 2) * (tile + 2);
}

Tensor pack(const Tensor& weight, std::int64_t tile) {
  require(
      weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && fits(weight.size(0)) &&
          fits(weight.size(1)) && weight.scalar_type() == ScalarType::Float,
      "weight must be float32 [K, C, 3, 3], K and C multiples of 16 up to 512", NAME);
  const Tensor filters = torch::stable::contiguous(weight);
  const std::int64_t outputs = weight.size(0), channels = weight.size(1);
  const std::int64_t sizes[3] = {values(tile), channels, outputs};
  Tensor packed = torch::stable::new_empty(filters, {sizes, 3});
  const ConvShape shape{0, 0, 0, channels, outputs, int(tile), false};
  torch::stable::parallel_for(0, channels, LANES, [&](std::int64_t begin, std::int64_t end) {
    instruction_set().conv3x3.pack(
        shape, data<float>(filters), mutable_data<float>(packed), begin, end);
  });
  return packed;
}

// Returns the number of tiles of a piece: as many as fit into the cache, and fewer if there would
// not be enough pieces for all threads.
std::int64_t tiles_per_piece(const ConvShape& s, std::int64_t tiles) {
  const std::int64_t rows = instruction_set().conv3x3.rows;
  const std::int64_t bytes = values(s.tile) * s.channels * std::int64_t(sizeof(float));
  const std::int64_t pieces = PIECES * std::int64_t(torch::stable::get_num_threads());
  const std::int64_t most = std::min(PIECE_TILES, PIECE_BYTES / bytes) / rows * rows;
  const std::int64_t wanted = (tiles / pieces + rows - 1) / rows * rows;
  return std::max(rows, std::min(most, wanted));
}

void run(
    const ConvShape& s, const float* input, const float* packed, const float* bias,
    float* output) {
  const ConvKernels& kernels = instruction_set().conv3x3;
  const std::int64_t tiles = s.images * ((s.height + s.tile - 1) / s.tile) *
      ((s.width + s.tile - 1) / s.tile);
  const std::int64_t size = tiles_per_piece(s, tiles);
  const std::int64_t pieces = (tiles + size - 1) / size;
  std::atomic<std::int64_t> next{0};
  // Each thread takes the next piece when it has finished one. The ranges of parallel_for are not
  // used, because a thread whose core is busy with other work would delay its whole range.
  torch::stable::parallel_for(0, pieces, 1, [&](std::int64_t, std::int64_t) {
    std::unique_ptr<float[]> memory;
    float* scratch = nullptr;
    for (std::int64_t piece = next++; piece < pieces; piece = next++) {
      if (!memory) {
        memory = std::make_unique_for_overwrite<float[]>(kernels.scratch(s, size) + 16);
        scratch = memory.get();
        while (reinterpret_cast<std::size_t>(scratch) % 64) ++scratch;
      }
      kernels.run(
          s, input, packed, bias, output, scratch, piece * size,
          std::min(tiles, (piece + 1) * size));
    }
  });
}

Tensor forward(
    const Tensor& maps, const Tensor& packed, const std::optional<Tensor>& bias, std::int64_t tile,
    bool relu) {
  require(
      maps.dim() == 4 && maps.scalar_type() == ScalarType::Float && fits(maps.size(3)),
      "maps must be float32 [N, H, W, C], C a multiple of 16 up to 512", NAME);
  const Tensor cells = torch::stable::contiguous(maps);
  require(
      packed.dim() == 3 && packed.size(0) == values(tile) && packed.size(1) == maps.size(3) &&
          fits(packed.size(2)) && packed.scalar_type() == ScalarType::Float &&
          packed.is_contiguous(),
      "packed does not come from the packing of fitting weights", NAME);
  const std::int64_t outputs = packed.size(2);
  std::vector<float> shift(outputs, 0.0f);
  if (bias) {
    require(
        bias->dim() == 1 && bias->size(0) == outputs && bias->scalar_type() == ScalarType::Float,
        "bias must be float32 [K]", NAME);
    const Tensor from = torch::stable::contiguous(*bias);
    std::copy(data<float>(from), data<float>(from) + outputs, shift.begin());
  }
  const ConvShape shape{cells.size(0), cells.size(1), cells.size(2), cells.size(3), outputs,
                        int(tile),     relu};
  const std::int64_t sizes[4] = {shape.images, shape.height, shape.width, outputs};
  Tensor output = torch::stable::new_empty(cells, {sizes, 4});
  if (output.numel() > 0)
    run(shape, data<float>(cells), data<float>(packed), shift.data(), mutable_data<float>(output));
  return output;
}

}  // namespace
}  // namespace vitadapter_zoo

// Python declares these operators (ops/conv3x3.py).
STABLE_TORCH_LIBRARY_IMPL(vitadapter_zoo, CPU, m) {
  m.impl("_conv3x3_pack", TORCH_BOX(&vitadapter_zoo::pack));
  m.impl("_conv3x3", TORCH_BOX(&vitadapter_zoo::forward));
}
