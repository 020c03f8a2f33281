// Standard Gaussians from ChaCha20 words, eight to a block.
#include "../ffa.h"
#include "gaussian_fill.h"
#include "parallel.h"

namespace ffa::FFA_ISA {
namespace {

template <class T>
void fill(const ChaChaStream& stream, int64_t numel, T* out, int threads) {
  constexpr int64_t kChunk = 8192;
  parallel_for(threads, (numel + kChunk - 1) / kChunk, [&](int64_t task) {
    const int64_t first = task * kChunk;
    gaussian_range(stream, first, numel - first < kChunk ? numel - first : kChunk, out + first);
  });
}

}  // namespace

int gaussian(const int64_t* rng_state, int64_t tensor_id, int64_t numel, int dtype, void* out,
             int threads) {
  if (numel < 0 || numel > int64_t{8} << 32) return FFA_BAD_SIZE;
  const ChaChaStream stream = chacha_stream(rng_state, tensor_id);
  if (dtype == FFA_F32) {
    fill(stream, numel, static_cast<float*>(out), threads);
  } else if (dtype == FFA_F64) {
    fill(stream, numel, static_cast<double*>(out), threads);
  } else {
    return FFA_BAD_DTYPE;
  }
  return FFA_OK;
}

}  // namespace ffa::FFA_ISA
