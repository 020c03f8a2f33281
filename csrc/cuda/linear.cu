// The rank-r term of the adapted linear layer, added in place to the base product:
//
//   out[m, c] += scale keep[m, c] sum_k left[m, k] right[c, k]
//
//   forward     y  += s h B^T      left = h, right = B       no mask
//   backward    dx += s u A        left = u, right = A^T     the dropout mask of x
//
// One read and one write of `out` is all the traffic that counts. 16-bit types run on tensor cores;
// fp32, and bf16 on the sm_75 that cannot multiply it, on ordinary ones.
#include "launch.h"
#include "mask.h"

namespace ffa::FFA_ISA {

template <class T>
struct RankTerm {
  int64_t rows;
  int32_t columns, r;
  const T* left;
  const T* right;  // element (c, k) stands at c column_stride + k rank_stride
  int64_t column_stride, rank_stride;
  float scale;
  Mask mask;
  T* out;
  bool aligned;  // rows of `out` may be moved in runs
  bool paired;   // left, and right where k is contiguous, may be read two at a time

  FFA_DEVICE T left_at(int64_t row, int k) const {
    return row < rows && k < r ? left[row * r + k] : T{};
  }
  FFA_DEVICE T right_at(int column, int k) const {
    return column < columns && k < r ? right[column * column_stride + k * rank_stride] : T{};
  }
  // Elements k and k + 1, for even k.
  FFA_DEVICE uint32_t left_pair(int64_t row, int k) const {
    return load_run<2>(left + row * r + k, row < rows ? r - k : 0, paired).words[0];
  }
  FFA_DEVICE uint32_t right_pair(int column, int k) const {
    if (rank_stride != 1) return pair(right_at(column, k), right_at(column, k + 1));
    const T* at = right + column * column_stride + k;
    return load_run<2>(at, column < columns ? r - k : 0, paired).words[0];
  }
  // The mask of a tile that begins at a multiple of 32 columns, one word a thread.
  template <int kWordsARow>
  FFA_DEVICE void make_mask_word(int thread, int64_t first_row, int first_column,
                                 uint32_t* kept) const {
    const int64_t row = first_row + thread / kWordsARow;
    const int64_t word = first_column / 32 + thread % kWordsARow;
    kept[thread] = row < rows && word < mask.words_a_row ? mask_word(mask, row, word) : 0;
  }
};

// A warp owns 32 rows of 32 columns. The columns of a product's tile may stand in any order, and
// this one gives a lane eight neighbours: lane 4 p + q holds, over the four tiles j, columns
// 8 q + 2 j and 8 q + 2 j + 1 of rows p, p + 8, p + 16 and p + 24.
template <class T>
struct RankTermTensorCores {
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr int kFirstArch = kFirstTensorArch<T>, kEndArch = kNoArch;
  static constexpr int kRows = 32, kColumns = 32 * kWarps;
  struct Registers {
    Run<T, 8> old[2][2];
    uint32_t left[2][2], right[4];
    float sum[2][4][4];
  };
  struct Shared {
    uint32_t kept[kThreads];
  };

  RankTerm<T> term;

