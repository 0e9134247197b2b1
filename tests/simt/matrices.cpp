// Matrices in shared memory, their products, and what the copy engine does with them, on their own:
// each CTA reads a tile, multiplies it with itself and with a second one, and gives what it found
// to the next CTA of its cluster, which stores it.
#include "cases.hpp"
#include "common/elements.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"

namespace simt {
namespace {

constexpr int kRows = 16, kColumns = 64, kResults = 8, kRowBytes = 2 * kColumns;

struct MatricesArgs {
  int pitch;                 // of rows in shared memory, in bytes
  const std::byte* tiles;    // [num_ctas, kRows, kColumns]
  const std::byte* factors;  // [kResults, kRows]
  float* grams;              // [num_ctas, kRows, kRows]
  std::byte* copies;         // as tiles
  std::byte* mixes;          // [num_ctas, kResults, kColumns]: factors x tile, of the CTA before
};

template <typename T>
void matrices_kernel(const MatricesArgs& args) {
  using namespace cuda;
  const int lane = thread_rank(), g = lane / 4, t = lane % 4;
  std::byte* const tile = dynamic_shared_memory();
  std::byte* const copy = tile + kRows * args.pitch;
  std::byte* const mix = copy + kRows * args.pitch;
  std::byte* const given = mix + kResults * args.pitch;
  auto* const barriers = reinterpret_cast<Barrier*>(given + kResults * args.pitch);
  if (lane == 0) {
    init_barrier(barriers, 1);
    init_barrier(barriers + 1, 1);
    publish_barriers();
    arrive_and_expect(barriers, kRows * kRowBytes);
    arrive_and_expect(barriers + 1, kResults * kRowBytes);
  }
  sync_cluster();
  wait_for_previous_kernel();
  if (lane < kRows) {
    copy_bulk(tile + lane * args.pitch, args.tiles + (cta_rank() * kRows + lane) * kRowBytes,
              kRowBytes, barriers);
  }
  const auto* const factors = reinterpret_cast<const uint32_t*>(args.factors) + g * kRows / 2 + t;
  const uint32_t b[2] = {factors[0], factors[4]};
  wait(barriers, 0);

  // Of matrix j, rows or columns that come first, and second.
  const int half = lane / 8 % 2 * 8, late = lane / 16 * 8;
  const SharedAddress row = shared_address(tile) + (lane % 8 + half) * args.pitch + 2 * late;
  const SharedAddress to = shared_address(copy) + (lane % 8 + half) * args.pitch + 2 * late;
  const SharedAddress turned = shared_address(tile) + (lane % 8 + late) * args.pitch + 2 * half;
  const SharedAddress into = shared_address(mix) + lane % 8 * args.pitch + 2 * (half + 2 * late);
  float gram[2][4] = {};
  for (int column = 0; column < kColumns; column += 32) {
    uint32_t found[4];
    for (int i = 0; i < 2; ++i) {
      uint32_t x[4];
      load_matrices(x, row + 2 * (column + 16 * i));
      store_matrices(to + 2 * (column + 16 * i), x);
      for (int k = 0; k < 4; k += 2) {
        multiply_add_16x8x8(T{}, gram[0], x[k], x[k + 1], x[k]);
        multiply_add_16x8x8(T{}, gram[1], x[k], x[k + 1], x[k + 1]);
      }
      load_matrices_transposed(x, turned + 2 * (column + 16 * i));
      float product[4] = {};
      multiply_add_16x8x16(T{}, product, x, b);
      for (int k = 0; k < 2; ++k) {
        const T pair[2] = {narrow<T>(product[2 * k]), narrow<T>(product[2 * k + 1])};
        std::memcpy(&found[2 * i + k], pair, sizeof(pair));
      }
    }
    store_matrices_transposed(into + 2 * column, found);
  }
  for (int i = 0; i < 8; ++i) {
    args.grams[(cta_rank() * kRows + g + i % 4 / 2 * 8) * kRows + i / 4 * 8 + 2 * t + i % 2] =
        gram[i / 4][i % 4];
  }

  show_to_copy_engine();
  sync_warp();
  if (lane < kRows) {
    store_bulk(args.copies + (cta_rank() * kRows + lane) * kRowBytes, copy + lane * args.pitch,
               kRowBytes);
  }
  commit_bulk_stores();
  const int next = (rank_in_cluster() + 1) % cluster_size();
  if (lane < kResults) {
    copy_bulk_to(next, given + lane * args.pitch, mix + lane * args.pitch, kRowBytes, barriers + 1);
  }
  wait_for_remote(barriers + 1, 0);
  if (lane < kResults) {
    store_bulk(args.mixes + (cta_rank() * kResults + lane) * kRowBytes, given + lane * args.pitch,
               kRowBytes);
  }
  commit_bulk_stores();
  cuda::wait_for_bulk_stores<1>();
  cuda::wait_until_bulk_stores_are_read<0>();
  sync_cluster();
}

}  // namespace

void run_matrices(File& cases, File& results) {
  const auto dtype = static_cast<DType>(cases.take<int64_t>());
  const auto order = static_cast<Order>(cases.take<int64_t>());
  const auto size = static_cast<int>(cases.take<int64_t>());
  const auto pitch = static_cast<int>(cases.take<int64_t>());
  ConstRows tiles, factors;
  Rows grams, copies, mixes;
  const Buffer inputs[] = {take_rows(cases, tiles, false), take_rows(cases, factors, false)};
  std::vector<Buffer> outputs;
  for (Rows* rows : {&grams, &copies, &mixes}) outputs.push_back(take_rows(cases, *rows, true));
  const MatricesArgs args = {
      pitch,
      static_cast<const std::byte*>(inputs[0].data()),
      static_cast<const std::byte*>(inputs[1].data()),
      static_cast<float*>(grams.data),
      static_cast<std::byte*>(copies.data),
      static_cast<std::byte*>(mixes.data),
  };
  const int shared_bytes = 2 * (kRows + kResults) * pitch + 2 * static_cast<int>(sizeof(uint64_t));
  run({size, kWarpSize, shared_bytes, order, 7, size, nullptr}, [&] {
    dtype == DType::kBFloat16 ? matrices_kernel<__nv_bfloat16>(args)
                              : matrices_kernel<__half>(args);
  });
  const MatrixTraffic traffic = matrix_traffic();
  results.put(&traffic, sizeof(traffic));
  for (const Buffer& buffer : outputs) {
    results.put(buffer.data(), static_cast<size_t>(buffer.bytes));
  }
}

}  // namespace simt
