// Per-sample gradient of lora_B and the rank-r half of backward, from one read of g.
//
//   u = g B      G_i = scale g_i^T h_i      sq_i = |G_i|^2      (ops/per_sample_grad.py)
//
// and, where backward is asked for as a whole, dx += scaling u A, with u in the scratch alone.
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
  // dx (rows, d_in) += term_scaling u A; null where nobody asks.
  int64_t d_in;
  const T* A;
  T term_scaling;
  T* dx;
};

// Rows begin to end - 1 of dx, from u (rows, ranks).
template <class T>
void add_to_dx(const Problem<T>& p, const T* u, int64_t begin, int64_t end) {
  const RankTerm<T> term = {p.d_in,         p.r,  u,       p.ranks, p.A,   p.d_in,
                            p.term_scaling, true, nullptr, p.dx,    p.d_in};
  write_term(term, begin, end);
}

// One span and one panel: its columns of G, its part of u (added to u if `add`), its |G|^2.
template <class T, int kBytes>
double run_panel(const Problem<T>& p, int64_t span, int64_t panel, bool add, T* u, T* acc) {
  const int64_t begin = p.starts[span], end = p.starts[span + 1];
  const int64_t i = span - p.first_record;
  const int64_t first = panel * kPanel;
  const int64_t columns = p.d_out - first < kPanel ? p.d_out - first : kPanel;
  const bool record = i >= 0 && i < p.n;
  for (int64_t e = 0; e < columns * p.ranks; ++e) acc[e] = 0;
  for (int64_t t = begin; t < end; t += kTokens) {
    const int64_t tokens = end - t < kTokens ? end - t : kTokens;
    const T* g = p.g + t * p.d_out + first;
    if (u != nullptr) {
      T* to = u + (t - begin) * p.ranks;
      product<T, kBytes, false>(tokens, g, p.d_out, int64_t{1}, columns, p.B + first * p.ranks,
                                p.ranks, add, nullptr, to);
    }
    if (record) {
      const int64_t next = t + kTokens < end ? kTokens * p.d_out : (begin - t) * p.d_out + kPanel;
      product<T, kBytes, true>(columns, g, int64_t{1}, p.d_out, tokens, p.h + t * p.ranks, p.ranks,
                               true, g + next, acc);
    }
  }
  if (!record) return 0.0;
  T* G = p.G + (i * p.d_out + first) * p.r;
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t k = 0; k < p.r; ++k) G[c * p.r + k] = p.scale * acc[c * p.ranks + k];
  }
  return sum_squares(G, columns * p.r);
}

template <class T, int kBytes>
int run(Problem<T> p, double* sq, int threads) {
  constexpr int W = Simd<T, kBytes>::W;
  p.ranks = (p.r + W - 1) / W * W;
  p.panels = p.d_out > 0 ? (p.d_out + kPanel - 1) / kPanel : 1;
  const bool padded = p.ranks != p.r, wants_u = p.B != nullptr;
  // B without elements has no address, and adds nothing.
  const bool wants_dx = wants_u && p.dx != nullptr;
  const bool own_u = wants_u && (padded || p.u == nullptr);
  const int64_t u_size = p.rows * p.ranks;

  // Spans are the parallel unit when there are enough; else their panels are, and each panel's
  // part of u is kept apart, then added in the order that one thread would have used.
  const bool split = p.panels > 1 && p.spans < 2 * threads;
  const int64_t tasks = split ? p.spans * p.panels : p.spans;
  // One scratch a task would be n of them: tasks take a thread's slot instead.
  const int64_t slots = threads < tasks ? (threads > 1 ? threads : 1) : tasks;
  const int64_t scratch_size = kPanel * p.ranks;

  const Buffer<T> h(padded ? u_size : 0), B(padded && wants_u ? p.d_out * p.ranks : 0);
  const Buffer<T> whole_u(own_u ? u_size : 0);
  const Buffer<T> parts(split && wants_u ? p.panels * u_size : 0), scratch(slots * scratch_size);
  const Buffer<double> norms(p.spans * p.panels);
  const Buffer<int> busy(slots + 1);
  if (!(h.ok && B.ok && whole_u.ok && parts.ok && scratch.ok && norms.ok && busy.ok)) {
    return FFA_NO_MEMORY;
  }
  memset(busy.data, 0, static_cast<size_t>(slots + 1) * sizeof(int));
  T* const u = own_u ? whole_u.data : p.u;
  if (padded) {
    pad(p.h, p.rows, p.r, p.ranks, h.data);
    p.h = h.data;
    if (wants_u) {
      pad(p.B, p.d_out, p.r, p.ranks, B.data);
      p.B = B.data;
    }
  }
  const double work = static_cast<double>(u_size) *
                      (4.0 * static_cast<double>(p.d_out) + 2.0 * static_cast<double>(p.d_in));
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
      squares[task] = run_panel<T, kBytes>(p, span, panel, false, to, mine);
    } else {
      T* to = wants_u ? u + p.starts[task] * p.ranks : nullptr;
      for (int64_t panel = 0; panel < p.panels; ++panel) {
        squares[task * p.panels + panel] =
            run_panel<T, kBytes>(p, task, panel, panel > 0, to, mine);
      }
      if (wants_dx) add_to_dx(p, u, p.starts[task], p.starts[task + 1]);
    }
    __atomic_store_n(&taken[slot], 0, __ATOMIC_RELEASE);
  });
  if (split && wants_u) {
    // Not many elements a task, and of dx no more rows than lie in L2.
    const int64_t rows = wants_dx ? kTokens : 1 + 16384 / (1 + p.ranks);
    parallel_for(work < 1e6 ? 1 : threads, (p.rows + rows - 1) / rows, [=](int64_t task) {
      const int64_t first = task * rows, last = p.rows < first + rows ? p.rows : first + rows;
      for (int64_t e = first * p.ranks; e < last * p.ranks; ++e) {
        T sum = of_panels[e];
        for (int64_t panel = 1; panel < p.panels; ++panel) sum += of_panels[panel * u_size + e];
        u[e] = sum;
      }
      if (wants_dx) add_to_dx(p, u, first, last);
    });
  }
  if (own_u && p.u != nullptr) strip(u, p.rows, p.r, p.ranks, p.u);
  for (int64_t i = 0; i < p.n; ++i) {
    double sum = 0.0;
    const double* of_record = squares + (i + p.first_record) * p.panels;
    for (int64_t panel = 0; panel < p.panels; ++panel) sum += of_record[panel];
    sq[i] = sum;
    sq[p.n + i] = 1.0;
  }
  return FFA_OK;
}

