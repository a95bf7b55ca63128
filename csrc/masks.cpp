// Pastes masks into an image and encodes them as COCO RLE without creating the pasted image.
//
// The loop goes down the columns, the order of COCO's counts, and only over the region of the box.
// All other pixels are zero and only make runs longer. Values that depend only on the row (the cell
// of the map and the weights of its two rows) are computed once per mask. The map's values for all
// rows are computed once per column of the map. A pixel then needs four products, their sum and a
// comparison, and the compiler vectorizes these loops.
//
// Every pixel must be bit-identical to PyTorch's grid_sample, because rounding across the threshold
// changes the result. The result of grid_sample depends on whether its compiler fused products and
// sums. GCC's x86 builds for AVX2 and AVX-512 do (torch 2.14.1: both the location and all but the
// first product of the sum); those for plain x86-64 cannot. This file has both versions. `fused`
// selects one, and ops/masks.py finds out which one this torch uses. The compiler must not fuse
// products and sums on its own.
#if defined(__clang__)
#pragma clang fp contract(off)
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "arguments.h"
#include "cpu_kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace vitadapter_zoo {
namespace {

static_assert(std::endian::native == std::endian::little, "Writer reads eight pixels as one word");

// Encodes the lengths of alternating runs, starting with zeros, as COCO's text. From the fourth run
// on, the text has the difference to the run before the previous one. A number is split into digits
// of five bits, lowest first, until the rest is only the sign. A digit's sixth bit is set if
// another digit follows. Each character is the digit plus 48.
std::string text(const std::vector<std::int64_t>& runs) {
  std::string written;
  written.reserve(2 * runs.size());
  for (std::size_t i = 0; i < runs.size(); ++i) {
    std::int64_t rest = i < 3 ? runs[i] : runs[i] - runs[i - 2];
    bool more = true;
    while (more) {
      const std::int64_t digit = rest & 31;
      rest >>= 5;
      more = rest != (digit & 16 ? -1 : 0);
      written.push_back(char(48 + digit + 32 * more));
    }
  }
  return written;
}

// Converts pixels into runs. Pixels that are not passed are zero.
class Writer {
 public:
  Writer(std::int64_t height, std::int64_t width) : height_(height), width_(width) {}

  // Adds the pixels top..top+rows-1 of column x. Columns must come in order. `pixels` are 0 or 1,
  // and there must be one writable byte before them and eight after them.
  void add(std::int64_t x, std::int64_t top, std::int64_t rows, std::uint8_t* pixels) {
    if (top > 0) end_run(x * height_);
    pixels[-1] = inside_;
    std::memset(pixels + rows, pixels[rows - 1], 8);
    const std::int64_t start = x * height_ + top;
    for (std::int64_t y = 0; y < rows; y += 8) {
      std::uint64_t here, before;
      std::memcpy(&here, pixels + y, 8);
      std::memcpy(&before, pixels + y - 1, 8);
      for (std::uint64_t changes = here ^ before; changes; changes &= changes - 1)
        change(start + y + std::countr_zero(changes) / 8);
    }
    inside_ = pixels[rows - 1];
    if (top + rows < height_) end_run(start + rows);
    next_ = (x + 1) * height_;
  }

  std::string finish() {
    if (next_ < height_ * width_) end_run(next_);
    runs_.push_back(height_ * width_ - last_);
    return text(runs_);
  }

 private:
  void change(std::int64_t position) {
    runs_.push_back(position - last_);
    last_ = position;
  }

  void end_run(std::int64_t position) {
    if (inside_) change(position);
    inside_ = 0;
  }

  std::int64_t height_, width_, last_ = 0, next_ = 0;
  std::uint8_t inside_ = 0;
  std::vector<std::int64_t> runs_;
};

// A range of pixels along one axis of the image, with the cells that they are sampled from. The
// pixel `begin + i` is between the cells `cell[i] - 1` and `cell[i]` of the map, with these
// weights. Cells of the map count from one. Cell 0 and the two cells after the map are zeros, for
// pixels outside of the map.
struct Axis {
  std::int64_t begin = 0, count = 0;
  std::vector<std::int32_t> cell;
  std::vector<float> low_weight, high_weight;

