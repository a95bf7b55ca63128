// Threads that take pieces of the work one after the other.
//
// The ranges that parallel_for hands out are not used, because a thread whose core is busy with
// other work would delay its whole range.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace vitadapter_zoo {

// A thread has this many pieces on average, so that a late thread delays little.
constexpr std::int64_t PIECES_PER_THREAD = 8;

// Calls run(next) once in each thread. `next++` is the piece to work on, until it reaches `pieces`.
template <typename F>
void in_threads(std::int64_t pieces, const F& run) {
  std::atomic<std::int64_t> next{0};
  torch::stable::parallel_for(0, pieces, 1, [&](std::int64_t, std::int64_t) { run(next); });
}

// Calls run(begin, end) for pieces of at least `fewest` items; together they are 0 to `count`.
template <typename F>
void in_pieces(std::int64_t count, std::int64_t fewest, const F& run) {
  const std::int64_t threads = std::int64_t(torch::stable::get_num_threads());
  const std::int64_t wanted = threads == 1 ? 1 : threads * PIECES_PER_THREAD;
  const std::int64_t size = std::max(fewest, (count + wanted - 1) / wanted);
  const std::int64_t pieces = (count + size - 1) / size;
  in_threads(pieces, [&](std::atomic<std::int64_t>& next) {
    for (std::int64_t piece = next++; piece < pieces; piece = next++)
      run(piece * size, std::min(count, (piece + 1) * size));
  });
}

}  // namespace vitadapter_zoo
