// RoIAlign's kernels, included by cpu_kernels.inl into its anonymous namespace.

// Computes N vectors of channels of a bin, starting at channel c: the sum over its cells.
template <int N, typename V>
ZOO_INLINE void pool_bin(
    const RoiShape& s, const Bins& x, const Bins& y, int column, int row, const V* image,
    V* output) {
  Vector<float> sum[N] = {};
  for (int i = 0; i < y.count[row]; ++i) {
    const V* cell =
        image + (std::int64_t(y.first[row] + i) * s.width + x.first[column]) * s.channels;
    const float row_weight = y.weights[row * y.most + i];
    for (int j = 0; j < x.count[column]; ++j, cell += s.channels) {
      const float weight = row_weight * x.weights[column * x.most + j];
      for (int n = 0; n < N; ++n)
        sum[n] += weight * load<Vector<float>>(cell + n * lanes<float>);
    }
  }
  for (int n = 0; n < N; ++n) store(output + n * lanes<float>, sum[n]);
}

// Computes the same for a single channel.
template <typename V>
ZOO_INLINE void pool_bin_channel(
    const RoiShape& s, const Bins& x, const Bins& y, int column, int row, const V* image,
    V* output) {
  float sum = 0;
  for (int i = 0; i < y.count[row]; ++i) {
    const V* cell =
        image + (std::int64_t(y.first[row] + i) * s.width + x.first[column]) * s.channels;
    for (int j = 0; j < x.count[column]; ++j, cell += s.channels)
      sum += y.weights[row * y.most + i] * x.weights[column * x.most + j] * load<float>(cell);
  }
  store(output, sum);
}

template <typename V>
void roi_align(
    const RoiShape& s, const V* maps, V* output, std::int64_t begin, std::int64_t end) {
  constexpr int L = lanes<float>;
  for (std::int64_t r = begin; r < end; ++r) {
    const Bins &x = s.x[r], &y = s.y[r];
    const V* image = maps + s.image[r] * s.height * s.width * s.channels;
    V* out = output + s.row[r] * s.size * s.size * s.channels;
    for (int row = 0; row < s.size; ++row)
      for (int column = 0; column < s.size; ++column, out += s.channels) {
        std::int64_t c = 0;
        for (; c + 4 * L <= s.channels; c += 4 * L)
          pool_bin<4>(s, x, y, column, row, image + c, out + c);
        for (; c + L <= s.channels; c += L)
          pool_bin<1>(s, x, y, column, row, image + c, out + c);
        for (; c < s.channels; ++c)
          pool_bin_channel(s, x, y, column, row, image + c, out + c);
      }
  }
}

// Adds the gradient of N vectors of channels of a bin to the gradients of its cells.
template <int N>
ZOO_INLINE void spread_bin(
    const RoiShape& s, const Bins& x, const Bins& y, int column, int row, const float* grad,
    float* image) {
  Vector<float> share[N];
  for (int n = 0; n < N; ++n) share[n] = load<Vector<float>>(grad + n * lanes<float>);
  for (int i = 0; i < y.count[row]; ++i) {
    float* cell = image + (std::int64_t(y.first[row] + i) * s.width + x.first[column]) * s.channels;
    const float row_weight = y.weights[row * y.most + i];
    for (int j = 0; j < x.count[column]; ++j, cell += s.channels) {
      const float weight = row_weight * x.weights[column * x.most + j];
      for (int n = 0; n < N; ++n) {
        float* to = cell + n * lanes<float>;
        store(to, load<Vector<float>>(to) + weight * share[n]);
      }
    }
  }
}

ZOO_INLINE void spread_bin_channel(
    const RoiShape& s, const Bins& x, const Bins& y, int column, int row, float grad,
    float* image) {
  for (int i = 0; i < y.count[row]; ++i) {
    float* cell = image + (std::int64_t(y.first[row] + i) * s.width + x.first[column]) * s.channels;
    for (int j = 0; j < x.count[column]; ++j, cell += s.channels)
      *cell += y.weights[row * y.most + i] * x.weights[column * x.most + j] * grad;
  }
}

void roi_align_backward(
    const RoiShape& s, const float* grad_output, float* grad_maps, std::int64_t begin,
    std::int64_t end) {
  constexpr int L = lanes<float>;
  for (std::int64_t r = 0; r < s.regions; ++r) {
    const Bins &x = s.x[r], &y = s.y[r];
    float* image = grad_maps + s.image[r] * s.height * s.width * s.channels;
    const float* grad = grad_output + r * s.size * s.size * s.channels;
    for (int row = 0; row < s.size; ++row)
      for (int column = 0; column < s.size; ++column, grad += s.channels) {
        std::int64_t c = begin;
        for (; c + 4 * L <= end; c += 4 * L)
          spread_bin<4>(s, x, y, column, row, grad + c, image + c);
        for (; c + L <= end; c += L)
          spread_bin<1>(s, x, y, column, row, grad + c, image + c);
        for (; c < end; ++c) spread_bin_channel(s, x, y, column, row, grad[c], image + c);
      }
  }
}
