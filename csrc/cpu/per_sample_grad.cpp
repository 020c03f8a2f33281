// Per-sample gradient of lora_B and the rank-r half of backward, from one read of g.
//
//   u = g B      G_i = scale g_i^T h_i      sq_i = |G_i|^2      (DESIGN.md, section 2)
//
// A block of kTokens tokens and a panel of kPanel columns of g lies in L1 and serves both products.
// Lanes are ranks in both: a tile of tokens x ranks of u is summed along the columns, a tile of
// columns x ranks of G along the tokens, each element of g times a vector of ranks at a time. Ranks
// are padded with zeros to whole vectors. The order of every sum depends on the shape alone, never
// on the number of threads.
#include "../ffa.h"
#include "buffer.h"
#include "parallel.h"
#include "tiles.h"

namespace ffa::FFA_ISA {
namespace {

template <class T>
struct Problem {
  // `ranks` is r, padded to whole vectors; h, B and u have so many columns.
  int64_t n, rows, d_out, r, ranks, panels;
  // Rows starts[s] to starts[s + 1] - 1 are span s: a record, or, where offsets leave rows to no
  // record, the head before the first and the tail after the last, which have u and no G.
  int64_t spans, first_record;
  const int64_t* starts;
  const T *g, *h, *B;
  T scale;
  T *u, *G;
};

// One span and one panel: its columns of G, its part of u (added to u if `add`), its |G|^2.
template <class T>
double run_panel(const Problem<T>& p, int64_t span, int64_t panel, bool add, T* u, T* acc) {
  const int64_t begin = p.starts[span], end = p.starts[span + 1];
  const int64_t i = span - p.first_record;
  const int64_t first = panel * kPanel;
  const int64_t columns = p.d_out - first < kPanel ? p.d_out - first : kPanel;
  const bool record = i >= 0 && i < p.n;
  memset(acc, 0, static_cast<size_t>(columns * p.ranks) * sizeof(T));
  for (int64_t t = begin; t < end; t += kTokens) {
    const int64_t tokens = end - t < kTokens ? end - t : kTokens;
    const T* g = p.g + t * p.d_out + first;
    if (u != nullptr) {
      T* to = u + (t - begin) * p.ranks;
      product<T, false>(tokens, g, p.d_out, int64_t{1}, columns, p.B + first * p.ranks, p.ranks,
                        add, nullptr, to);
    }
    if (record) {
      const int64_t next = t + kTokens < end ? kTokens * p.d_out : (begin - t) * p.d_out + kPanel;
      product<T, true>(columns, g, int64_t{1}, p.d_out, tokens, p.h + t * p.ranks, p.ranks, true,
                       g + next, acc);
    }
  }
  if (!record) return 0.0;
  T* G = p.G + (i * p.d_out + first) * p.r;
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t k = 0; k < p.r; ++k) G[c * p.r + k] = p.scale * acc[c * p.ranks + k];
  }
  return sum_squares(G, columns * p.r);
}

template <class T>
int run(Problem<T> p, double* sq, int threads) {
  constexpr int W = Simd<T>::W;
  p.ranks = (p.r + W - 1) / W * W;
  p.panels = p.d_out > 0 ? (p.d_out + kPanel - 1) / kPanel : 1;
  const bool padded = p.ranks != p.r, wants_u = p.B != nullptr;
  const int64_t u_size = p.rows * p.ranks;

  // Spans are the parallel unit when there are enough; else their panels are, and each panel's
  // part of u is kept apart, then added in the order that one thread would have used.
  const bool split = p.panels > 1 && p.spans < 2 * threads;
  const int64_t tasks = split ? p.spans * p.panels : p.spans;
  // One scratch a task would be n of them: tasks take a thread's slot instead.
  const int64_t slots = threads < tasks ? (threads > 1 ? threads : 1) : tasks;
  const int64_t scratch_size = kPanel * p.ranks;

  const Buffer<T> h(padded ? u_size : 0), B(padded && wants_u ? p.d_out * p.ranks : 0);
  const Buffer<T> whole_u(padded && wants_u ? u_size : 0);
  const Buffer<T> parts(split && wants_u ? p.panels * u_size : 0), scratch(slots * scratch_size);
  const Buffer<double> norms(p.spans * p.panels);
  const Buffer<int> busy(slots + 1);
  if (!(h.ok && B.ok && whole_u.ok && parts.ok && scratch.ok && norms.ok && busy.ok)) {
    return FFA_NO_MEMORY;
  }
  memset(busy.data, 0, static_cast<size_t>(slots + 1) * sizeof(int));
  T* const u = padded ? whole_u.data : p.u;
  if (padded) {
    pad(p.h, p.rows, p.r, p.ranks, h.data);
    p.h = h.data;
    if (wants_u) {
      pad(p.B, p.d_out, p.r, p.ranks, B.data);
      p.B = B.data;
    }
  }
  const double work = 4.0 * static_cast<double>(u_size) * static_cast<double>(p.d_out);
  T *const of_panels = parts.data, *const scratches = scratch.data;
  double* const squares = norms.data;
  int* const taken = busy.data;
  parallel_for(work < 1e6 ? 1 : threads, tasks, [=](int64_t task) {
    int64_t slot = 0;
    while (__atomic_exchange_n(&taken[slot], 1, __ATOMIC_ACQUIRE) != 0) slot = (slot + 1) % slots;
    T* mine = scratches + slot * scratch_size;
    if (split) {
      const int64_t span = task / p.panels, panel = task % p.panels;
      T* to = wants_u ? of_panels + panel * u_size + p.starts[span] * p.ranks : nullptr;
      squares[task] = run_panel(p, span, panel, false, to, mine);
    } else {
      T* to = wants_u ? u + p.starts[task] * p.ranks : nullptr;
      for (int64_t panel = 0; panel < p.panels; ++panel) {
        squares[task * p.panels + panel] = run_panel(p, task, panel, panel > 0, to, mine);
      }
    }
    __atomic_store_n(&taken[slot], 0, __ATOMIC_RELEASE);
  });
  if (split && wants_u) {
    constexpr int64_t kChunk = 16384;
    parallel_for(threads, (u_size + kChunk - 1) / kChunk, [=](int64_t task) {
      const int64_t end = u_size < (task + 1) * kChunk ? u_size : (task + 1) * kChunk;
      for (int64_t e = task * kChunk; e < end; ++e) {
        T sum = of_panels[e];
        for (int64_t panel = 1; panel < p.panels; ++panel) sum += of_panels[panel * u_size + e];
        u[e] = sum;
      }
    });
  }
  if (padded && wants_u) strip(u, p.rows, p.r, p.ranks, p.u);
  for (int64_t i = 0; i < p.n; ++i) {
    double sum = 0.0;
    const double* of_record = squares + (i + p.first_record) * p.panels;
    for (int64_t panel = 0; panel < p.panels; ++panel) sum += of_record[panel];
    sq[i] = sum;
    sq[p.n + i] = 1.0;
  }
  return FFA_OK;
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
  p.B = static_cast<const T*>(lora_B);
  p.scale = static_cast<T>(scale);
  p.u = static_cast<T*>(u);
  p.G = static_cast<T*>(G);
  return run(p, sq, threads);
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