struct Inputs {
  int64_t n, rows, d_out, r, d_in;
  const void *g, *h, *lora_A, *lora_B;
  const int32_t* offsets;
  double scale, scaling;
  void *u, *G, *dx;
  double* sq;
};

template <class T>
int run(const Inputs& of, const int64_t* starts, int threads) {
  Problem<T> p = {};
  p.n = of.n;
  p.rows = of.rows;
  p.d_out = of.d_out;
  p.r = of.r;
  p.spans = of.offsets != nullptr ? of.n + 2 : of.n;
  p.first_record = of.offsets != nullptr ? 1 : 0;
  p.starts = starts;
  p.g = static_cast<const T*>(of.g);
  p.h = static_cast<const T*>(of.h);
  p.B = static_cast<const T*>(of.lora_B);
  p.scale = static_cast<T>(of.scale);
  p.u = static_cast<T*>(of.u);
  p.G = static_cast<T*>(of.G);
  p.d_in = of.d_in;
  p.A = static_cast<const T*>(of.lora_A);
  p.term_scaling = static_cast<T>(of.scaling);
  p.dx = static_cast<T*>(of.dx);
  // Half a vector where that holds all ranks: 8 of them in fp32 are padded in no copy.
  constexpr int kHalf = kVectorBytes / 2;
  return of.r * static_cast<int64_t>(sizeof(T)) <= kHalf ? run<T, kHalf>(p, of.sq, threads)
                                                         : run<T, kVectorBytes>(p, of.sq, threads);
}

int run(const Inputs& of, int dtype, int threads) {
  const int64_t n = of.n, rows = of.rows;
  if (n < 0 || rows < 0 || of.d_out < 0 || of.r < 0 || of.d_in < 0) return FFA_BAD_SIZE;
  if (of.offsets == nullptr && (n == 0 ? rows != 0 : rows % n != 0)) return FFA_BAD_SIZE;
  if (dtype != FFA_F32 && dtype != FFA_F64) return FFA_BAD_DTYPE;
  for (int64_t i = 0; of.offsets != nullptr && i <= n; ++i) {
    const int32_t before = i > 0 ? of.offsets[i - 1] : 0;
    if (of.offsets[i] < before || of.offsets[i] > rows) return FFA_BAD_VALUE;
  }
  const Buffer<int64_t> starts(n + 3);
  if (!starts.ok) return FFA_NO_MEMORY;
  if (of.offsets != nullptr) {
    starts.data[0] = 0;
    for (int64_t i = 0; i <= n; ++i) starts.data[i + 1] = of.offsets[i];
    starts.data[n + 2] = rows;
  } else {
    for (int64_t i = 0; i <= n; ++i) starts.data[i] = n > 0 ? i * (rows / n) : 0;
  }
  return dtype == FFA_F32 ? run<float>(of, starts.data, threads)
                          : run<double>(of, starts.data, threads);
}

}  // namespace

int per_sample_grad(int64_t n, int64_t rows, int64_t d_out, int64_t r, int dtype, const void* g,
                    const void* h, const void* lora_B, const int32_t* offsets, double scale,
                    void* u, void* G, double* sq, int threads) {
  const Inputs of = {n,      rows,    d_out, r, 0, g, h,       nullptr,
                     lora_B, offsets, scale, 0, u, G, nullptr, sq};
  return run(of, dtype, threads);
}

int per_sample_backward(int64_t n, int64_t rows, int64_t d_out, int64_t d_in, int64_t r, int dtype,
                        const void* g, const void* h, const void* lora_A, const void* lora_B,
                        const int32_t* offsets, double scaling, double scale, void* dx, void* G,
                        double* sq, int threads) {
  const Inputs of = {n,      rows,    d_out, r,       d_in,    g, h,  lora_A,
                     lora_B, offsets, scale, scaling, nullptr, G, dx, sq};
  return run(of, dtype, threads);
}

}  // namespace ffa::FFA_ISA
