/* The whole C interface of the compiled kernels: dtypes, status codes, launchers.
 *
 * No torch in here: raw pointers, sizes and a thread count (CPU) or a stream (CUDA). Every array is
 * contiguous in row-major order and owned by the caller, who also allocates outputs. A launcher
 * returns FFA_OK or the status that says why nothing was computed.
 *
 * `rng_state` is int64[5]: a 256-bit ChaCha20 key as four little-endian words, then the step.
 */
#ifndef FFA_H
#define FFA_H

#include <stdint.h>

#define FFA_ABI_VERSION 9

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

enum ffa_dtype { FFA_F32 = 0, FFA_F64 = 1, FFA_F16 = 2, FFA_BF16 = 3, FFA_I8 = 4 };

enum ffa_status {
  FFA_OK = 0,
  FFA_BAD_DTYPE = 1,
  FFA_BAD_SIZE = 2,
  FFA_BAD_VALUE = 3,
  FFA_NO_MEMORY = 4,
  FFA_CUDA_ERROR = 5,
  FFA_WRONG_ARCH = 6,
};

enum ffa_optimizer { FFA_NONE = 0, FFA_SGD = 1, FFA_ADAM = 2, FFA_ADAMW = 3 };

int ffa_abi_version(void);
const char* ffa_status_string(int status);

/* Instruction set that the launchers below run on this machine: "baseline", "avx2", "avx512",
 * "avx512bf16" or "amx", each with those before it. FFA_CPU_ISA names a lower one. */
const char* ffa_cpu_isa(void);
/* 1 when an OpenMP runtime is loaded in this process, else 0 and every launcher runs on one thread.
 */
int ffa_cpu_has_openmp(void);

/* out: uint32 (n_blocks, 16), RFC 8439 blocks first_block, first_block + 1, ... */
int ffa_cpu_chacha20(const int64_t* rng_state, int64_t tensor_id, int64_t first_block,
                     int64_t n_blocks, uint32_t* out, int threads);

/* out: dtype (numel,) standard Gaussians, F32 or F64. */
int ffa_cpu_gaussian(const int64_t* rng_state, int64_t tensor_id, int64_t numel, int dtype,
                     void* out, int threads);

/* x, out (rows, columns): out = kept ? x / (1 - p') : 0, p' being p rounded to a multiple of 2^-16.
 * The mask is that of rows first_row, first_row + 1, ... of a matrix with so many columns. out may
 * be x. */
int ffa_cpu_dropout(const int64_t* dropout_state, double p, int64_t first_row, int64_t rows,
                    int64_t columns, int dtype, const void* x, void* out, int threads);

/* dx += scaling * dropout(v), same mask and arguments as above. */
int ffa_cpu_dropout_add(const int64_t* dropout_state, double p, double scaling, int64_t first_row,
                        int64_t rows, int64_t columns, int dtype, const void* v, void* dx,
                        int threads);

/* With depth 0 or more, first left (rows, r) = x lora_A^T: x (rows, depth), lora_A (r, depth).
 * Below 0, left is given, and x and lora_A are not read. Then out (rows, columns) = bias + scaling
 * left right^T, or += scaling left right^T where adds is not 0: element (c, k) of right stands at c
 * column_stride + k rank_stride; bias (columns,) or null, and not read where it adds. With columns
 * 0 neither right nor out is. One dtype, F32 or F64. */
int ffa_cpu_rank_term(int64_t rows, int64_t columns, int64_t r, int dtype, const void* x,
                      int64_t depth, const void* lora_A, void* left, const void* right,
                      int64_t column_stride, int64_t rank_stride, double scaling, int adds,
                      const void* bias, void* out, int threads);

/* g (rows, d_out), h (rows, r), lora_B (d_out, r) or null; u (rows, r) = g B (not written without
 * lora_B), G (n, d_out, r) = scale g_i^T h_i, sq (2, n) in float64: |G_i|^2, and below it ones, as
 * clip_accumulate takes them. All else of one dtype, F32 or F64. Record i owns rows offsets[i] to
 * offsets[i + 1] - 1; offsets (n + 1,) lie in [0, rows] and do not fall. Null offsets: rows / n
 * each. */
int ffa_cpu_per_sample_grad(int64_t n, int64_t rows, int64_t d_out, int64_t r, int dtype,
                            const void* g, const void* h, const void* lora_B,
                            const int32_t* offsets, double scale, void* u, void* G, double* sq,
                            int threads);