  Axis(float low, float high, std::int64_t pixels, std::int64_t cells, bool fused) {
    const float limit = float(pixels);  // the order of the comparisons turns a NaN into 0
    begin = std::int64_t(std::min(std::max(0.0f, std::floor(low) - 1), limit));
    const std::int64_t end = std::int64_t(std::min(std::max(0.0f, std::ceil(high) + 1), limit));
    count = std::max<std::int64_t>(std::min(end, pixels) - begin, 0);
    cell.resize(count);
    low_weight.resize(count);
    high_weight.resize(count);
    const float half = float(cells) * 0.5f, length = high - low;
    for (std::int64_t i = 0; i < count; ++i) {
      float place = (float(begin + i) + 0.5f - low) / length * 2 - 1;
      // A box without area; see paste_masks.
      if (!std::isfinite(place)) place = 0;
      const float at = fused ? __builtin_fmaf(place + 1, half, -0.5f) : (place + 1) * half - 0.5f;
      const float floor = std::floor(at);
      const bool near = floor >= -1 && floor < float(cells);
      cell[i] = std::int32_t(near ? std::int64_t(floor) + 1 : cells + 1);
      high_weight[i] = at - floor;
      low_weight[i] = 1 - high_weight[i];
    }
  }
};

// The values of one column of the map above and below each row of the region.
struct Values {
  std::int32_t column = -1;
  std::vector<float> above, below;
};

template <bool fused>
[[gnu::always_inline]] inline void sample(
    const Values& left, const Values& right, const Axis& rows, float left_weight,
    float right_weight, float threshold, std::uint8_t* __restrict inside) {
  const float *nw = left.above.data(), *sw = left.below.data();
  const float *ne = right.above.data(), *se = right.below.data();
  const float *north = rows.low_weight.data(), *south = rows.high_weight.data();
  for (std::int64_t y = 0; y < rows.count; ++y) {
    const float nw_weight = north[y] * left_weight, ne_weight = north[y] * right_weight;
    const float sw_weight = south[y] * left_weight, se_weight = south[y] * right_weight;
    float sum = nw[y] * nw_weight;
    if constexpr (fused) {
      sum = __builtin_fmaf(ne[y], ne_weight, sum);
      sum = __builtin_fmaf(sw[y], sw_weight, sum);
      sum = __builtin_fmaf(se[y], se_weight, sum);
    } else {
      sum += ne[y] * ne_weight;
      sum += sw[y] * sw_weight;
      sum += se[y] * se_weight;
    }
    inside[y] = sum >= threshold;
  }
}

using Sample = void (*)(
    const Values&, const Values&, const Axis&, float, float, float, std::uint8_t*);

#define ZOO_SAMPLE(NAME, FUSED, ATTRIBUTES)                                                   \
  ATTRIBUTES void NAME(                                                                       \
      const Values& left, const Values& right, const Axis& rows, float left_weight,           \
      float right_weight, float threshold, std::uint8_t* inside) {                            \
    sample<FUSED>(left, right, rows, left_weight, right_weight, threshold, inside);           \
  }
ZOO_SAMPLE(sample_fused, true, )
ZOO_SAMPLE(sample_separate, false, )
#if defined(__x86_64__)
ZOO_SAMPLE(sample_fused_avx2, true, [[gnu::target("avx2,fma")]])
ZOO_SAMPLE(sample_separate_avx2, false, [[gnu::target("avx2,fma")]])
#endif
#undef ZOO_SAMPLE

Sample choose(bool fused) {
#if defined(__x86_64__)
  if (std::string_view(vitadapter_zoo_instruction_set()) != "portable")
    return fused ? sample_fused_avx2 : sample_separate_avx2;
#endif
  return fused ? sample_fused : sample_separate;
}

struct Image {
  std::int64_t height, width;
};

// The buffers of a thread, which reuses them for its next mask.
class Paster {
 public:
  Paster(Image image, std::int64_t map_height, std::int64_t map_width, float threshold, bool fused)
      : image_(image),
        map_height_(map_height),
        map_width_(map_width),
        threshold_(threshold),
        fused_(fused),
        sample_(choose(fused)),
        columns_((map_height + 3) * (map_width + 3)) {}

