// RoIAlign over maps in channels-last order, forward and backward.
//
// A bin's samples form a grid, so the weight of a cell is the product of a weight along x and a
// weight along y, and adjacent samples share cells. The weights along both axes are computed once
// per region. A bin is then a sum over a few cells, computed for all channels at once.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "arguments.h"
#include "cpu_kernels.h"
#include "pieces.h"

namespace vitadapter_zoo {
namespace {

constexpr char NAME[] = "roi_align";
constexpr float MOST_SAMPLES = 1 << 14;  // per bin and axis; no box of an image needs more
constexpr std::int64_t GROUP = 16;       // channels in a cache line, which threads must not share

// The bins of all regions along one axis, with one array per property.
class Axes {
 public:
  Axes(std::int64_t regions, int size) : size_(size), places_(regions), bins_(regions) {
    first_.reserve(regions * size);
    count_.reserve(regions * size);
  }

  // Adds the bins of the next region, from `begin` to `end` in cells, on a map of `cells` cells.
  void add(float begin, float end, int cells) {
    const float bin = (end - begin) / float(size_);
    // A box without length, or of NaN, has no samples.
    const float wanted = bin > 0 ? std::ceil(bin) : 0.0f;
    require(wanted <= MOST_SAMPLES, "a box is too large for its map", NAME);
    const int samples = int(wanted), most = samples + 2;
    places_[next_++] = {first_.size(), weights_.size(), most};
    weights_.resize(weights_.size() + size_ * most);
    for (int b = 0; b < size_; ++b) {
      float* weights = weights_.data() + weights_.size() - (size_ - b) * most;
      int first = 0, count = 0;
      for (int i = 0; i < samples; ++i) {
        float place = begin + float(b) * bin + (float(i) + 0.5f) * bin / float(samples);
        if (!(place >= -1 && place <= float(cells))) continue;
        place = std::clamp(place, 0.0f, float(cells - 1));
        const int low = int(place);
        const int high = std::min(low + 1, cells - 1);
        const float share = place - float(low);
        if (count == 0) first = low;
        count = high - first + 1;
        weights[low - first] += (1 - share) / float(samples);
        weights[high - first] += share / float(samples);
      }
      first_.push_back(first);
      count_.push_back(count);
    }
  }

  // Returns the bins of all regions. Call it after the last `add`.
  const Bins* bins() {
    for (std::size_t r = 0; r < places_.size(); ++r)
      bins_[r] = {
          first_.data() + places_[r].bin, count_.data() + places_[r].bin,
          weights_.data() + places_[r].weight, places_[r].most};
    return bins_.data();
  }

