// u = g B, G_i = scale g_i^T h_i and |G_i|^2 from one read of g.
//
// A block owns a panel of g's columns, a slice of a record's tokens and a chunk of the ranks. It
// holds its part of G in registers while it walks over the tokens, and gives its panel's part of u
// for each. What only several blocks together make (u where d_out has several panels, G where the
// tokens are cut so that the grid fills the device) goes through fp32 scratch and is added in a
// fixed order by a second launch; so are the squares, in fp64. Nothing depends on the order of
// blocks.
#include "launch.h"

namespace ffa::FFA_ISA {

// Everything that depends on sizes alone: one place, for the scratch's size and for the launches.
struct Plan {
  int64_t panels, chunks, splits;
  int64_t slots;  // partial squares a record
  int64_t square_bytes, u_bytes, G_bytes;
  int64_t bytes() const { return square_bytes + u_bytes + G_bytes; }
};

// A slice's share of G must not cost more traffic than its tokens.
constexpr int64_t kTokensASlice = 128;
constexpr int64_t kCombined = 8 * kThreads;  // elements of G that a block of `Combine` adds

inline Plan make_plan(int64_t n, int64_t rows, int64_t d_out, int64_t r, bool with_u,
                      int64_t panel_columns, int64_t chunk_ranks, int multiprocessors) {
  Plan plan;
  plan.panels = ceil_div(d_out, panel_columns);
  plan.chunks = ceil_div(r, chunk_ranks);
  const int64_t blocks = n * plan.panels * plan.chunks, wanted = 2 * multiprocessors;
  const int64_t most = n > 0 ? rows / n / kTokensASlice : 1;
  plan.splits = blocks > 0 ? wanted / blocks : 1;
  if (plan.splits > most) plan.splits = most;
  if (plan.splits < 1) plan.splits = 1;
  plan.slots = plan.splits > 1 ? ceil_div(d_out * r, kCombined) : plan.panels * plan.chunks;
  plan.square_bytes = plan.slots > 1 ? n * plan.slots * 8 : 0;
  plan.u_bytes = with_u && plan.panels > 1 ? plan.panels * rows * r * 4 : 0;
  plan.G_bytes = plan.splits > 1 ? plan.splits * n * d_out * r * 4 : 0;
  return plan;
}

template <class T>
struct Problem {
  int64_t n, rows;
  int32_t d_out, r;
  const T* g;
  const T* h;
  const T* B;              // null: no u
  const int32_t* offsets;  // null: rows / n each
  float scale;
  T* u;
  T* G;
  double* squares;
  Plan plan;
  double* square_parts;  // (n, slots)
  float* u_parts;        // (panels, rows, r)
  float* G_parts;        // (splits, n, d_out, r), not yet scaled
  bool aligned;          // rows of g may be read in runs
  bool paired;           // rows of h may be read, and of G written, two at a time

  FFA_DEVICE int64_t offset(int64_t i) const {
    const int64_t at = offsets[i];
    return at < 0 ? 0 : at > rows ? rows : at;
  }
  FFA_DEVICE void add_square(int64_t record, int64_t slot, double square) const {
    (plan.slots > 1 ? square_parts + record * plan.slots + slot : squares + record)[0] = square;
  }
};

// What one block works on. With offsets, rows before the first and after the last record need their
// u all the same: they are records n and n + 1, which have no G.
struct Place {
  int64_t record, split;
  int32_t panel, chunk;
  int64_t begin, end;  // rows of g