  std::string encode(const float* map, const float* box) {
    const Axis x(box[0], box[2], image_.width, map_width_, fused_);
    const Axis y(box[1], box[3], image_.height, map_height_, fused_);
    Writer writer(image_.height, image_.width);
    if (y.count > 0) {
      transpose(map);
      for (Values& values : values_) {
        values.column = -1;
        values.above.resize(y.count);
        values.below.resize(y.count);
      }
      pixels_.resize(1 + y.count + 8);
      for (std::int64_t i = 0; i < x.count; ++i) {
        const Values& left = values(x.cell[i], y);
        const Values& right = values(x.cell[i] + 1, y);
        sample_(left, right, y, x.low_weight[i], x.high_weight[i], threshold_, &pixels_[1]);
        writer.add(x.begin + i, y.begin, y.count, &pixels_[1]);
      }
    }
    return writer.finish();
  }

 private:
  // The map in column-major order, with the surrounding zeros that Axis needs.
  void transpose(const float* map) {
    for (std::int64_t row = 0; row < map_height_; ++row)
      for (std::int64_t column = 0; column < map_width_; ++column)
        columns_[(column + 1) * (map_height_ + 3) + row + 1] = map[row * map_width_ + column];
  }

  // Consecutive pixels are mostly between the same two columns. Of two adjacent columns one is odd
  // and one is even, so they have separate places in this cache.
  const Values& values(std::int32_t column, const Axis& rows) {
    Values& found = values_[column & 1];
    if (found.column != column) {
      found.column = column;
      const float* from = &columns_[column * (map_height_ + 3)];
      for (std::int64_t y = 0; y < rows.count; ++y) {
        found.above[y] = from[rows.cell[y]];
        found.below[y] = from[rows.cell[y] + 1];
      }
    }
    return found;
  }

  Image image_;
  std::int64_t map_height_, map_width_;
  float threshold_;
  bool fused_;
  Sample sample_;
  std::vector<float> columns_;
  std::vector<std::uint8_t> pixels_;
  Values values_[2];
};

// Returns the concatenated texts as bytes, and the end of each text.
std::tuple<Tensor, Tensor> paste_rle(
    const Tensor& probabilities, const Tensor& boxes, std::int64_t height, std::int64_t width,
    double threshold, bool fused) {
  require(
      probabilities.dim() == 3 && boxes.dim() == 2 && boxes.size(0) == probabilities.size(0) &&
          boxes.size(1) == 4 && probabilities.size(1) > 0 && probabilities.size(2) > 0,
      "probabilities must be [N, M, M] and boxes [N, 4]", "paste_rle");
  require(
      probabilities.scalar_type() == ScalarType::Float && boxes.scalar_type() == ScalarType::Float,
      "probabilities and boxes must be float32", "paste_rle");
  constexpr std::int64_t MOST = std::numeric_limits<std::int32_t>::max();
  require(
      height > 0 && width > 0 && height <= MOST / width, "the image has no size", "paste_rle");
  const Tensor maps = torch::stable::contiguous(probabilities);
  const Tensor corners = torch::stable::contiguous(boxes);
  const std::int64_t count = maps.size(0), rows = maps.size(1), columns = maps.size(2);
  require(rows <= MOST / 4 / columns - 8, "the maps are too large", "paste_rle");
  std::vector<std::string> texts(count);
  torch::stable::parallel_for(0, count, 1, [&](std::int64_t begin, std::int64_t end) {
    Paster paster({height, width}, rows, columns, float(threshold), fused);
    for (std::int64_t i = begin; i < end; ++i)
      texts[i] = paster.encode(data<float>(maps) + i * rows * columns, data<float>(corners) + 4 * i);
  });
  std::int64_t length = 0;
  const Tensor ends = torch::stable::new_empty(boxes, {&count, 1}, ScalarType::Long);
  for (std::int64_t i = 0; i < count; ++i)
    mutable_data<std::int64_t>(ends)[i] = length += std::int64_t(texts[i].size());
  const Tensor bytes = torch::stable::new_empty(boxes, {&length, 1}, ScalarType::Byte);
  char* to = mutable_data<char>(bytes);
  for (const std::string& one : texts) to = std::copy(one.begin(), one.end(), to);
  return {bytes, ends};
}

}  // namespace
}  // namespace vitadapter_zoo

// Python declares this operator (ops/masks.py).
STABLE_TORCH_LIBRARY_IMPL(vitadapter_zoo, CPU, m) {
  m.impl("_paste_rle", TORCH_BOX(&vitadapter_zoo::paste_rle));
}
