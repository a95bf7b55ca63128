// The kernels of the 3x3 convolution, included by cpu_kernels.inl into its anonymous namespace.
//
// Winograd's minimal filtering (Lavin and Gray, arXiv:1509.09308): an output tile of M x M pixels
// depends on T x T input pixels, T = M + 2. Input and weights are transformed to T x T values each.
// The products of these values, summed over the input channels, are transformed back to the tile.
// For M = 4 this takes 36 products instead of 144.
//
// The transforms evaluate polynomials at T - 1 points and infinity. For M = 4 the paper has the
// points 0, 1, -1, 2, -2. The points used here, 0, +-5/8, +-3/2, halve the rounding error, and all
// of their powers that the transforms need are exact in float32.

constexpr float POINT_A = 0.625f, POINT_B = 1.5f;
constexpr float SQUARE_A = POINT_A * POINT_A, SQUARE_B = POINT_B * POINT_B;

// Rows of the register block. With its two vectors of output channels it needs all 32 registers of
// AVX-512, or all 16 of the other sets.
constexpr int CONV_ROWS = ZOO_VECTOR_BYTES == 64 ? 12 : 6;
constexpr std::int64_t PANEL = 2 * lanes<float>;  // output channels of a register block
constexpr std::int64_t LINE = 16;                 // floats in a line of the cache
typedef float HalfFloats __attribute__((vector_size(ZOO_VECTOR_BYTES / 2)));

// Transforms T input values along one axis. F is a vector of channels.
template <typename F>
ZOO_INLINE void transform_input(const F (&d)[6], F (&v)[6]) {
  constexpr float A = POINT_A, B = POINT_B, AA = SQUARE_A, BB = SQUARE_B;
  const F even_a = d[4] - BB * d[2], odd_a = d[3] - BB * d[1];
  const F even_b = d[4] - AA * d[2], odd_b = d[3] - AA * d[1];
  v[0] = d[4] - (AA + BB) * d[2] + (AA * BB) * d[0];
  v[1] = even_a + A * odd_a;
  v[2] = even_a - A * odd_a;
  v[3] = even_b + B * odd_b;
  v[4] = even_b - B * odd_b;
  v[5] = d[5] - (AA + BB) * d[3] + (AA * BB) * d[1];
}

template <typename F>
ZOO_INLINE void transform_input(const F (&d)[4], F (&v)[4]) {
  v[0] = d[0] - d[2];
  v[1] = d[1] + d[2];
  v[2] = d[2] - d[1];
  v[3] = d[3] - d[1];
}

// Transforms T sums of products to M output values along one axis.
template <typename F>
ZOO_INLINE void transform_output(const F (&m)[6], F (&y)[4]) {
  constexpr float A = POINT_A, B = POINT_B, AA = SQUARE_A, BB = SQUARE_B;
  const F even_a = m[1] + m[2], odd_a = m[1] - m[2];
  const F even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = m[0] + even_a + even_b;
  y[1] = A * odd_a + B * odd_b;
  y[2] = AA * even_a + BB * even_b;
  y[3] = m[5] + (A * AA) * odd_a + (B * BB) * odd_b;
}

template <typename F>
ZOO_INLINE void transform_output(const F (&m)[4], F (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] + m[3];
}

// Transforms three weights along one axis. F is a vector of output channels, in double.
template <typename F>
ZOO_INLINE void transform_weight(const F (&g)[3], F (&u)[6]) {
  constexpr double A = POINT_A, B = POINT_B, AA = SQUARE_A, BB = SQUARE_B;
  constexpr double of_a = 1 / (2 * AA * (AA - BB)), of_b = 1 / (2 * BB * (BB - AA));
  u[0] = g[0] * (1 / (AA * BB));
  u[1] = (g[0] + A * g[1] + AA * g[2]) * of_a;
  u[2] = (g[0] - A * g[1] + AA * g[2]) * of_a;
  u[3] = (g[0] + B * g[1] + BB * g[2]) * of_b;
  u[4] = (g[0] - B * g[1] + BB * g[2]) * of_b;
  u[5] = g[2];
}

template <typename F>
ZOO_INLINE void transform_weight(const F (&g)[3], F (&u)[4]) {
  u[0] = g[0];
  u[1] = (g[0] + g[1] + g[2]) * 0.5;
  u[2] = (g[0] - g[1] + g[2]) * 0.5;
  u[3] = g[2];
}

