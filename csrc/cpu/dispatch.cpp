// The C entry points of the CPU library: each calls the copy built for this machine's instruction
// set.
#include <stdlib.h>
#include <string.h>

#include "../common/status.h"
#include "../ffa.h"
#include "parallel.h"

#define FFA_DECLARE_COPY(isa)                                \
  namespace ffa::isa {                                       \
  decltype(ffa_cpu_chacha20) chacha20;                       \
  decltype(ffa_cpu_gaussian) gaussian;                       \
  decltype(ffa_cpu_dropout) dropout;                         \
  decltype(ffa_cpu_dropout_add) dropout_add;                 \
  decltype(ffa_cpu_rank_term) rank_term;                     \
  decltype(ffa_cpu_fp32_product) fp32_product;               \
  decltype(ffa_cpu_per_sample_grad) per_sample_grad;         \
  decltype(ffa_cpu_per_sample_backward) per_sample_backward; \
  decltype(ffa_cpu_clip_accumulate) clip_accumulate;         \
  decltype(ffa_cpu_private_update) private_update;           \
  decltype(ffa_cpu_private_step) private_step;               \
  }

namespace ffa::avx512bf16 {
int bf16_unit();
int bf16_product(int64_t rows, int64_t depth, int64_t columns, int64_t r, const void* x,
                 const void* right, int right_dtype, int64_t right_row, int64_t right_column,
                 const void* scale, int scales_rows, const void* bias, const void* left,
                 const void* term, int64_t term_row, int64_t term_column, double scaling, void* out,
                 int threads, bool tiles);
int fp32_tiles(int64_t rows, int64_t depth, int64_t columns, int64_t r, const void* x,
               const void* right, int64_t right_row, int64_t right_column, const void* bias,
               const void* left, const void* term, int64_t term_row, int64_t term_column,
               double scaling, void* out, int threads);
}  // namespace ffa::avx512bf16

FFA_DECLARE_COPY(baseline)
#if defined(FFA_X86_COPIES)
FFA_DECLARE_COPY(avx2)
FFA_DECLARE_COPY(avx512)
#endif

namespace {

// In order: each has what stands before it.
enum Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };
const char* const kNames[] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};

#if defined(FFA_X86_COPIES)
// FFA_CPU_ISA lowers the choice, for tests of what this machine would not pick.
int highest() {
  const char* wanted = getenv("FFA_CPU_ISA");
  if (wanted == nullptr) return kAmx;
  int named = kAmx;
  while (named > kBaseline && strcmp(wanted, kNames[named]) != 0) --named;
  return named;
}
#endif

int detect() {
#if defined(FFA_X86_COPIES)
  const int limit = highest();
  __builtin_cpu_init();
  if (limit < kAvx2 || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return kBaseline;
  }
  if (limit < kAvx512 || !__builtin_cpu_supports("avx512f") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl")) {
    return kAvx2;
  }
  if (limit < kAvx512Bf16) return kAvx512;
  // Its vectors are one level above, its tiles two. Intel's vectors of pairs make half of what fp32
  // ones make: there they wait to be asked for.
  const int found = kAvx512 + ffa::avx512bf16::bf16_unit();
  if (found == kAvx512Bf16 && limit > found && __builtin_cpu_is("intel")) return kAvx512;
  return found < limit ? found : limit;
#else
  return kBaseline;
#endif
}

// Threads that are the first at the same time find the same.
int isa() {
  static int known = -1;
  int found = __atomic_load_n(&known, __ATOMIC_RELAXED);
  if (found < 0) __atomic_store_n(&known, found = detect(), __ATOMIC_RELAXED);
  return found;
}

}  // namespace

#if defined(FFA_X86_COPIES)
#define FFA_COPY(op) \
  (isa() >= kAvx512 ? ffa::avx512::op : isa() == kAvx2 ? ffa::avx2::op : ffa::baseline::op)
#else
#define FFA_COPY(op) ffa::baseline::op
#endif

