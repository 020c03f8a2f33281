// What the products with a frozen matrix take, and how a long one is parted.
#pragma once

#include <stdint.h>

#include "../ffa.h"
#include "pages.h"

namespace ffa::FFA_ISA {

// The bits of a bf16 number.
typedef uint16_t bf16;

struct Matrix {
  const void* data;
  int dtype;
  int64_t depth, row, column;  // of right or term: its rows, and steps between rows and columns
  const float* scale;          // of its rows or of its columns; or null
  bool scales_rows;
};

// out = x right + scaling left term + bias, for a segment of x and right; or added to out.
struct Problem {
  int64_t rows, columns, depth;  // `depth` lies between rows of x
  const float *x, *left, *bias;
  Matrix right, term;
  float scaling;
  bool add;  // to out, in place of the bias
  float* out;
};

// Of a launcher's arguments.
inline Problem problem_of(int64_t rows, int64_t depth, int64_t columns, int64_t r, const void* x,
                          const void* right, int right_dtype, int64_t right_row,
                          int64_t right_column, const void* scale, int scales_rows,
                          const void* bias, const void* left, const void* term, int64_t term_row,
                          int64_t term_column, double scaling, void* out) {
  Problem p = {};
  p.rows = rows;
  p.columns = columns;
  p.depth = depth;
  p.x = static_cast<const float*>(x);
  p.left = static_cast<const float*>(left);
  p.bias = static_cast<const float*>(bias);
  p.right = {right,           right_dtype,  depth,
             right_row,       right_column, static_cast<const float*>(scale),
             scales_rows != 0};
  p.term = {term, FFA_F32, r, term_row, term_column, nullptr, false};
  p.scaling = static_cast<float>(scaling);
  p.out = static_cast<float*>(out);
  return p;
}

// Calls run(problem) for `segment` rows of right at a time, where it has more than `whole`; what is
// left at the end takes the term with it.
template <class Run>
int run_segments(Problem p, int64_t segment, int64_t whole, Run run) {
  const Matrix right = p.right, term = p.term;
  const float* x = p.x;
  const int64_t bytes = right.dtype == FFA_F32 ? 4 : right.dtype == FFA_BF16 ? 2 : 1;
  ask_for_huge_pages(p.out, p.rows * p.columns * 4);
  int64_t start = 0;
  do {
    const int64_t end = right.depth - start > whole ? start + segment : right.depth;
    p.x = x + start;
    p.right.data = static_cast<const char*>(right.data) + start * right.row * bytes;
    p.right.depth = end - start;
    if (right.scale != nullptr && right.scales_rows) p.right.scale = right.scale + start;
    p.term = term;
    if (end < right.depth) p.term.depth = 0;
    if (const int status = run(p)) return status;
    p.add = true;
    start = end;
  } while (start < right.depth);
  return FFA_OK;
}

}  // namespace ffa::FFA_ISA
