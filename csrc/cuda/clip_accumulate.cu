// Clips each record's gradient to its bound and adds it to the batch's sum, in integers on a grid.
//
//   norm_i^2 = sum over the group of |G_i|^2     RecordNorms: fp64, or what backward has left
//   c_i      = min(1, C / norm_i)                ClipFactors
//   sums    += sum_i trunc(c_i G_i / grid)       AddRecords
#include "clip_accumulate.h"

namespace ffa::FFA_ISA {

// Long, because backward mostly knows the norms, and a block then has nothing to read.
constexpr int64_t kNormPart = 65536;

// partial (n, parts): each tensor has a part for every kNormPart elements of a record.
struct RecordNorms : EveryArch {
  using Registers = Nothing;
  struct Shared {
    double squares[kThreads];
  };

  TensorTable table;
  int64_t n, first_part, parts;
  double* partial;

  template <class Block>
  FFA_DEVICE void operator()(Block& block, int64_t index, Shared& shared) const {
    const int64_t record = index / table.blocks, part = index % table.blocks;
    const TensorEntry& tensor = table.of_block(part);
    const int64_t first = (part - tensor.first_block) * kNormPart;
    double* out = partial + record * parts + first_part + part;
    if (tensor.squares != nullptr && tensor.squares[n + record] == 1.0) {
      block.each([&](int thread, auto&) {
        if (thread == 0) *out = first == 0 ? tensor.squares[record] : 0.0;
      });
      return;
    }
    const int64_t left = tensor.numel - first, count = left < kNormPart ? left : kNormPart;
    block.each([&](int thread, auto&) {
      double square = 0.0;
      for (int64_t i = thread; i < count; i += kThreads) {
        const double v = load_as<double>(tensor.grad_dtype, tensor.grad_sample,
                                         record * tensor.numel + first + i);
        square += v * v;
      }
      shared.squares[thread] = square;
    });
    sum_threads(block, shared.squares);
    block.each([&](int thread, auto&) {
      if (thread == 0) *out = shared.squares[0];
    });
  }
};

// A block for each group and record. A group is the whole of `partial`, or one tensor's parts.
struct ClipFactors : EveryArch {
  using Registers = Nothing;
  struct Shared {
    double squares[kThreads];
  };

  TensorTable table;
  bool flat;
  double flat_bound;
  int64_t n, first_part, parts;
  const double* partial;
  const uint8_t* keep;
  int64_t* stats;
  double* factors;

  template <class Block>
  FFA_DEVICE void operator()(Block& block, int64_t index, Shared& shared) const {
    const int64_t t = index / n, record = index % n;
    int64_t begin = 0, end = parts;
    double bound = flat_bound;
    if (!flat) {
      begin = first_part + table.tensors[t].first_block;
      end = first_part + (t + 1 < table.count ? table.tensors[t + 1].first_block : table.blocks);
      bound = table.tensors[t].bound;
    }
    block.each([&](int thread, auto&) {
      double square = 0.0;
      for (int64_t i = begin + thread; i < end; i += kThreads)
        square += partial[record * parts + i];
      shared.squares[thread] = square;
    });
    sum_threads(block, shared.squares);
    block.each([&](int thread, auto&) {
      if (thread != 0) return;
      const double factor = clip_factor(shared.squares[0], bound);
      const bool kept = keep == nullptr || keep[record] != 0;
      const int64_t group = flat ? 0 : table.tensors[t].index;
      factors[group * n + record] = kept ? factor : 0.0;
      if (kept && factor > 0.0 && factor < 1.0) count(stats, 1);
      if (kept && factor == 0.0) count(stats + 1, 1);
    });
  }
};

struct AddRecords : EveryArch {
  using Registers = Nothing;
  using Shared = Nothing;

  TensorTable table;
  bool flat;
  int64_t n;
  const double* factors;

  template <class Block>
  FFA_DEVICE void operator()(Block& block, int64_t index, Shared&) const {
    const TensorEntry& tensor = table.of_block(index);
    const double* of_group = factors + (flat ? 0 : tensor.index * n);
    block.each([&](int thread, auto&) {
      const int64_t first = 8 * ((index - tensor.first_block) * kThreads + thread);
      if (isinf(tensor.bound)) {
        add(tensor, of_group, first, static_cast<double*>(tensor.sum));
      } else {
        add(tensor, of_group, first, static_cast<int64_t*>(tensor.sum));
      }
    });
  }