  template <class T>
  FFA_DEVICE Place(const Problem<T>& p, int64_t index) {
    panel = static_cast<int32_t>(index % p.plan.panels);
    chunk = static_cast<int32_t>(index / p.plan.panels % p.plan.chunks);
    split = index / (p.plan.panels * p.plan.chunks) % p.plan.splits;
    record = index / (p.plan.panels * p.plan.chunks * p.plan.splits);
    if (p.offsets == nullptr) {
      begin = p.rows / p.n * record;
      end = begin + p.rows / p.n;
    } else if (record < p.n) {
      begin = p.offset(record);
      end = p.offset(record + 1);
    } else {
      begin = record == p.n ? 0 : p.offset(p.n);
      end = record == p.n ? p.offset(0) : p.rows;
    }
    if (end < begin) end = begin;
    const int64_t slice = (end - begin + p.plan.splits - 1) / p.plan.splits;
    begin = begin + split * slice < end ? begin + split * slice : end;
    end = begin + slice < end ? begin + slice : end;
  }
};

// Elements k and k + 1 of a column of G, or this block's part of them where others have the rest.
// Returns the squares to be counted.
template <class T>
FFA_DEVICE double put_G(const Problem<T>& p, const Place& at, int column, int k, float first,
                        float second) {
  if (column >= p.d_out || k >= p.r || at.record >= p.n) return 0.0;
  const int64_t e = (at.record * p.d_out + column) * p.r + k;
  const int left = p.r - k;
  if (p.plan.splits > 1) {
    Run<float, 2> part;
    set(part, 0, first);
    set(part, 1, second);
    store_run(part, p.G_parts + at.split * p.n * p.d_out * p.r + e, left, p.paired);
    return 0.0;
  }
  T v[2];
  narrow(p.scale * first, v[0]);
  narrow(p.scale * second, v[1]);
  Run<T, 2> run = {};
  set(run, 0, v[0]);
  set(run, 1, v[1]);
  store_run(run, p.G + e, left, p.paired);
  const double a = widen(v[0]), b = left > 1 ? widen(v[1]) : 0.0f;
  return a * a + b * b;
}

template <class T>
FFA_DEVICE void put_u(const Problem<T>& p, const Place& at, int64_t row, int k, float sum) {
  if (row >= at.end || k >= p.r) return;
  if (p.plan.panels > 1) {
    p.u_parts[(at.panel * p.rows + row) * p.r + k] = sum;
  } else {
    narrow(sum, p.u[row * p.r + k]);
  }
}

template <class T, class Block, class Registers, class Shared>
FFA_DEVICE void count_squares(const Problem<T>& p, const Place& at, Block& block, Shared& shared) {
  if (p.plan.splits > 1 || at.record >= p.n) return;
  block.each([&](int thread, Registers& mine) { shared.squares[thread] = mine.square; });
  sum_threads(block, shared.squares);
  block.each([&](int thread, Registers&) {
    if (thread == 0) {
      p.add_square(at.record, at.panel * p.plan.chunks + at.chunk, shared.squares[0]);
    }
  });
}

// Tensor cores. A warp owns kGroups times 32 columns and goes over 16 tokens at a time, reading g
// once into registers, where it stays in the layout of a product's left operand:
//
//   lane 4 p + q holds columns 8 q to 8 q + 7 of tokens p and p + 8, the word j columns 8 q + 2 j
//   and 8 q + 2 j + 1: tile j is the left operand of u += g B for these columns
//   its transpose is the left operand of G += g^T h: row p is column 8 (p / 2) + 2 j + p % 2
//
// The parts of u that the warps have for their columns meet in shared memory.
template <class T, int kRanks, int kGroups>
struct PerSampleGradTensorCores {
  static constexpr int kBlocksPerMultiprocessor = kRanks > 16 ? 1 : 2;
  static constexpr int kFirstArch = kFirstTensorArch<T>, kEndArch = kNoArch;
  static constexpr int kRun = 8, kTokens = 16, kTiles = kRanks / 8;
  static constexpr int kColumns = 32 * kGroups * kWarps, kChunk = kRanks;
  // Two buffers spare a barrier a step where they are small.
  static constexpr int kBuffers = kRanks > 16 ? 1 : 2;
  struct Registers {
    Run<T, 8> g[kGroups][2], next[kGroups][2];
    uint32_t h[2][kTiles], B[kGroups][4][kTiles], turned[2];
    float u[kTiles][4], G[kGroups][2][kTiles][4];
    double square;
  };
  struct Shared {
    float u[kBuffers][kWarps][kTokens][kRanks];
    double squares[kThreads];
  };

