// Memory of a launcher's own.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace ffa::FFA_ISA {

template <class T>
T* allocate(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
  return static_cast<T*>(aligned_alloc(64, bytes));
}

// Frees what it holds.
template <class T>
struct Buffer {
  T* data = nullptr;
  bool ok = true;
  explicit Buffer(int64_t count) : data(count > 0 ? allocate<T>(count) : nullptr) {
    ok = count <= 0 || data != nullptr;
  }
  ~Buffer() { free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

}  // namespace ffa::FFA_ISA