 private:
  struct Place {
    std::size_t bin, weight;
    int most;
  };
  int size_;
  std::size_t next_ = 0;
  std::vector<int> first_, count_;
  std::vector<float> weights_;
  std::vector<Place> places_;
  std::vector<Bins> bins_;
};

// Calls run(shape) for `rois` [R, 5] on maps of this size. Region r is in row rows[r] of the output,
// by default in row r.
template <typename F>
void with_shape(
    const Tensor& rois, std::int64_t images, std::int64_t height, std::int64_t width,
    std::int64_t channels, std::int64_t size, double scale, const F& run,
    const std::int64_t* rows = nullptr) {
  require(
      rois.dim() == 2 && rois.size(1) == 5 && rois.scalar_type() == ScalarType::Float,
      "rois must be float32 [R, 5]", NAME);
  constexpr std::int64_t MOST = 1 << 20;  // float32 represents positions of this size well enough
  require(
      size > 0 && size <= 1024 && height > 0 && height < MOST && width > 0 && width < MOST,
      "the maps or the bins have no size", NAME);
  const Tensor boxes = torch::stable::contiguous(rois);
  const std::int64_t regions = boxes.size(0);
  std::vector<std::int64_t> image(regions), row(regions);
  if (rows)
    std::copy(rows, rows + regions, row.begin());
  else
    std::iota(row.begin(), row.end(), 0);
  Axes x(regions, int(size)), y(regions, int(size));
  const float factor = float(scale);
  for (std::int64_t r = 0; r < regions; ++r) {
    const float* box = data<float>(boxes) + 5 * r;
    require(box[0] >= 0 && box[0] < float(images), "a box has no image", NAME);
    image[r] = std::int64_t(box[0]);
    x.add(box[1] * factor - 0.5f, box[3] * factor - 0.5f, int(width));
    y.add(box[2] * factor - 0.5f, box[4] * factor - 0.5f, int(height));
  }
  run(RoiShape{
      height, width, channels, regions, int(size), image.data(), row.data(), x.bins(), y.bins()});
}

Tensor forward(const Tensor& maps, const Tensor& rois, std::int64_t size, double scale) {
  require(
      maps.dim() == 4 && maps.scalar_type() == ScalarType::Float,
      "maps must be float32 [N, H, W, C]", NAME);
  const Tensor cells = torch::stable::contiguous(maps);
  const std::int64_t channels = cells.size(3);
  const std::int64_t sizes[4] = {rois.size(0), size, size, channels};
  Tensor output = torch::stable::new_empty(maps, {sizes, 4});
  with_shape(
      rois, cells.size(0), cells.size(1), cells.size(2), channels, size, scale,
      [&](const RoiShape& shape) {
        in_pieces(shape.regions, 4, [&](std::int64_t begin, std::int64_t end) {
          instruction_set().roi_align.forward(
              shape, data<float>(cells), mutable_data<float>(output), begin, end);
        });
      });
  return output;
}

// Writes the regions to the given rows of `output`.
void forward_rows(
    Tensor output, const Tensor& rows, const Tensor& maps, const Tensor& rois, double scale) {
  const ScalarType type = maps.scalar_type();
  require(
      maps.dim() == 4 && (type == ScalarType::Float || type == ScalarType::BFloat16),
      "maps must be float32 or bfloat16 [N, H, W, C]", NAME);
  require(
      output.dim() == 4 && output.is_contiguous() && output.scalar_type() == type &&
          output.size(1) == output.size(2) && output.size(3) == maps.size(3),
      "the output must be contiguous [rows, size, size, C] of the maps' dtype", NAME);
  require(
      rows.dim() == 1 && rows.size(0) == rois.size(0) && rows.scalar_type() == ScalarType::Long,
      "rows must be int64 [R]", NAME);
  const Tensor cells = torch::stable::contiguous(maps), places = torch::stable::contiguous(rows);
  const std::int64_t* first = data<std::int64_t>(places);
  for (std::int64_t r = 0; r < rows.size(0); ++r)
    require(first[r] >= 0 && first[r] < output.size(0), "a row is not in the output", NAME);
  const RoiKernels& kernels = instruction_set().roi_align;
  with_shape(
      rois, cells.size(0), cells.size(1), cells.size(2), cells.size(3), output.size(1), scale,
      [&](const RoiShape& shape) {
        in_pieces(shape.regions, 4, [&](std::int64_t begin, std::int64_t end) {
          if (type == ScalarType::Float)
            kernels.forward(
                shape, data<float>(cells), mutable_data<float>(output), begin, end);
          else
            kernels.forward_bfloat16(
                shape, data<BFloat16>(cells), mutable_data<BFloat16>(output), begin, end);
        });
      },
      first);
}

Tensor backward(
    const Tensor& grad_output, const Tensor& rois, std::int64_t images, std::int64_t height,
    std::int64_t width, double scale) {
  require(
      grad_output.dim() == 4 && grad_output.scalar_type() == ScalarType::Float &&
          grad_output.size(0) == rois.size(0) && grad_output.size(1) == grad_output.size(2),
      "the gradient must be float32 [R, size, size, C]", NAME);
  require(images >= 0, "a negative number of images", NAME);
  const Tensor grad = torch::stable::contiguous(grad_output);
  const std::int64_t channels = grad.size(3);
  const std::int64_t sizes[4] = {images, height, width, channels};
  Tensor result = torch::stable::new_zeros(grad, {sizes, 4});
  with_shape(
      rois, images, height, width, channels, grad.size(1), scale, [&](const RoiShape& shape) {
        const std::int64_t groups = (channels + GROUP - 1) / GROUP;
        // A single thread adds up a cell in the order of the regions, so sums do not depend on the
        // number of threads.
        in_pieces(groups, 1, [&](std::int64_t begin, std::int64_t end) {
          instruction_set().roi_align.backward(
              shape, data<float>(grad), mutable_data<float>(result), begin * GROUP,
              std::min(end * GROUP, channels));
        });
      });
  return result;
}

}  // namespace
}  // namespace vitadapter_zoo

// Python declares these operators (ops/roi_align.py).
STABLE_TORCH_LIBRARY_IMPL(vitadapter_zoo, CPU, m) {
  m.impl("_roi_align", TORCH_BOX(&vitadapter_zoo::forward));
  m.impl("_roi_align_rows", TORCH_BOX(&vitadapter_zoo::forward_rows));
  m.impl("_roi_align_backward", TORCH_BOX(&vitadapter_zoo::backward));
}
