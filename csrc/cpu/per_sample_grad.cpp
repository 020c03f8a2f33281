// Per-sample gradient of lora_B and the rank-r half of backward, from one read of g.
//
//   u = g B      G_i = scale g_i^T h_i      sq_i = |G_i|^2      (DESIGN.md, section 2)
//
// A panel of kPanel columns of g and kTokens tokens is copied once into L1, vectors of one column
// range together and zero-padded, and serves both products from there:
//
//   u: a tile of tokens x ranks in registers, summed along the panel, lanes folded at its end;
//   G: a tile of columns x ranks in registers, summed along the tokens.
//
// Lanes are columns of g in both, so any rank fills the vectors. The order of every sum depends on
// the shape alone, never on the number of threads.
#include <stdlib.h>

#include <type_traits>

#include "../ffa.h"
#include "parallel.h"
#include "simd.h"

namespace ffa::FFA_ISA {
namespace {

constexpr int64_t kTokens = 16;
constexpr int64_t kPanelBytes = 1024;
constexpr int kRankTile = kVectorBytes == 64 ? 8 : 4;

template <class T>
struct Simd {
  static constexpr int W = kVectorBytes / sizeof(T);
  using Integer = typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type;
  typedef T Vec __attribute__((vector_size(kVectorBytes)));
  typedef Integer Index __attribute__((vector_size(kVectorBytes)));

  static FFA_HD Vec load(const T* p) {
    Vec v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  static FFA_HD void store(T* p, Vec v) { memcpy(p, &v, sizeof(v)); }

  // Each segment of S lanes becomes (half-sums of a, half-sums of b).
  template <int S>
  static FFA_HD Vec merge(Vec a, Vec b) {
    Index low = {};
    for (int lane = 0; lane < W; ++lane) {
      const int offset = lane % S, base = lane - offset;
      low[lane] = offset < S / 2 ? base + offset : W + base + offset - S / 2;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + S / 2);
  }

  // Lane i W / N of the result is the sum of the lanes of v[i], for a power of two N <= W. Lanes
  // are always added half to half, so a sum's bits do not depend on the tile it was computed in.
  template <int N, int S = W>
  static FFA_HD Vec fold(Vec* v) {
    if constexpr (S == 1) {
      return v[0];
    } else {
      constexpr int kLeft = N > 1 ? N / 2 : 1;
      for (int i = 0; i < kLeft; ++i) v[i] = merge<S>(v[i], v[N > 1 ? i + kLeft : i]);
      return fold<kLeft, S / 2>(v);
    }
  }
};

template <class T>
struct Problem {
  int64_t n, rows, d_out, r, panel, panels;
  // Rows starts[s] to starts[s + 1] - 1 are span s: a record, or, where offsets leave rows to no
  // record, the head before the first and the tail after the last, which have u and no G.
  int64_t spans, first_record;
  const int64_t* starts;
  const T *g, *h;
  const T* packed_B;  // [column vector][rank][lane], zero-padded in the last vector
  T scale;
  T *u, *G;
};

// u[t][k] += sum over the panel, for TB tokens and KB ranks.
template <class T, int TB, int KB>
FFA_HD void u_tile(const T* g, const T* b, int64_t vectors, int64_t r, bool add, T* u) {
  using S = Simd<T>;
  typename S::Vec acc[TB][KB] = {};
  for (int64_t v = 0; v < vectors; ++v) {
    typename S::Vec gv[TB];
    for (int t = 0; t < TB; ++t) gv[t] = S::load(g + (v * kTokens + t) * S::W);
    for (int k = 0; k < KB; ++k) {
      const typename S::Vec bv = S::load(b + (v * r + k) * S::W);
      for (int t = 0; t < TB; ++t) acc[t][k] += gv[t] * bv;
    }
  }
  constexpr int kSums = TB * KB, kGroup = kSums < S::W ? kSums : S::W;
  T sums[kSums];
  for (int i = 0; i < kSums; i += kGroup) {
    T lanes[S::W];
    S::store(lanes, S::template fold<kGroup>(&acc[0][0] + i));
    for (int j = 0; j < kGroup; ++j) sums[i + j] = lanes[j * (S::W / kGroup)];
  }
  for (int t = 0; t < TB; ++t) {
    for (int k = 0; k < KB; ++k)
      u[t * r + k] = add ? u[t * r + k] + sums[t * KB + k] : sums[t * KB + k];
  }
}

template <class T, int KB>
FFA_HD void u_ranks(const T* g, const T* b, int64_t vectors, int64_t r, int64_t tokens, bool add,
                    T* u) {
  int64_t t = 0;
  for (; t + 2 <= tokens; t += 2) {
    u_tile<T, 2, KB>(g + t * Simd<T>::W, b, vectors, r, add, u + t * r);
  }
  if (t < tokens) u_tile<T, 1, KB>(g + t * Simd<T>::W, b, vectors, r, add, u + t * r);
}

// acc[v][k][lane] += sum over the tokens, for DV column vectors and KB ranks.
template <class T, int DV, int KB>
FFA_HD void G_tile(const T* g, const T* h, int64_t tokens, int64_t r, T* acc) {
  using S = Simd<T>;
  typename S::Vec sum[DV][KB] = {};
  for (int64_t t = 0; t < tokens; ++t) {
    typename S::Vec gv[DV];
    for (int v = 0; v < DV; ++v) gv[v] = S::load(g + (v * kTokens + t) * S::W);
    for (int k = 0; k < KB; ++k) {
      const typename S::Vec hv = typename S::Vec{} + h[t * r + k];
      for (int v = 0; v < DV; ++v) sum[v][k] += gv[v] * hv;
    }
  }
  for (int v = 0; v < DV; ++v) {
    for (int k = 0; k < KB; ++k) {
      T* at = acc + (v * r + k) * S::W;
      S::store(at, S::load(at) + sum[v][k]);
    }
  }
}

template <class T, int KB>
FFA_HD void G_ranks(const T* g, const T* h, int64_t vectors, int64_t tokens, int64_t r, T* acc) {
  constexpr int W = Simd<T>::W;
  int64_t v = 0;
  for (; v + 2 <= vectors; v += 2) {
    G_tile<T, 2, KB>(g + v * kTokens * W, h, tokens, r, acc + v * r * W);
  }
  if (v < vectors) G_tile<T, 1, KB>(g + v * kTokens * W, h, tokens, r, acc + v * r * W);
}

template <class T>
struct Block {
  const T *g, *b, *h;
  int64_t vectors, tokens, r;
  bool add;
  T *u, *acc;

