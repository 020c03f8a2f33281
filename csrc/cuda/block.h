// A kernel as the program of one thread block, written once and run in two ways.
//
// A program is a struct of arguments with `Registers` (what a thread keeps), `Shared` (what a block
// shares) and `operator()(block, index, shared)`, which alternates
//
//   block.each(f)       f(thread, registers): the only place that touches memory
//   block.sync()        the barrier between two such phases
//   block.multiply, block.turn   what a warp does together with its registers
//
// A Block is one thread's view of its block, on the GPU and on the CPU. There the threads take
// turns (serial.h): the serial grid, in which a wrong index is seen by the address sanitizer, an
// unset register or shared byte reads as NaN, and what depends on the order of threads or of blocks
// gives other bits when the order is reversed.
#pragma once

#include "number.h"

#if !defined(__CUDACC__)
#include "serial.h"
#endif

// FFA_UNROLL stands before a loop whose counter picks registers.
#if defined(__CUDACC__)
#define FFA_DEVICE __device__ __forceinline__
#define FFA_UNROLL _Pragma("unroll")
#else
#define FFA_DEVICE inline
#define FFA_UNROLL
#endif

namespace ffa::FFA_ISA {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// One 16 x 8 by 8 x 8 product of a warp: sum += a b in fp32, with 16-bit a and b, two to a word.
// Lane 4 p + q holds, as the PTX ISA has it for mma.m16n8k8,
//   a0: rows p, a1: rows p + 8, columns 2 q, 2 q + 1     b: rows 2 q, 2 q + 1, column p
//   sum: (p, 2 q), (p, 2 q + 1), (p + 8, 2 q), (p + 8, 2 q + 1)
struct Product {
  float* sum;
  uint32_t a0, a1, b;
};

// The transpose of an 8 x 8 tile, lane 4 p + q holding row p, columns 2 q and 2 q + 1 of each.
struct Turn {
  uint32_t* out;
  uint32_t in;
};

#if defined(__CUDACC__)

template <class T>
__device__ __forceinline__ void multiply_add_tile(const Product& p);

template <>
__device__ __forceinline__ void multiply_add_tile<Half>(const Product& p) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(p.sum[0]), "+f"(p.sum[1]), "+f"(p.sum[2]), "+f"(p.sum[3])
      : "r"(p.a0), "r"(p.a1), "r"(p.b));
}

template <>
__device__ __forceinline__ void multiply_add_tile<Bfloat16>(const Product& p) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
      "{%0,%1,%2,%3};"
      : "+f"(p.sum[0]), "+f"(p.sum[1]), "+f"(p.sum[2]), "+f"(p.sum[3])
      : "r"(p.a0), "r"(p.a1), "r"(p.b));
}

template <class Registers>
class Block {
 public:
  template <class Body>
  __device__ __forceinline__ void each(Body body) {
    body(static_cast<int>(threadIdx.x), registers_);
  }

  __device__ __forceinline__ void sync() { __syncthreads(); }

  template <class T, class Of>
  __device__ __forceinline__ void multiply(Of of) {
    multiply_add_tile<T>(of(registers_));
  }

  template <class Of>
  __device__ __forceinline__ void turn(Of of) {
    const Turn t = of(registers_);
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(*t.out) : "r"(t.in));
  }

 private:
  Registers registers_;
};

// Integers only: their sum does not depend on the order.
__device__ __forceinline__ void count(int64_t* counter, int64_t more) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(more));
}

#else

template <class T>
float half_word(uint32_t word, int e) {
  return widen(T{static_cast<uint16_t>(word >> 16 * e)});
}

template <class T>
void multiply_add_tile(void* const* lanes) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *static_cast<const Product*>(lanes[lane]);
    const int row = lane / 4, column = lane % 4 * 2;
    for (int e = 0; e < 2; ++e) {
      a[row][column + e] = half_word<T>(p.a0, e);
      a[row + 8][column + e] = half_word<T>(p.a1, e);
      b[column + e][row] = half_word<T>(p.b, e);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* sum = static_cast<const Product*>(lanes[lane])->sum;
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      for (int k = 0; k < 8; ++k) sum[e] += a[row][k] * b[k][column];
    }
  }
}

inline void turn_tile(void* const* lanes) {
  uint16_t tile[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t in = static_cast<const Turn*>(lanes[lane])->in;
    tile[lane / 4][lane % 4 * 2] = static_cast<uint16_t>(in);
    tile[lane / 4][lane % 4 * 2 + 1] = static_cast<uint16_t>(in >> 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    const uint32_t high = tile[column + 1][row];
    *static_cast<const Turn*>(lanes[lane])->out = tile[column][row] | high << 16;
  }
}

template <class Registers>
class Block {
 public:
  Block(Turns& turns, int thread) : turns_(turns), thread_(thread) {
    memset(static_cast<void*>(&registers_), 0xff, sizeof(Registers));
  }

  template <class Body>
  void each(Body body) {
    body(thread_, registers_);
  }

  void sync() { turns_.wait(thread_); }

  template <class T, class Of>
  void multiply(Of of) {
    Product p = of(registers_);
    turns_.wait(thread_, &multiply_add_tile<T>, &p);
  }

  template <class Of>
  void turn(Of of) {
    Turn t = of(registers_);
    turns_.wait(thread_, &turn_tile, &t);
  }

 private:
  Turns& turns_;
  int thread_;
  Registers registers_;
};

inline void count(int64_t* counter, int64_t more) { *counter += more; }

#endif

// The sum of one value a thread, in an order that is always the same; `shared` is kThreads long.
// Every thread may read shared[0] afterwards.
template <class Block>
FFA_DEVICE void sum_threads(Block& block, double* shared) {
  for (int half = kThreads / 2; half > 0; half /= 2) {
    block.sync();
    block.each([&](int thread, auto&) {
      if (thread < half) shared[thread] += shared[thread + half];
    });
  }
  block.sync();
}

}  // namespace ffa::FFA_ISA