/* As above, and dx (rows, d_in) += scaling u lora_A, for lora_A (r, d_in); u is not given out. */
int ffa_cpu_per_sample_backward(int64_t n, int64_t rows, int64_t d_out, int64_t d_in, int64_t r,
                                int dtype, const void* g, const void* h, const void* lora_A,
                                const void* lora_B, const int32_t* offsets, double scaling,
                                double scale, void* dx, void* G, double* sq, int threads);

/* Whether the next one runs here: it needs AVX512-BF16, and takes AMX tiles where there are any. */
int ffa_cpu_has_bf16_product(void);

/* out (rows, columns) = x right + scaling left term + bias, x (rows, depth) and right (depth,
 * columns) rounded to bf16, scaling left (rows, r) and term (r, columns) to 16 bits or more. right
 * is of right_dtype, BF16 without a scale, or I8; it is multiplied with scale, if that is not null,
 * before it is rounded: (columns,), or (depth,) where scales_rows is not 0. All else is F32; bias
 * (columns,) or null. Element (k, c) of right is right_row k + right_column c elements from its
 * start, and term likewise; x, left and out are contiguous. A row of out has the same bits whatever
 * the other rows are. Subnormal numbers of x and right count as 0. */
int ffa_cpu_bf16_product(int64_t rows, int64_t depth, int64_t columns, int64_t r, const void* x,
                         const void* right, int right_dtype, int64_t right_row,
                         int64_t right_column, const void* scale, int scales_rows, const void* bias,
                         const void* left, const void* term, int64_t term_row, int64_t term_column,
                         double scaling, void* out, int threads);

/* The same, and nothing rounded but the sums; right may be F32, and of any type has a scale. By AMX
 * tiles, where there are any, if right is F32 without a scale: then numbers below 2^-126 count as
 * 0, products too. */
int ffa_cpu_fp32_product(int64_t rows, int64_t depth, int64_t columns, int64_t r, const void* x,
                         const void* right, int right_dtype, int64_t right_row,
                         int64_t right_column, const void* scale, int scales_rows, const void* bias,
                         const void* left, const void* term, int64_t term_row, int64_t term_column,
                         double scaling, void* out, int threads);

/* Whether with right in F32 it is faster here than the product that PyTorch brings, MKL's: 0 no, 1
 * by vectors, of which MKL's leaves a part unused on an AMD processor, 2 by tiles, if it is large.
 */
int ffa_cpu_prefers_fp32_product(void);

/* grad_samples[k] (n, numels[k]) of dtypes[k]; sums[k] (numels[k],) int64 on the grid of its bound,
 * float64 when the bound is infinite; groups is 1 (flat) or n_tensors, and so is the length of
 * max_grad_norm; keep (n,) bytes or null; stats int64[2]; factors float64 (groups, n).
 * squares[k] float64 (2, n), or squares null: where the second row is 1 the first is |G_k,i|^2;
 * elsewhere the norm is taken from grad_samples[k]. */
int ffa_cpu_clip_accumulate(int64_t n_tensors, int64_t n, const int64_t* numels, const int* dtypes,
                            const void* const* grad_samples, const double* const* squares,
                            void* const* sums, int64_t groups, const double* max_grad_norm,
                            const uint8_t* keep, int64_t* stats, double* factors, int threads);

/* One logical step over all tensors. exp_avgs and exp_avg_sqs may be null, or hold null; steps
 * float32 scalars; hyper float64 (n_tensors, 5): lr, weight_decay, beta1 | momentum,
 * beta2 | dampening, eps. sums are zeroed and rng_state[4] grows by one. */
int ffa_cpu_private_update(int64_t n_tensors, const int64_t* numels, const int* dtypes,
                           void* const* params, void* const* sums, void* const* exp_avgs,
                           void* const* exp_avg_sqs, float* const* steps, int64_t* rng_state,
                           const double* hyper, const int64_t* tensor_ids, int64_t groups,
                           const double* max_grad_norm, double noise_multiplier,
                           double expected_batch_size, int optimizer, int nesterov, int maximize,
                           int threads);

/* clip_accumulate into sums that are nowhere in memory, then private_update: the same bits. */
int ffa_cpu_private_step(int64_t n_tensors, int64_t n, const int64_t* numels,
                         const int* grad_dtypes, const void* const* grad_samples,
                         const double* const* squares, const uint8_t* keep, int64_t* stats,
                         double* factors, const int* dtypes, void* const* params,
                         void* const* exp_avgs, void* const* exp_avg_sqs, float* const* steps,
                         int64_t* rng_state, const double* hyper, const int64_t* tensor_ids,
                         int64_t groups, const double* max_grad_norm, double noise_multiplier,
                         double expected_batch_size, int optimizer, int nesterov, int maximize,
                         int threads);