  template <class Sum>
  FFA_DEVICE void add(const TensorEntry& tensor, const double* of_group, int64_t first,
                      Sum* sum) const {
    if (first >= tensor.numel) return;
    Sum total[8] = {};
    add_records(tensor, of_group, n, first, total);
    FFA_UNROLL for (int j = 0; j < 8; ++j) {
      if (first + j < tensor.numel) sum[first + j] += total[j];
    }
  }
};

inline int64_t count_parts(int64_t n_tensors, const int64_t* numels) {
  int64_t parts = 0;
  for (int64_t k = 0; k < n_tensors; ++k) parts += ceil_div(numels[k], kNormPart);
  return parts;
}

TensorEntry Records::entry(int64_t k) const {
  TensorEntry tensor = {};
  tensor.grad_sample = grad_samples[k];
  tensor.squares = squares != nullptr ? squares[k] : nullptr;
  tensor.numel = numels[k];
  tensor.bound = bound(k);
  tensor.grad_dtype = static_cast<int16_t>(dtypes[k]);
  return tensor;
}

int check_records(const Records& records) {
  const int64_t groups = records.groups, n_tensors = records.n_tensors;
  if (n_tensors < 0 || records.n < 0 || (groups != 1 && groups != n_tensors)) return FFA_BAD_SIZE;
  for (int64_t k = 0; k < groups; ++k) {
    if (!(records.max_grad_norm[k] > 0x1p-900)) return FFA_BAD_VALUE;
  }
  for (int64_t k = 0; k < n_tensors; ++k) {
    if (records.numels[k] < 0) return FFA_BAD_SIZE;
    if (!is_dtype(records.dtypes[k])) return FFA_BAD_DTYPE;
  }
  return FFA_OK;
}

int launch_factors(const Records& records, void* stream) {
  const bool flat = records.groups == 1;
  const int64_t n = records.n, parts = count_parts(records.n_tensors, records.numels);
  const auto entry = [&](int64_t k) { return records.entry(k); };
  int64_t first_part = 0;
  int status = for_each_table(records.n_tensors, kNormPart, entry, [&](const TensorTable& table) {
    const RecordNorms norms = {{}, table, n, first_part, parts, records.scratch};
    first_part += table.blocks;
    return launch(norms, n * table.blocks, stream);
  });
  if (status != FFA_OK) return status;
  ClipFactors factors = {};
  factors.flat = flat;
  factors.n = n;
  factors.parts = parts;
  factors.partial = records.scratch;
  factors.keep = records.keep;
  factors.stats = records.stats;
  factors.factors = records.factors;
  if (flat) {
    factors.flat_bound = records.max_grad_norm[0];
    return launch(factors, n, stream);
  }
  return for_each_table(records.n_tensors, kNormPart, entry, [&](const TensorTable& table) {
    factors.table = table;
    status = launch(factors, n * table.count, stream);
    factors.first_part += table.blocks;
    return status;
  });
}

}  // namespace ffa::FFA_ISA

extern "C" int ffa_cuda_clip_accumulate_scratch(int64_t n_tensors, int64_t n, const int64_t* numels,
                                                int64_t* bytes) {
  if (n_tensors < 0 || n < 0) return FFA_BAD_SIZE;
  *bytes = 8 * n * ffa::FFA_ISA::count_parts(n_tensors, numels);
  return FFA_OK;
}

extern "C" int ffa_cuda_clip_accumulate(int64_t n_tensors, int64_t n, const int64_t* numels,
                                        const int* dtypes, const void* const* grad_samples,
                                        const double* const* squares, void* const* sums,
                                        int64_t groups, const double* max_grad_norm,
                                        const uint8_t* keep, int64_t* stats, double* factors,
                                        void* scratch, void* stream) {
  using namespace ffa::FFA_ISA;
  const Records records = {n_tensors,    n,       numels,  dtypes,
                           grad_samples, squares, groups,  max_grad_norm,
                           keep,         stats,   factors, static_cast<double*>(scratch)};
  if (const int status = check_records(records)) return status;
  if (const int status = launch_factors(records, stream)) return status;
  return for_each_table(
      n_tensors, 8 * kThreads,
      [&](int64_t k) {
        TensorEntry tensor = records.entry(k);
        tensor.sum = sums[k];
        return tensor;
      },
      [&](const TensorTable& table) {
        return launch(AddRecords{{}, table, groups == 1, n, factors}, table.blocks, stream);
      });
}