  Problem<T> problem;

  FFA_DEVICE void load_next(const Place& at, int64_t token, int thread, Registers& mine) const {
    const int column = at.panel * kColumns + thread / 32 * (32 * kGroups) + thread % 4 * 8;
    FFA_UNROLL for (int half = 0; half < 2; ++half) {
      const int64_t row = token + 8 * half + thread % 32 / 4;
      const T* from = problem.g + row * problem.d_out + column;
      const int left = row < at.end ? problem.d_out - column : 0;
      FFA_UNROLL for (int group = 0; group < kGroups; ++group) {
        mine.next[group][half] = load_run<8>(from + 32 * group, left - 32 * group, problem.aligned);
      }
    }
  }

  FFA_DEVICE void load_h(const Place& at, int64_t token, int thread, Registers& mine) const {
    FFA_UNROLL for (int half = 0; half < 2; ++half) {
      const int64_t row = token + 8 * half + thread % 32 / 4;
      FFA_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
        const int k = at.chunk * kRanks + 8 * tile + thread % 4 * 2;
        mine.h[half][tile] = load_run<2>(problem.h + row * problem.r + k,
                                         row < at.end ? problem.r - k : 0, problem.paired)
                                 .words[0];
      }
    }
  }

  FFA_DEVICE void load_B(const Place& at, int thread, Registers& mine) const {
    const auto B = [&](int column, int k) {
      return column < problem.d_out && k < problem.r ? problem.B[int64_t{column} * problem.r + k]
                                                     : T{};
    };
    FFA_UNROLL for (int group = 0; group < kGroups; ++group) {
      FFA_UNROLL for (int j = 0; j < 4; ++j) {
        const int column =
            at.panel * kColumns + (thread / 32 * kGroups + group) * 32 + thread % 4 * 8 + 2 * j;
        FFA_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
          const int k = at.chunk * kRanks + 8 * tile + thread % 32 / 4;
          mine.B[group][j][tile] = pair(B(column, k), B(column + 1, k));
        }
      }
    }
  }

  template <class Block>
  FFA_DEVICE void operator()(Block& block, int64_t index, Shared& shared) const {
    const Problem<T>& p = problem;
    const Place at(p, index);
    const int ranks = p.r - at.chunk * kRanks;
    block.each([&](int thread, Registers& mine) {
      FFA_UNROLL for (int e = 0; e < kGroups * 2 * kTiles * 4; ++e) {
        mine.G[e / (2 * kTiles * 4)][e / (kTiles * 4) % 2][e / 4 % kTiles][e % 4] = 0.0f;
      }
      if (p.B != nullptr) load_B(at, thread, mine);
      load_next(at, at.begin, thread, mine);
    });
    int buffer = 0;
    for (int64_t token = at.begin; token < at.end; token += kTokens) {
      block.each([&](int thread, Registers& mine) {
        FFA_UNROLL for (int group = 0; group < kGroups; ++group) {
          FFA_UNROLL for (int half = 0; half < 2; ++half) {
            mine.g[group][half] = mine.next[group][half];
          }
        }
        load_h(at, token, thread, mine);
        load_next(at, token + kTokens, thread, mine);
        FFA_UNROLL for (int e = 0; e < kTiles * 4; ++e) mine.u[e / 4][e % 4] = 0.0f;
      });
      FFA_UNROLL for (int half = 0; half < 2; ++half) {
        FFA_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
          block.turn(
              [&](Registers& mine) { return Turn{&mine.h[half][tile], mine.h[half][tile]}; });
        }
      }
      FFA_UNROLL for (int group = 0; group < kGroups; ++group) {
        FFA_UNROLL for (int half = 0; half < 2; ++half) {
          FFA_UNROLL for (int two = 0; two < 2; ++two) {
            FFA_UNROLL for (int j = 0; j < 2; ++j) {
              block.turn([&](Registers& mine) {
                return Turn{&mine.turned[j], mine.g[group][half].words[2 * two + j]};
              });
            }
            FFA_UNROLL for (int tile = 0; tile < kTiles; ++tile) {
              if (8 * tile >= ranks) continue;
              block.template multiply<T>([&](Registers& mine) {
                return Product{mine.G[group][two][tile], mine.turned[0], mine.turned[1],
                               mine.h[half][tile]};
              });
            }
          }
        }
        if (p.B == nullptr) continue;
        FFA_UNROLL for (int e = 0; e < 4 * kTiles; ++e) {
          const int j = e / kTiles, tile = e % kTiles;
          if (8 * tile >= ranks) continue;
          block.template multiply<T>([&](Registers& mine) {
            return Product{mine.u[tile], mine.g[group][0].words[j], mine.g[group][1].words[j],
                           mine.B[group][j][tile]};
          });
        }
      }
      if (p.B == nullptr) continue;
      block.each([&](int thread, Registers& mine) {
        float (*mine_of_u)[kRanks] = shared.u[buffer][thread / 32];
        FFA_UNROLL for (int e = 0; e < kTiles * 4; ++e) {
          const int row = thread % 32 / 4 + e % 4 / 2 * 8;
          mine_of_u[row][e / 4 * 8 + thread % 4 * 2 + e % 2] = mine.u[e / 4][e % 4];
        }
      });
      block.sync();
      block.each([&](int thread, Registers&) {
        for (int i = thread; i < kTokens * kRanks; i += kThreads) {
          float sum = 0.0f;
          FFA_UNROLL for (int warp = 0; warp < kWarps; ++warp) {
            sum += shared.u[buffer][warp][i / kRanks][i % kRanks];
          }
          put_u(p, at, token + i / kRanks, at.chunk * kRanks + i % kRanks, sum);
        }
      });
      if (kBuffers == 1) block.sync();
      buffer = (buffer + 1) % kBuffers;
    }
    block.each([&](int thread, Registers& mine) {
      mine.square = 0.0;
      const int row = thread % 32 / 4;
      FFA_UNROLL for (int group = 0; group < kGroups; ++group) {
        FFA_UNROLL for (int e = 0; e < 4 * kTiles; ++e) {
          const int j = e / kTiles, tile = e % kTiles;
          const float* sum = mine.G[group][j / 2][tile] + j % 2 * 2;
          const int column = at.panel * kColumns + (thread / 32 * kGroups + group) * 32 +
                             row / 2 * 8 + 2 * j + row % 2;
          const int k = at.chunk * kRanks + 8 * tile + thread % 4 * 2;
          mine.square += put_G(p, at, column, k, sum[0], sum[1]);
        }
      }
    });
    count_squares<T, Block, Registers>(p, at, block, shared);
  }
};