extern "C" {

const char* ffa_cpu_isa(void) { return kNames[isa()]; }

int ffa_cpu_has_openmp(void) { return ffa::parallel_available(); }

int ffa_cpu_chacha20(const int64_t* rng_state, int64_t tensor_id, int64_t first_block,
                     int64_t n_blocks, uint32_t* out, int threads) {
  return FFA_COPY(chacha20)(rng_state, tensor_id, first_block, n_blocks, out, threads);
}

int ffa_cpu_gaussian(const int64_t* rng_state, int64_t tensor_id, int64_t numel, int dtype,
                     void* out, int threads) {
  return FFA_COPY(gaussian)(rng_state, tensor_id, numel, dtype, out, threads);
}

int ffa_cpu_dropout(const int64_t* dropout_state, double p, int64_t first_row, int64_t rows,
                    int64_t columns, int dtype, const void* x, void* out, int threads) {
  return FFA_COPY(dropout)(dropout_state, p, first_row, rows, columns, dtype, x, out, threads);
}

int ffa_cpu_dropout_add(const int64_t* dropout_state, double p, double scaling, int64_t first_row,
                        int64_t rows, int64_t columns, int dtype, const void* v, void* dx,
                        int threads) {
  return FFA_COPY(dropout_add)(dropout_state, p, scaling, first_row, rows, columns, dtype, v, dx,
                               threads);
}

int ffa_cpu_rank_term(int64_t rows, int64_t columns, int64_t r, int dtype, const void* x,
                      int64_t depth, const void* lora_A, void* left, const void* right,
                      int64_t column_stride, int64_t rank_stride, double scaling, int adds,
                      const void* bias, void* out, int threads) {
  return FFA_COPY(rank_term)(rows, columns, r, dtype, x, depth, lora_A, left, right, column_stride,
                             rank_stride, scaling, adds, bias, out, threads);
}

int ffa_cpu_per_sample_grad(int64_t n, int64_t rows, int64_t d_out, int64_t r, int dtype,
                            const void* g, const void* h, const void* lora_B,
                            const int32_t* offsets, double scale, void* u, void* G, double* sq,
                            int threads) {
  return FFA_COPY(per_sample_grad)(n, rows, d_out, r, dtype, g, h, lora_B, offsets, scale, u, G, sq,
                                   threads);
}

int ffa_cpu_per_sample_backward(int64_t n, int64_t rows, int64_t d_out, int64_t d_in, int64_t r,
                                int dtype, const void* g, const void* h, const void* lora_A,
                                const void* lora_B, const int32_t* offsets, double scaling,
                                double scale, void* dx, void* G, double* sq, int threads) {
  return FFA_COPY(per_sample_backward)(n, rows, d_out, d_in, r, dtype, g, h, lora_A, lora_B,
                                       offsets, scaling, scale, dx, G, sq, threads);
}

int ffa_cpu_has_bf16_product(void) { return isa() >= kAvx512Bf16; }

int ffa_cpu_bf16_product(int64_t rows, int64_t depth, int64_t columns, int64_t r, const void* x,
                         const void* right, int right_dtype, int64_t right_row,
                         int64_t right_column, const void* scale, int scales_rows, const void* bias,
                         const void* left, const void* term, int64_t term_row, int64_t term_column,
                         double scaling, void* out, int threads) {
  if (!ffa_cpu_has_bf16_product()) return FFA_WRONG_ARCH;
  return ffa::avx512bf16::bf16_product(rows, depth, columns, r, x, right, right_dtype, right_row,
                                       right_column, scale, scales_rows, bias, left, term, term_row,
                                       term_column, scaling, out, threads, isa() == kAmx);
}

int ffa_cpu_fp32_product(int64_t rows, int64_t depth, int64_t columns, int64_t r, const void* x,
                         const void* right, int right_dtype, int64_t right_row,
                         int64_t right_column, const void* scale, int scales_rows, const void* bias,
                         const void* left, const void* term, int64_t term_row, int64_t term_column,
                         double scaling, void* out, int threads) {
  if (isa() == kAmx && right_dtype == FFA_F32 && scale == nullptr) {
    return ffa::avx512bf16::fp32_tiles(rows, depth, columns, r, x, right, right_row, right_column,
                                       bias, left, term, term_row, term_column, scaling, out,
                                       threads);
  }
  return FFA_COPY(fp32_product)(rows, depth, columns, r, x, right, right_dtype, right_row,
                                right_column, scale, scales_rows, bias, left, term, term_row,
                                term_column, scaling, out, threads);
}

int ffa_cpu_prefers_fp32_product(void) {
#if defined(FFA_X86_COPIES)
  if (isa() == kAmx) return 2;
  return isa() != kBaseline && __builtin_cpu_is("amd") != 0;
#else
  return 0;
#endif
}

int ffa_cpu_clip_accumulate(int64_t n_tensors, int64_t n, const int64_t* numels, const int* dtypes,
                            const void* const* grad_samples, const double* const* squares,
                            void* const* sums, int64_t groups, const double* max_grad_norm,
                            const uint8_t* keep, int64_t* stats, double* factors, int threads) {
  return FFA_COPY(clip_accumulate)(n_tensors, n, numels, dtypes, grad_samples, squares, sums,
                                   groups, max_grad_norm, keep, stats, factors, threads);
}

int ffa_cpu_private_update(int64_t n_tensors, const int64_t* numels, const int* dtypes,
                           void* const* params, void* const* sums, void* const* exp_avgs,
                           void* const* exp_avg_sqs, float* const* steps, int64_t* rng_state,
                           const double* hyper, const int64_t* tensor_ids, int64_t groups,
                           const double* max_grad_norm, double noise_multiplier,
                           double expected_batch_size, int optimizer, int nesterov, int maximize,
                           int threads) {
  return FFA_COPY(private_update)(n_tensors, numels, dtypes, params, sums, exp_avgs, exp_avg_sqs,
                                  steps, rng_state, hyper, tensor_ids, groups, max_grad_norm,
                                  noise_multiplier, expected_batch_size, optimizer, nesterov,
                                  maximize, threads);
}

int ffa_cpu_private_step(int64_t n_tensors, int64_t n, const int64_t* numels,
                         const int* grad_dtypes, const void* const* grad_samples,
                         const double* const* squares, const uint8_t* keep, int64_t* stats,
                         double* factors, const int* dtypes, void* const* params,
                         void* const* exp_avgs, void* const* exp_avg_sqs, float* const* steps,
                         int64_t* rng_state, const double* hyper, const int64_t* tensor_ids,
                         int64_t groups, const double* max_grad_norm, double noise_multiplier,
                         double expected_batch_size, int optimizer, int nesterov, int maximize,
                         int threads) {
  return FFA_COPY(private_step)(
      n_tensors, n, numels, grad_dtypes, grad_samples, squares, keep, stats, factors, dtypes,
      params, exp_avgs, exp_avg_sqs, steps, rng_state, hyper, tensor_ids, groups, max_grad_norm,
      noise_multiplier, expected_batch_size, optimizer, nesterov, maximize, threads);
}

}  // extern "C"