/* Number of usable devices, 0 when there is no driver. */
int ffa_cuda_device_count(void);
/* FFA_OK when the library has code for the current device, FFA_WRONG_ARCH when it has none. */
int ffa_cuda_check_device(void);
/* 1 when this library runs its kernels on the CPU, one thread after another (csrc/cuda/block.h). */
int ffa_cuda_serial(void);

/* Below, `stream` is a cudaStream_t of the current device. Pointers to numbers are device pointers,
 * rng_state and hyper among them; arrays of sizes, dtypes and pointers, bounds and tensor_ids are
 * in host memory and free when a launcher returns. Nothing waits for the device. A launcher that
 * needs scratch space says how many bytes, aligned to 8, for the current device and the same sizes.
 */
int ffa_cuda_chacha20(const int64_t* rng_state, int64_t tensor_id, int64_t first_block,
                      int64_t n_blocks, uint32_t* out, void* stream);

/* Any dtype. */
int ffa_cuda_gaussian(const int64_t* rng_state, int64_t tensor_id, int64_t numel, int dtype,
                      void* out, void* stream);

/* As ffa_cpu_dropout. This and the matrix products below are for F32, F16 and BF16. */
int ffa_cuda_dropout(const int64_t* dropout_state, double p, int64_t first_row, int64_t rows,
                     int64_t columns, int dtype, const void* x, void* out, void* stream);

/* out (rows, columns) += scaling keep (left right^T): left (rows, r); element (c, k) of right
 * stands at c column_stride + k rank_stride. With dropout_state, `keep` is the mask of a matrix
 * like `out` divided by 1 - p'; without it, 1. */
int ffa_cuda_rank_term(int64_t rows, int64_t columns, int64_t r, int dtype, const void* left,
                       const void* right, int64_t column_stride, int64_t rank_stride,
                       double scaling, const int64_t* dropout_state, double p, void* out,
                       void* stream);

/* As ffa_cpu_per_sample_grad, except that offsets may hold anything: they are clamped to [0, rows],
 * and that sq is (n,), without ones. d_out and r are at least 1. `ragged`: offsets are given. */
int ffa_cuda_per_sample_grad_scratch(int64_t n, int64_t rows, int64_t d_out, int64_t r, int dtype,
                                     int with_u, int ragged, int64_t* bytes);
int ffa_cuda_per_sample_grad(int64_t n, int64_t rows, int64_t d_out, int64_t r, int dtype,
                             const void* g, const void* h, const void* lora_B,
                             const int32_t* offsets, double scale, void* u, void* G, double* sq,
                             void* scratch, void* stream);

/* As ffa_cpu_clip_accumulate; any dtypes. */
int ffa_cuda_clip_accumulate_scratch(int64_t n_tensors, int64_t n, const int64_t* numels,
                                     int64_t* bytes);
int ffa_cuda_clip_accumulate(int64_t n_tensors, int64_t n, const int64_t* numels, const int* dtypes,
                             const void* const* grad_samples, const double* const* squares,
                             void* const* sums, int64_t groups, const double* max_grad_norm,
                             const uint8_t* keep, int64_t* stats, double* factors, void* scratch,
                             void* stream);

/* As ffa_cpu_private_update; any dtypes, in fp32 arithmetic except for F64. */
int ffa_cuda_private_update(int64_t n_tensors, const int64_t* numels, const int* dtypes,
                            void* const* params, void* const* sums, void* const* exp_avgs,
                            void* const* exp_avg_sqs, float* const* steps, int64_t* rng_state,
                            const double* hyper, const int64_t* tensor_ids, int64_t groups,
                            const double* max_grad_norm, double noise_multiplier,
                            double expected_batch_size, int optimizer, int nesterov, int maximize,
                            void* stream);

/* As ffa_cpu_private_step; any dtypes. scratch is that of clip_accumulate. */
int ffa_cuda_private_step(int64_t n_tensors, int64_t n, const int64_t* numels,
                          const int* grad_dtypes, const void* const* grad_samples,
                          const double* const* squares, const uint8_t* keep, int64_t* stats,
                          double* factors, void* scratch, const int* dtypes, void* const* params,
                          void* const* exp_avgs, void* const* exp_avg_sqs, float* const* steps,
                          int64_t* rng_state, const double* hyper, const int64_t* tensor_ids,
                          int64_t groups, const double* max_grad_norm, double noise_multiplier,
                          double expected_batch_size, int optimizer, int nesterov, int maximize,
                          void* stream);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif

#endif