// Ordinary arithmetic in fp32. A block goes over 32 tokens of 128 columns at a time in shared
// memory. For G a thread owns four columns and two ranks; for u, four tokens and four ranks over
// its warp's sixteen columns.
template <class T>
struct PerSampleGradPlain {
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr int kFirstArch = kOldestArch, kEndArch = kFirstTensorArch<T>;
  static constexpr int kRun = 4, kTokens = 32, kColumns = 128, kChunk = 16;
  struct Registers {
    float u[4][4], G[4][2];
    double square;
  };
  struct Shared {
    union {
      float g[kTokens][kColumns + 4];  // rows begin four banks apart
      float u[kWarps][kTokens][kChunk];
    };
    alignas(16) float B[kColumns][kChunk];
    float h[kTokens][kChunk];
    double squares[kThreads];
  };

  Problem<T> problem;

  template <class Block>
  FFA_DEVICE void operator()(Block& block, int64_t index, Shared& shared) const {
    const Problem<T>& p = problem;
    const Place at(p, index);
    const int first_column = at.panel * kColumns, first_k = at.chunk * kChunk;
    block.each([&](int thread, Registers& mine) {
      FFA_UNROLL for (int e = 0; e < 8; ++e) mine.G[e / 2][e % 2] = 0.0f;
      for (int i = thread; i < kColumns * kChunk && p.B != nullptr; i += kThreads) {
        const int column = first_column + i / kChunk, k = first_k + i % kChunk;
        const bool inside = column < p.d_out && k < p.r;
        shared.B[i / kChunk][i % kChunk] = inside ? widen(p.B[int64_t{column} * p.r + k]) : 0.0f;
      }
    });
    for (int64_t token = at.begin; token < at.end; token += kTokens) {
      block.each([&](int thread, Registers&) {
        FFA_UNROLL for (int i = thread; i < kTokens * kColumns / 4; i += kThreads) {
          const int row = i / (kColumns / 4), column = i % (kColumns / 4) * 4;
          const Run<T, 4> run =
              load_run<4>(p.g + (token + row) * p.d_out + first_column + column,
                          token + row < at.end ? p.d_out - first_column - column : 0, p.aligned);
          FFA_UNROLL for (int j = 0; j < 4; ++j) shared.g[row][column + j] = widen(get(run, j));
        }
        for (int i = thread; i < kTokens * kChunk; i += kThreads) {
          const int64_t row = token + i / kChunk;
          const int k = first_k + i % kChunk;
          const bool inside = row < at.end && k < p.r;
          shared.h[i / kChunk][i % kChunk] = inside ? widen(p.h[row * p.r + k]) : 0.0f;
        }
      });
      block.sync();
      block.each([&](int thread, Registers& mine) {
        const int lane = thread % 32, warp = thread / 32;
        // Added to G as one, so that its rounding grows with the root of the tiles, not the tokens.
        float tile[4][2] = {};
        FFA_UNROLL for (int row = 0; row < kTokens; ++row) {
          FFA_UNROLL for (int j = 0; j < 4; ++j) {
            tile[j][0] += shared.g[row][4 * lane + j] * shared.h[row][2 * warp];
            tile[j][1] += shared.g[row][4 * lane + j] * shared.h[row][2 * warp + 1];
          }
        }
        FFA_UNROLL for (int e = 0; e < 8; ++e) mine.G[e / 2][e % 2] += tile[e / 2][e % 2];
        if (p.B == nullptr) return;
        FFA_UNROLL for (int e = 0; e < 16; ++e) mine.u[e / 4][e % 4] = 0.0f;
        FFA_UNROLL for (int column = 0; column < kColumns / kWarps; ++column) {
          FFA_UNROLL for (int e = 0; e < 16; ++e) {
            mine.u[e / 4][e % 4] += shared.g[lane / 4 + e / 4 * 8][16 * warp + column] *
                                    shared.B[16 * warp + column][lane % 4 * 4 + e % 4];
          }
        }
      });
      block.sync();
      if (p.B == nullptr) continue;
      block.each([&](int thread, Registers& mine) {
        FFA_UNROLL for (int e = 0; e < 16; ++e) {
          shared.u[thread / 32][thread % 32 / 4 + e / 4 * 8][thread % 4 * 4 + e % 4] =
              mine.u[e / 4][e % 4];
        }
      });
      block.sync();
      block.each([&](int thread, Registers&) {
        for (int i = thread; i < kTokens * kChunk; i += kThreads) {
          float sum = 0.0f;
          FFA_UNROLL for (int warp = 0; warp < kWarps; ++warp) {
            sum += shared.u[warp][i / kChunk][i % kChunk];
          }
          put_u(p, at, token + i / kChunk, first_k + i % kChunk, sum);
        }
      });
      block.sync();
    }
    block.each([&](int thread, Registers& mine) {
      mine.square = 0.0;
      FFA_UNROLL for (int j = 0; j < 4; ++j) {
        mine.square += put_G(p, at, first_column + thread % 32 * 4 + j, first_k + thread / 32 * 2,
                             mine.G[j][0], mine.G[j][1]);
      }
    });
    count_squares<T, Block, Registers>(p, at, block, shared);
  }
};