  template <int KB>
  FFA_HD void ranks(int64_t k) const {
    constexpr int W = Simd<T>::W;
    if (u != nullptr) u_ranks<T, KB>(g, b + k * W, vectors, r, tokens, add, u + k);
    G_ranks<T, KB>(g, h + k, vectors, tokens, r, acc + k * W);
  }

  void run() const {
    int64_t k = 0;
    for (; k + kRankTile <= r; k += kRankTile) ranks<kRankTile>(k);
    if (kRankTile > 4 && k + 4 <= r) ranks<4>(k), k += 4;
    if (k + 2 <= r) ranks<2>(k), k += 2;
    if (k < r) ranks<1>(k);
  }
};

// Copies tokens x columns of g to [column vector][token][lane].
template <class T>
void pack(const T* g, int64_t stride, int64_t tokens, int64_t columns, T* packed) {
  constexpr int W = Simd<T>::W;
  const int64_t full = columns / W, rest = columns % W;
  for (int64_t t = 0; t < tokens; ++t) {
    const T* row = g + t * stride;
    for (int64_t v = 0; v < full; ++v) {
      memcpy(packed + (v * kTokens + t) * W, row + v * W, kVectorBytes);
    }
    if (rest > 0) {
      T* last = packed + (full * kTokens + t) * W;
      memset(last, 0, kVectorBytes);
      for (int64_t c = 0; c < rest; ++c) last[c] = row[full * W + c];
    }
  }
}

// One span and one panel: its columns of G, its part of u (added to u if `add`), its |G|^2.
template <class T>
double run_panel(const Problem<T>& p, int64_t span, int64_t panel, bool add, T* u, T* scratch) {
  constexpr int W = Simd<T>::W;
  const int64_t row = p.starts[span], span_tokens = p.starts[span + 1] - row;
  const int64_t i = span - p.first_record;
  const int64_t first = panel * p.panel, r = p.r;
  const int64_t columns = p.d_out - first < p.panel ? p.d_out - first : p.panel;
  const int64_t vectors = (columns + W - 1) / W;
  T* packed_g = scratch;
  T* acc = scratch + p.panel * kTokens;
  memset(acc, 0, static_cast<size_t>(vectors * W * r) * sizeof(T));
  const T* packed_B = p.packed_B != nullptr ? p.packed_B + first * r : nullptr;
  for (int64_t t = 0; t < span_tokens; t += kTokens) {
    const int64_t tokens = span_tokens - t < kTokens ? span_tokens - t : kTokens;
    pack(p.g + (row + t) * p.d_out + first, p.d_out, tokens, columns, packed_g);
    const Block<T> block = {packed_g,
                            packed_B,
                            p.h + (row + t) * r,
                            vectors,
                            tokens,
                            r,
                            add,
                            u != nullptr ? u + t * r : nullptr,
                            acc};
    block.run();
  }
  if (i < 0 || i >= p.n) return 0.0;
  T* G = p.G + (i * p.d_out + first) * r;
  for (int64_t v = 0; v < vectors; ++v) {
    const int lanes = static_cast<int>(columns - v * W < W ? columns - v * W : W);
    for (int64_t k = 0; k < r; ++k) {
      const T* from = acc + (v * r + k) * W;
      for (int lane = 0; lane < lanes; ++lane) G[(v * W + lane) * r + k] = p.scale * from[lane];
    }
  }
  return sum_squares(G, columns * r);
}

template <class T>
void pack_B(const T* B, int64_t d_out, int64_t r, int64_t first, int64_t last, T* packed) {
  constexpr int W = Simd<T>::W;
  for (int64_t v = first; v < last; ++v) {
    for (int lane = 0; lane < W; ++lane) {
      const int64_t column = v * W + lane;
      for (int64_t k = 0; k < r; ++k) {
        packed[(v * r + k) * W + lane] = column < d_out ? B[column * r + k] : T(0);
      }
    }
  }
}

template <class T>
T* allocate(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
  return static_cast<T*>(aligned_alloc(64, bytes));
}

template <class T>
int run(Problem<T> p, const T* lora_B, double* sq, int threads) {
  constexpr int W = Simd<T>::W;
  p.panel = kPanelBytes / static_cast<int64_t>(sizeof(T));
  p.panels = p.d_out > 0 ? (p.d_out + p.panel - 1) / p.panel : 1;
  const int64_t vectors = (p.d_out + W - 1) / W;
  const int64_t u_size = p.rows * p.r;

  // Spans are the parallel unit when there are enough; else their panels are, and each panel's
  // part of u is kept apart, then added in the order that one thread would have used.
  const bool split = p.panels > 1 && p.spans < 2 * threads;
  const int64_t tasks = split ? p.spans * p.panels : p.spans;
  const int64_t scratch_size = p.panel * (kTokens + p.r);

  T* packed = lora_B != nullptr ? allocate<T>(vectors * W * p.r) : nullptr;
  T* parts = split && lora_B != nullptr ? allocate<T>(p.panels * u_size) : nullptr;
  double* norms = allocate<double>(p.spans * p.panels);
  // One scratch a task would be n of them: tasks take a thread's slot instead.
  const int64_t slots = threads < tasks ? (threads > 1 ? threads : 1) : tasks;
  T* scratch = allocate<T>(slots * scratch_size);
  int* busy = static_cast<int*>(calloc(static_cast<size_t>(slots + 1), sizeof(int)));
  const bool ok = norms != nullptr && scratch != nullptr && busy != nullptr &&
                  (lora_B == nullptr || packed != nullptr) &&
                  (!split || lora_B == nullptr || parts != nullptr);
  if (ok) {
    if (lora_B != nullptr) {
      constexpr int64_t kVectors = 16;
      parallel_for(p.d_out * p.r < 65536 ? 1 : threads, (vectors + kVectors - 1) / kVectors,
                   [=](int64_t task) {
                     const int64_t end = (task + 1) * kVectors;
                     pack_B(lora_B, p.d_out, p.r, task * kVectors, end < vectors ? end : vectors,
                            packed);
                   });
      p.packed_B = packed;
    }
    const double work = 4.0 * static_cast<double>(u_size) * static_cast<double>(p.d_out);
    const int workers = work < 1e6 ? 1 : threads;
    parallel_for(workers, tasks, [=](int64_t task) {
      int64_t slot = 0;
      while (__atomic_exchange_n(&busy[slot], 1, __ATOMIC_ACQUIRE) != 0) slot = (slot + 1) % slots;
      T* mine = scratch + slot * scratch_size;
      if (split) {
        const int64_t span = task / p.panels, panel = task % p.panels;
        T* u = parts != nullptr ? parts + panel * u_size + p.starts[span] * p.r : nullptr;
        norms[task] = run_panel(p, span, panel, false, u, mine);
      } else {
        T* u = packed != nullptr ? p.u + p.starts[task] * p.r : nullptr;
        for (int64_t panel = 0; panel < p.panels; ++panel) {
          norms[task * p.panels + panel] = run_panel(p, task, panel, panel > 0, u, mine);
        }
      }
      __atomic_store_n(&busy[slot], 0, __ATOMIC_RELEASE);
    });
    if (parts != nullptr) {
      constexpr int64_t kChunk = 16384;
      parallel_for(threads, (u_size + kChunk - 1) / kChunk, [=](int64_t task) {
        const int64_t end = u_size < (task + 1) * kChunk ? u_size : (task + 1) * kChunk;
        for (int64_t e = task * kChunk; e < end; ++e) {
          T sum = parts[e];
          for (int64_t panel = 1; panel < p.panels; ++panel) sum += parts[panel * u_size + e];
          p.u[e] = sum;
        }
      });
    }
    for (int64_t i = 0; i < p.n; ++i) {
      double sum = 0.0;
      const double* of_panels = norms + (i + p.first_record) * p.panels;
      for (int64_t panel = 0; panel < p.panels; ++panel) sum += of_panels[panel];
      sq[i] = sum;
    }
  }
  free(packed);
  free(parts);
  free(norms);
  free(scratch);
  free(busy);
  return ok ? FFA_OK : FFA_NO_MEMORY;
}

template <class T>
int run(int64_t n, int64_t rows, int64_t d_out, int64_t r, const void* g, const void* h,
        const void* lora_B, const int64_t* starts, bool offsets, double scale, void* u, void* G,
        double* sq, int threads) {
  Problem<T> p = {};
  p.n = n;
  p.rows = rows;
  p.d_out = d_out;
  p.r = r;
  p.spans = offsets ? n + 2 : n;
  p.first_record = offsets ? 1 : 0;
  p.starts = starts;
  p.g = static_cast<const T*>(g);
  p.h = static_cast<const T*>(h);
  p.scale = static_cast<T>(scale);
  p.u = static_cast<T*>(u);
  p.G = static_cast<T*>(G);
  return run(p, static_cast<const T*>(lora_B), sq, threads);
}

}  // namespace

int per_sample_grad(int64_t n, int64_t rows, int64_t d_out, int64_t r, int dtype, const void* g,
                    const void* h, const void* lora_B, const int32_t* offsets, double scale,
                    void* u, void* G, double* sq, int threads) {
  if (n < 0 || rows < 0 || d_out < 0 || r < 0) return FFA_BAD_SIZE;
  if (offsets == nullptr && (n == 0 ? rows != 0 : rows % n != 0)) return FFA_BAD_SIZE;
  if (dtype != FFA_F32 && dtype != FFA_F64) return FFA_BAD_DTYPE;
  for (int64_t i = 0; offsets != nullptr && i <= n; ++i) {
    if (offsets[i] < (i > 0 ? offsets[i - 1] : 0) || offsets[i] > rows) return FFA_BAD_VALUE;
  }
  int64_t* starts = allocate<int64_t>(n + 3);
  if (starts == nullptr) return FFA_NO_MEMORY;
  if (offsets != nullptr) {
    starts[0] = 0;
    for (int64_t i = 0; i <= n; ++i) starts[i + 1] = offsets[i];
    starts[n + 2] = rows;
  } else {
    for (int64_t i = 0; i <= n; ++i) starts[i] = n > 0 ? i * (rows / n) : 0;
  }
  const int status = dtype == FFA_F32 ? run<float>(n, rows, d_out, r, g, h, lora_B, starts,
                                                   offsets != nullptr, scale, u, G, sq, threads)
                                      : run<double>(n, rows, d_out, r, g, h, lora_B, starts,
                                                    offsets != nullptr, scale, u, G, sq, threads);
  free(starts);
  return status;
}

}  // namespace ffa::FFA_ISA
