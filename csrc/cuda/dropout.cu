// out = dropout(x), the mask made from its counter: 256 mask words a block, one a thread, then the
// 32 columns of each word side by side.
#include "launch.h"
#include "mask.h"

namespace ffa::FFA_ISA {

struct Dropout : EveryArch {
  using Registers = Nothing;
  struct Shared {
    uint32_t kept[kThreads];
  };

  Mask mask;
  float scale;
  int64_t first_row, rows, columns;
  int dtype;
  const void* x;
  void* out;

  template <class Block>
  FFA_DEVICE void operator()(Block& block, int64_t index, Shared& shared) const {
    block.each([&](int thread, auto&) {
      const int64_t at = index * kThreads + thread;
      const int64_t row = at / mask.words_a_row, word = at % mask.words_a_row;
      shared.kept[thread] = row < rows ? mask_word(mask, first_row + row, word) : 0;
    });
    block.sync();
    block.each([&](int thread, auto&) {
      for (int i = thread; i < 32 * kThreads; i += kThreads) {
        const int64_t at = index * kThreads + i / 32;
        const int64_t row = at / mask.words_a_row, column = at % mask.words_a_row * 32 + i % 32;
        if (row >= rows || column >= columns) continue;
        const int64_t e = row * columns + column;
        const bool keep = shared.kept[i / 32] >> i % 32 & 1;
        store_as(dtype, out, e, keep ? load_as<float>(dtype, x, e) * scale : 0.0f);
      }
    });
  }
};

}  // namespace ffa::FFA_ISA

extern "C" int ffa_cuda_dropout(const int64_t* dropout_state, double p, int64_t first_row,
                                int64_t rows, int64_t columns, int dtype, const void* x, void* out,
                                void* stream) {
  using namespace ffa::FFA_ISA;
  if (!is_dtype(dtype) || dtype == FFA_F64) return FFA_BAD_DTYPE;
  Mask mask;
  if (const int status = make_mask(dropout_state, p, first_row, rows, columns, &mask)) {
    return status;
  }
  const float scale = static_cast<float>(dropout_rule(p).scale);
  return launch(Dropout{{}, mask, scale, first_row, rows, columns, dtype, x, out},
                ceil_div(rows * mask.words_a_row, kThreads), stream);
}