// G = scale times the sum over the slices, and its squares.
struct CombineSlices {
  static constexpr int kBlocksPerMultiprocessor = 2;
  static constexpr int kFirstArch = kOldestArch, kEndArch = kNoArch;
  struct Registers {
    double square;
  };
  struct Shared {
    double squares[kThreads];
  };

  int64_t n, size, splits, slots;  // size = d_out r
  const float* parts;
  float scale;
  int dtype;
  void* G;
  double* squares;

  template <class Block>
  FFA_DEVICE void operator()(Block& block, int64_t index, Shared& shared) const {
    const int64_t record = index / slots, slot = index % slots;
    block.each([&](int thread, Registers& mine) {
      mine.square = 0.0;
      for (int64_t i = thread; i < kCombined; i += kThreads) {
        if (slot * kCombined + i >= size) continue;
        const int64_t e = record * size + slot * kCombined + i;
        float sum = 0.0f;
        for (int64_t split = 0; split < splits; ++split) sum += parts[split * n * size + e];
        store_as(dtype, G, e, scale * sum);
        const double stored = load_as<double>(dtype, G, e);
        mine.square += stored * stored;
      }
      shared.squares[thread] = mine.square;
    });
    sum_threads(block, shared.squares);
    block.each([&](int thread, Registers&) {
      if (thread == 0) squares[index] = shared.squares[0];
    });
  }
};