  template <class Block>
  FFA_DEVICE void operator()(Block& block, int64_t index, Shared& shared) const {
    const int panels = (term.columns + kColumns - 1) / kColumns;
    const int64_t first_row = index / panels * kRows;
    const int first_column = static_cast<int>(index % panels) * kColumns;
    block.each([&](int thread, Registers& mine) {
      const int p = thread % 32 / 4, q = thread % 4;
      const int column = first_column + thread / 32 * 32 + 8 * q;
      FFA_UNROLL for (int m = 0; m < 4; ++m) {
        const int64_t row = first_row + 8 * m + p;
        const int left = row < term.rows ? term.columns - column : 0;
        mine.old[m / 2][m % 2] =
            load_run<8>(term.out + row * term.columns + column, left, term.aligned);
        FFA_UNROLL for (int e = 0; e < 8; ++e) mine.sum[m / 2][m % 2 * 2 + e / 4][e % 4] = 0.0f;
      }
    });
    for (int k = 0; k < term.r; k += 8) {
      block.each([&](int thread, Registers& mine) {
        const int p = thread % 32 / 4, q = thread % 4;
        FFA_UNROLL for (int m = 0; m < 4; ++m) {
          const int64_t row = first_row + 8 * m + p;
          mine.left[m / 2][m % 2] = term.left_pair(row, k + 2 * q);
        }
        FFA_UNROLL for (int j = 0; j < 4; ++j) {
          const int column = first_column + thread / 32 * 32 + p / 2 * 8 + 2 * j + p % 2;
          mine.right[j] = term.right_pair(column, k + 2 * q);
        }
      });
      FFA_UNROLL for (int m = 0; m < 2; ++m) {
        FFA_UNROLL for (int j = 0; j < 4; ++j) {
          block.template multiply<T>([&](Registers& mine) {
            return Product{mine.sum[m][j], mine.left[m][0], mine.left[m][1], mine.right[j]};
          });
        }
      }
    }
    if (term.mask.state != nullptr) {
      block.each([&](int thread, Registers&) {
        term.template make_mask_word<kColumns / 32>(thread, first_row, first_column, shared.kept);
      });
      block.sync();
    }
    block.each([&](int thread, Registers& mine) {
      const int p = thread % 32 / 4, q = thread % 4;
      const int column = first_column + thread / 32 * 32 + 8 * q;
      FFA_UNROLL for (int m = 0; m < 4; ++m) {
        const int64_t row = first_row + 8 * m + p;
        if (row >= term.rows) continue;
        const uint32_t kept = term.mask.state == nullptr
                                  ? 0xffu
                                  : shared.kept[(8 * m + p) * kWarps + thread / 32] >> 8 * q;
        Run<T, 8> fresh = {};
        FFA_UNROLL for (int e = 0; e < 8; ++e) {
          const float more = term.scale * mine.sum[m / 2][e / 2][m % 2 * 2 + e % 2];
          const float old = widen(get(mine.old[m / 2][m % 2], e));
          T v;
          narrow(kept >> e & 1 ? old + more : old, v);
          set(fresh, e, v);
        }
        store_run(fresh, term.out + row * term.columns + column, term.columns - column,
                  term.aligned);
      }
    });
  }
};

// A block owns 64 rows of 128 columns, a thread eight rows of four columns.
template <class T>
struct RankTermPlain {
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr int kFirstArch = kOldestArch, kEndArch = kFirstTensorArch<T>;
  static constexpr int kRows = 64, kColumns = 128, kRanks = 16;
  struct Registers {
    float sum[8][4];
  };
  struct Shared {
    // Rows of the second begin four banks apart.
    alignas(16) float left[kRows][kRanks], right[kRanks][kColumns + 4];
    uint32_t kept[kThreads];
  };

  RankTerm<T> term;

