// Finds GOMP_parallel in the process instead of linking an OpenMP runtime.
//
// torch wheels carry their own runtime, under names that differ between releases (libgomp.so.1,
// libgomp-<hash>.so.1, libiomp5.so). A library linked to libgomp.so.1 would map a second runtime
// beside some of them: two thread pools that fight for the same cores. GNU, LLVM and Intel runtimes
// all export GOMP_parallel.
#include "parallel.h"

#include <dlfcn.h>
#include <string.h>

#include <atomic>

#if defined(__linux__)
#include <link.h>
#endif

namespace ffa {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__linux__)
int find_in_object(dl_phdr_info* info, size_t, void* found) {
  const char* slash = strrchr(info->dlpi_name, '/');
  const char* name = slash ? slash + 1 : info->dlpi_name;
  if (strncmp(name, "libgomp", 7) != 0 && strncmp(name, "libomp", 6) != 0 &&
      strncmp(name, "libiomp", 7) != 0) {
    return 0;
  }
  void* handle = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_LAZY);
  if (handle == nullptr) return 0;
  *static_cast<void**>(found) = dlsym(handle, "GOMP_parallel");
  return *static_cast<void**>(found) != nullptr;
}
#endif

GompParallel find_gomp() {
  void* found = dlsym(RTLD_DEFAULT, "GOMP_parallel");
#if defined(__linux__)
  // A runtime loaded by an extension module is not in the global scope.
  if (found == nullptr) dl_iterate_phdr(find_in_object, &found);
#endif
  return reinterpret_cast<GompParallel>(found);
}

GompParallel gomp_parallel() {
  static const GompParallel found = find_gomp();
  return found;
}

struct Job {
  std::atomic<int64_t> next{0};
  int64_t tasks;
  void (*fn)(void*, int64_t);
  void* context;
};

void work(void* data) {
  Job* job = static_cast<Job*>(data);
  for (int64_t task; (task = job->next.fetch_add(1)) < job->tasks;) job->fn(job->context, task);
}

}  // namespace

bool parallel_available() { return gomp_parallel() != nullptr; }

void parallel_run(int threads, int64_t tasks, void (*fn)(void*, int64_t), void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1 || gomp_parallel() == nullptr) {
    for (int64_t task = 0; task < tasks; ++task) fn(context, task);
    return;
  }
  Job job;
  job.tasks = tasks;
  job.fn = fn;
  job.context = context;
  gomp_parallel()(work, &job, static_cast<unsigned>(threads), 0);
}

}  // namespace ffa