// What is left to add: u over the panels, the squares over their slots.
struct AddParts : EveryArch {
  using Registers = Nothing;
  using Shared = Nothing;

  int64_t u_size, u_blocks, panels;
  const float* u_parts;
  int dtype;
  void* u;
  int64_t n, slots;
  const double* square_parts;
  double* squares;

  template <class Block>
  FFA_DEVICE void operator()(Block& block, int64_t index, Shared&) const {
    block.each([&](int thread, auto&) {
      if (index < u_blocks) {
        const int64_t e = index * kThreads + thread;
        if (e >= u_size) return;
        float sum = 0.0f;
        for (int64_t panel = 0; panel < panels; ++panel) sum += u_parts[panel * u_size + e];
        store_as(dtype, u, e, sum);
      } else {
        const int64_t record = (index - u_blocks) * kThreads + thread;
        if (record >= n) return;
        double sum = 0.0;
        for (int64_t slot = 0; slot < slots; ++slot) sum += square_parts[record * slots + slot];
        squares[record] = sum;
      }
    });
  }
};

// Calls use(program type) with the program that serves T at this rank on this device.
template <class T, class Use>
int with_program(int64_t r, int capability, Use use) {
  if constexpr (kFirstTensorArch<T> < kNoArch) {
    if (capability >= kFirstTensorArch<T>) {
      if (r <= 16) return use(PerSampleGradTensorCores<T, 16, 2>{});
      return use(PerSampleGradTensorCores<T, 64, 1>{});
    }
  }
  if constexpr (kFirstTensorArch<T> > kOldestArch) return use(PerSampleGradPlain<T>{});
  return FFA_WRONG_ARCH;
}

inline int check_sizes(int64_t n, int64_t rows, int64_t d_out, int64_t r, bool ragged) {
  if (n < 0 || rows < 0 || d_out < 1 || r < 1 || d_out > kMostColumns || r > kMostColumns) {
    return FFA_BAD_SIZE;
  }
  if (!ragged && (n == 0 ? rows != 0 : rows % n != 0)) return FFA_BAD_SIZE;
  return FFA_OK;
}

}  // namespace ffa::FFA_ISA