  template <class Block>
  FFA_DEVICE void operator()(Block& block, int64_t index, Shared& shared) const {
    const int panels = (term.columns + kColumns - 1) / kColumns;
    const int64_t first_row = index / panels * kRows;
    const int first_column = static_cast<int>(index % panels) * kColumns;
    block.each([&](int thread, Registers& mine) {
      FFA_UNROLL for (int i = 0; i < 8; ++i) {
        FFA_UNROLL for (int j = 0; j < 4; ++j) mine.sum[i][j] = 0.0f;
      }
      if (term.mask.state != nullptr) {
        term.template make_mask_word<kColumns / 32>(thread, first_row, first_column, shared.kept);
      }
    });
    for (int first = 0; first < term.r; first += kRanks) {
      block.each([&](int thread, Registers&) {
        for (int i = thread; i < kRows * kRanks; i += kThreads) {
          shared.left[i / kRanks][i % kRanks] =
              widen(term.left_at(first_row + i / kRanks, first + i % kRanks));
        }
        for (int i = thread; i < kColumns * kRanks; i += kThreads) {
          // Neighbouring threads read neighbours in memory.
          const int column = term.rank_stride == 1 ? i / kRanks : i % kColumns;
          const int k = term.rank_stride == 1 ? i % kRanks : i / kColumns;
          shared.right[k][column] = widen(term.right_at(first_column + column, first + k));
        }
      });
      block.sync();
      block.each([&](int thread, Registers& mine) {
        FFA_UNROLL for (int k = 0; k < kRanks; ++k) {
          const Run<float, 4> right =
              *reinterpret_cast<const Run<float, 4>*>(&shared.right[k][thread % 32 * 4]);
          FFA_UNROLL for (int i = 0; i < 8; ++i) {
            const float left = shared.left[thread / 32 * 8 + i][k];
            FFA_UNROLL for (int j = 0; j < 4; ++j) mine.sum[i][j] += left * get(right, j);
          }
        }
      });
      block.sync();
    }
    block.each([&](int thread, Registers& mine) {
      const int column = first_column + thread % 32 * 4;
      FFA_UNROLL for (int i = 0; i < 8; ++i) {
        const int64_t row = first_row + thread / 32 * 8 + i;
        if (row >= term.rows) continue;
        const uint32_t kept =
            term.mask.state == nullptr
                ? 0xfu
                : shared.kept[(thread / 32 * 8 + i) * (kColumns / 32) + thread % 32 / 8] >>
                      thread % 8 * 4;
        T* at = term.out + row * term.columns + column;
        const Run<T, 4> run = load_run<4>(at, term.columns - column, term.aligned);
        Run<T, 4> fresh = {};
        FFA_UNROLL for (int j = 0; j < 4; ++j) {
          const float old = widen(get(run, j));
          T v;
          narrow(kept >> j & 1 ? old + term.scale * mine.sum[i][j] : old, v);
          set(fresh, j, v);
        }
        store_run(fresh, at, term.columns - column, term.aligned);
      }
    });
  }
};

template <class Program, class T>
int add_tiles(const RankTerm<T>& term, void* stream) {
  const int64_t tiles =
      ceil_div(term.rows, Program::kRows) * ceil_div(term.columns, Program::kColumns);
  return launch(Program{term}, tiles, stream);
}

template <class T>
int add_rank_term(RankTerm<T> term, int capability, void* stream) {
  if constexpr (kFirstTensorArch<T> < kNoArch) {
    term.aligned = rows_aligned<8>(term.out, term.columns);
    if (capability >= kFirstTensorArch<T>) {
      return add_tiles<RankTermTensorCores<T>>(term, stream);
    }
  }
  if constexpr (kFirstTensorArch<T> > kOldestArch) {
    term.aligned = rows_aligned<4>(term.out, term.columns);
    return add_tiles<RankTermPlain<T>>(term, stream);
  }
  return FFA_WRONG_ARCH;
}

}  // namespace ffa::FFA_ISA

extern "C" int ffa_cuda_rank_term(int64_t rows, int64_t columns, int64_t r, int dtype,
                                  const void* left, const void* right, int64_t column_stride,
                                  int64_t rank_stride, double scaling, const int64_t* dropout_state,
                                  double p, void* out, void* stream) {
  using namespace ffa::FFA_ISA;
  if (rows < 0 || columns < 0 || r < 0 || columns > kMostColumns || r > kMostColumns) {
    return FFA_BAD_SIZE;
  }
  Mask mask = {};
  if (dropout_state != nullptr) {
    if (const int status = make_mask(dropout_state, p, 0, rows, columns, &mask)) return status;
    scaling *= dropout_rule(p).scale;
  }
  if (r == 0) return FFA_OK;
  Device device;
  if (const int status = current_device(&device)) return status;
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    RankTerm<T> term = {};
    term.rows = rows;
    term.columns = static_cast<int32_t>(columns);
    term.r = static_cast<int32_t>(r);
    term.left = static_cast<const T*>(left);
    term.right = static_cast<const T*>(right);
    term.column_stride = column_stride;
    term.rank_stride = rank_stride;
    term.scale = static_cast<float>(scaling);
    term.mask = mask;
    term.out = static_cast<T*>(out);
    term.paired = rows_aligned<2>(term.left, r) && rows_aligned<2>(term.right, column_stride);
    return add_rank_term(term, device.capability, stream);
  });
}
