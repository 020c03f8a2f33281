// A parallel loop on the OpenMP runtime that the process already has.
#pragma once

#include <stdint.h>

namespace ffa {

// Calls fn(context, task) once for each task in [0, tasks) on up to `threads` threads, in any
// order.
void parallel_run(int threads, int64_t tasks, void (*fn)(void*, int64_t), void* context);

bool parallel_available();

}  // namespace ffa

namespace ffa::FFA_ISA {

template <class Body>
void parallel_for(int threads, int64_t tasks, Body body) {
  parallel_run(
      threads, tasks, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); },
      &body);
}

}  // namespace ffa::FFA_ISA