// The packed weights are [panels][T * T][channels][PANEL]; the last panel may be half as wide.
template <int M, typename V>
void conv_pack_tiles(
    const ConvShape& s, const V* weight, float* packed, std::int64_t begin, std::int64_t end) {
  constexpr int T = M + 2;
  using D = Vector<double>;
  for (std::int64_t first = 0; first < s.outputs; first += PANEL) {
    const std::int64_t wide = std::min(PANEL, s.outputs - first);
    float* panel = packed + first * T * T * s.channels;
    for (std::int64_t c = begin; c < end; ++c) {
      double filters[9][PANEL];
      for (std::int64_t k = 0; k < wide; ++k) {
        const V* from = weight + ((first + k) * s.channels + c) * 9;
        for (int i = 0; i < 9; ++i) filters[i][k] = load<float>(from + i);
      }
      float transformed[T * T][PANEL];
      for (std::int64_t k = 0; k < wide; k += lanes<double>) {
        D columns[T][3];
        for (int x = 0; x < 3; ++x) {
          const D g[3] = {
              load<D>(filters[x] + k), load<D>(filters[3 + x] + k), load<D>(filters[6 + x] + k)};
          D u[T];
          transform_weight(g, u);
          for (int i = 0; i < T; ++i) columns[i][x] = u[i];
        }
        for (int i = 0; i < T; ++i) {
          D u[T];
          transform_weight(columns[i], u);
          for (int j = 0; j < T; ++j)
            store(transformed[i * T + j] + k, convert<HalfFloats>(u[j]));
        }
      }
      for (int xy = 0; xy < T * T; ++xy)
        std::memcpy(
            panel + (xy * s.channels + c) * wide, transformed[xy], wide * sizeof(float));
    }
  }
}

template <typename V>
void conv_pack(
    const ConvShape& s, const V* weight, float* packed, std::int64_t begin, std::int64_t end) {
  const auto run = s.tile == 4 ? conv_pack_tiles<4, V> : conv_pack_tiles<2, V>;
  run(s, weight, packed, begin, end);
}

// The scratch memory: transformed input [T * T][tiles][channels], products [T * T][tiles][PANEL]
// and a pixel of zeros. A vector follows each row of channels and each block of products, because
// addresses that differ by powers of two compete for the same lines of the cache.
struct ConvScratch {
  std::int64_t row, input_block, product_block, products, zeros, size;

  ConvScratch(const ConvShape& s, std::int64_t tiles) {
    const std::int64_t values = (s.tile + 2) * (s.tile + 2);
    row = s.channels + 16;
    input_block = tiles * row;
    product_block = tiles * PANEL + 16;
    products = values * input_block;
    zeros = products + values * product_block;
    size = zeros + s.channels;
  }
};

std::int64_t conv_scratch(const ConvShape& s, std::int64_t tiles) {
  return ConvScratch(s, tiles).size;
}

// The position of a tile's first output pixel.
struct TilePlace {
  std::int64_t image, y, x;

  TilePlace(const ConvShape& s, std::int64_t index) {
    const std::int64_t across = (s.width + s.tile - 1) / s.tile;
    const std::int64_t down = (s.height + s.tile - 1) / s.tile;
    image = index / (down * across);
    y = index / across % down * s.tile;
    x = index % across * s.tile;
  }
};

// Transforms the input of one tile. Pixels outside of the map are zeros.
template <int M, typename V>
ZOO_INLINE void conv_input_tile(
    const ConvShape& s, const TilePlace& at, const V* input, const V* zeros,
    std::int64_t block, float* to) {
  constexpr int T = M + 2;
  using F = Vector<float>;
  const V* pixel[T][T];
  for (int i = 0; i < T; ++i)
    for (int j = 0; j < T; ++j) {
      const std::int64_t y = at.y + i - 1, x = at.x + j - 1;
      const bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
      pixel[i][j] =
          inside ? input + ((at.image * s.height + y) * s.width + x) * s.channels : zeros;
    }
  for (std::int64_t c = 0; c < s.channels; c += lanes<float>) {
    F columns[T][T];
    for (int j = 0; j < T; ++j) {
      F d[T], v[T];
      for (int i = 0; i < T; ++i) d[i] = load<F>(pixel[i][j] + c);
      transform_input(d, v);
      for (int i = 0; i < T; ++i) columns[i][j] = v[i];
    }
    for (int i = 0; i < T; ++i) {
      F v[T];
      transform_input(columns[i], v);
      for (int j = 0; j < T; ++j) store(to + (i * T + j) * block + c, v[j]);
    }
  }
}

// Transforms the products of one tile for N vectors of output channels, adds the bias and writes
// the pixels that are inside of the map.
template <int M, int N, typename V>
ZOO_INLINE void conv_output_tile(
    const ConvShape& s, const TilePlace& at, const float* products, std::int64_t block,
    const float* bias, V* output) {
  constexpr int T = M + 2;
  using F = Vector<float>;
  const int down = int(std::min<std::int64_t>(M, s.height - at.y));
  const int across = int(std::min<std::int64_t>(M, s.width - at.x));
  V* first = output + ((at.image * s.height + at.y) * s.width + at.x) * s.outputs;
  for (int n = 0; n < N; ++n) {
    const int c = n * lanes<float>;
    const F shift = load<F>(bias + c);
    F columns[M][T];
    for (int j = 0; j < T; ++j) {
      F m[T], y[M];
      for (int i = 0; i < T; ++i) m[i] = load<F>(products + (i * T + j) * block + c);
      transform_output(m, y);
      for (int i = 0; i < M; ++i) columns[i][j] = y[i];
    }
    for (int i = 0; i < down; ++i) {
      F y[M];
      transform_output(columns[i], y);
      V* row = first + i * s.width * s.outputs + c;
      for (int j = 0; j < M; ++j) {
        F value = y[j] + shift;
        if (s.relu) value = value < 0 ? F{} : value;  // NaN stays NaN
        if (j < across) store(row + j * s.outputs, value);
      }
    }
  }
}

