// Larger pages for what is written once.
#pragma once

#include <stdint.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ffa::FFA_ISA {

// Asks for huge pages under an output so large that malloc, as it is by default, gives it a mapping
// of its own, which goes when it is freed: the first writes to it then fault once in 2 MiB, and not
// once in 4 KiB. A malloc that keeps its memory gets them for memory that it keeps. Where the
// system has none they are small ones.
inline void ask_for_huge_pages(const void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLeast = 32 << 20;
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < kLeast) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (start + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace ffa::FFA_ISA