extern "C" int ffa_cuda_per_sample_grad_scratch(int64_t n, int64_t rows, int64_t d_out, int64_t r,
                                                int dtype, int with_u, int ragged, int64_t* bytes) {
  using namespace ffa::FFA_ISA;
  if (const int status = check_sizes(n, rows, d_out, r, ragged != 0)) return status;
  Device device;
  if (const int status = current_device(&device)) return status;
  return with_type(dtype, [&](auto zero) {
    return with_program<decltype(zero)>(r, device.capability, [&](auto program) {
      using Program = decltype(program);
      *bytes = make_plan(n, rows, d_out, r, with_u != 0, Program::kColumns, Program::kChunk,
                         device.multiprocessors)
                   .bytes();
      return FFA_OK;
    });
  });
}

extern "C" int ffa_cuda_per_sample_grad(int64_t n, int64_t rows, int64_t d_out, int64_t r,
                                        int dtype, const void* g, const void* h, const void* lora_B,
                                        const int32_t* offsets, double scale, void* u, void* G,
                                        double* squares, void* scratch, void* stream) {
  using namespace ffa::FFA_ISA;
  if (const int status = check_sizes(n, rows, d_out, r, offsets != nullptr)) return status;
  Device device;
  if (const int status = current_device(&device)) return status;
  return with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_program<T>(r, device.capability, [&](auto program) -> int {
      using Program = decltype(program);
      const Plan plan = make_plan(n, rows, d_out, r, lora_B != nullptr, Program::kColumns,
                                  Program::kChunk, device.multiprocessors);
      Problem<T>& p = program.problem;
      p.n = n;
      p.rows = rows;
      p.d_out = static_cast<int32_t>(d_out);
      p.r = static_cast<int32_t>(r);
      p.g = static_cast<const T*>(g);
      p.h = static_cast<const T*>(h);
      p.B = static_cast<const T*>(lora_B);
      p.offsets = offsets;
      p.scale = static_cast<float>(scale);
      p.u = static_cast<T*>(u);
      p.G = static_cast<T*>(G);
      p.squares = squares;
      p.plan = plan;
      char* at = static_cast<char*>(scratch);
      p.square_parts = reinterpret_cast<double*>(at);
      p.u_parts = reinterpret_cast<float*>(at + plan.square_bytes);
      p.G_parts = reinterpret_cast<float*>(at + plan.square_bytes + plan.u_bytes);
      p.aligned = rows_aligned<Program::kRun>(p.g, d_out);
      p.paired = rows_aligned<2>(p.h, r) && rows_aligned<2>(p.G, r);
      const int64_t records = n + (offsets != nullptr && lora_B != nullptr ? 2 : 0);
      const int64_t blocks = records * plan.panels * plan.chunks * plan.splits;
      if (const int status = launch(program, blocks, stream)) return status;
      if (plan.splits > 1) {
        double* to = plan.slots > 1 ? p.square_parts : squares;
        const CombineSlices combine = {n,       d_out * r, plan.splits, plan.slots, p.G_parts,
                                       p.scale, dtype,     G,           to};
        if (const int status = launch(combine, n * plan.slots, stream)) return status;
      }
      const int64_t u_blocks = plan.u_bytes > 0 ? ceil_div(rows * r, kThreads) : 0;
      const int64_t square_blocks = plan.slots > 1 ? ceil_div(n, kThreads) : 0;
      return launch(AddParts{{},
                             rows * r,
                             u_blocks,
                             plan.panels,
                             p.u_parts,
                             dtype,
                             u,
                             n,
                             plan.slots,
                             p.square_parts,
                             squares},
                    u_blocks + square_blocks, stream);
    });
  });
}