// Multiplies R rows of `channels` values by weights [channels][N vectors]. A cache line for each
// channel is prefetched from `ahead`.
template <int R, int N>
void conv_multiply(
    const float* input, std::int64_t row, const float* weights, std::int64_t channels,
    float* products, const float* ahead) {
  constexpr int L = lanes<float>;
  Vector<float> sum[R][N] = {};
  for (std::int64_t c = 0; c < channels; ++c, weights += N * L) {
    __builtin_prefetch(ahead + LINE * c, 0, 2);
    Vector<float> w[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) w[n] = load<Vector<float>>(weights + n * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float x = input[r * row + c];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) sum[r][n] += x * w[n];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) store(products + r * PANEL + n * L, sum[r][n]);
}

// conv_multiply for `rows` <= R.
template <int R, int N>
ZOO_INLINE void conv_multiply_rows(
    int rows, const float* input, std::int64_t row, const float* weights, std::int64_t channels,
    float* products, const float* ahead) {
  if (rows == R)
    conv_multiply<R, N>(input, row, weights, channels, products, ahead);
  else if constexpr (R > 1)
    conv_multiply_rows<R - 1, N>(rows, input, row, weights, channels, products, ahead);
}

// Prefetches the output pixels of one tile for N vectors of channels. Otherwise each store to a line
// that is not in the cache waits for the line to be read.
template <int M, int N, typename V>
ZOO_INLINE void conv_prefetch_tile(const ConvShape& s, const TilePlace& at, const V* output) {
  const V* first = output + ((at.image * s.height + at.y) * s.width + at.x) * s.outputs;
  for (int i = 0; i < std::min<std::int64_t>(M, s.height - at.y); ++i)
    for (int j = 0; j < std::min<std::int64_t>(M, s.width - at.x); ++j)
      for (int c = 0; c < N * lanes<float>; c += LINE * int(sizeof(float) / sizeof(V)))
        __builtin_prefetch(first + (i * s.width + j) * s.outputs + c, 1, 2);
}

// Computes N vectors of output channels of the tiles. Meanwhile it prefetches the weights of the
// next products and the output.
template <int M, int N, typename V>
void conv_panel(
    const ConvShape& s, const ConvScratch& at, const std::vector<TilePlace>& places,
    const float* weights, const float* bias, V* output, float* scratch) {
  constexpr int VALUES = (M + 2) * (M + 2);
  const std::int64_t tiles = std::int64_t(places.size());
  const std::int64_t size = s.channels * N * lanes<float>;
  float* products = scratch + at.products;
  std::int64_t prefetched = 0;
  for (int xy = 0; xy < VALUES; ++xy) {
    for (; prefetched < tiles * (xy + 1) / VALUES; ++prefetched)
      conv_prefetch_tile<M, N>(s, places[prefetched], output);
    for (std::int64_t tile = 0; tile < tiles; tile += CONV_ROWS) {
      const std::int64_t ahead = size + std::min(tile / CONV_ROWS * s.channels * LINE, size);
      conv_multiply_rows<CONV_ROWS, N>(
          int(std::min<std::int64_t>(CONV_ROWS, tiles - tile)),
          scratch + xy * at.input_block + tile * at.row, at.row, weights + xy * size, s.channels,
          products + xy * at.product_block + tile * PANEL, weights + xy * size + ahead);
    }
  }
  for (std::int64_t tile = 0; tile < tiles; ++tile)
    conv_output_tile<M, N>(
        s, places[tile], products + tile * PANEL, at.product_block, bias, output);
}

template <int M, typename V>
void conv_run_tiles(
    const ConvShape& s, const V* input, const float* packed, const float* bias, V* output,
    float* scratch, std::int64_t begin, std::int64_t end) {
  constexpr int VALUES = (M + 2) * (M + 2);
  const ConvScratch at(s, end - begin);
  // Zeros have the same bits in every type.
  std::fill(scratch + at.zeros, scratch + at.zeros + s.channels, 0.0f);
  const V* zeros = reinterpret_cast<const V*>(scratch + at.zeros);
  std::vector<TilePlace> places;
  for (std::int64_t tile = begin; tile < end; ++tile) {
    places.emplace_back(s, tile);
    conv_input_tile<M>(
        s, places.back(), input, zeros, at.input_block, scratch + (tile - begin) * at.row);
  }
  for (std::int64_t k = 0; k < s.outputs; k += PANEL) {
    const auto panel = k + PANEL <= s.outputs ? conv_panel<M, 2, V> : conv_panel<M, 1, V>;
    panel(s, at, places, packed + k * VALUES * s.channels, bias + k, output + k, scratch);
  }
}

template <typename V>
void conv_run(
    const ConvShape& s, const V* input, const float* packed, const float* bias, V* output,
    float* scratch, std::int64_t begin, std::int64_t end) {
  const auto run = s.tile == 4 ? conv_run_tiles<4, V> : conv_run_tiles<2, V>;
  run(s, input, packed, bias, output, scratch, begin, end);
}
