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

// The two functions of the runtime that are used here.
struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread_number)(void);
};

bool look_up(void* handle, Runtime* found) {
  void* parallel = dlsym(handle, "GOMP_parallel");
  void* thread_number = dlsym(handle, "omp_get_thread_num");
  if (parallel == nullptr || thread_number == nullptr) return false;
  found->parallel = reinterpret_cast<decltype(found->parallel)>(parallel);
  found->thread_number = reinterpret_cast<decltype(found->thread_number)>(thread_number);
  return true;
}

#if defined(__linux__)
int find_in_object(dl_phdr_info* info, size_t, void* found) {
  const char* slash = strrchr(info->dlpi_name, '/');
  const char* name = slash ? slash + 1 : info->dlpi_name;
  if (strncmp(name, "libgomp", 7) != 0 && strncmp(name, "libomp", 6) != 0 &&
      strncmp(name, "libiomp", 7) != 0) {
    return 0;
  }
  void* handle = dlopen(info->dlpi_name, RTLD_NOLOAD | RTLD_LAZY);
  return handle != nullptr && look_up(handle, static_cast<Runtime*>(found));
}
#endif

Runtime find_runtime() {
  Runtime found = {};
  // A runtime loaded by an extension module is not in the global scope.
  if (!look_up(RTLD_DEFAULT, &found)) {
#if defined(__linux__)
    dl_iterate_phdr(find_in_object, &found);
#endif
  }
  return found;
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

// A part of the tasks, on a cache line of its own: whoever comes to it takes the next one.
struct alignas(64) Range {
  std::atomic<int64_t> next;
  int64_t end;
};

constexpr int kMostRanges = 64;

struct Job {
  Range ranges[kMostRanges];
  int count;
  void (*fn)(void*, int64_t);
  void* context;
};

// A thread begins with the range of its number, in the next call as in this one, and finds in its
// cache what it left there. Then it helps the others.
void work(void* data) {
  Job* job = static_cast<Job*>(data);
  const int own = runtime().thread_number();
  for (int i = 0; i < job->count; ++i) {
    Range& range = job->ranges[(own + i) % job->count];
    for (int64_t task; (task = range.next.fetch_add(1)) < range.end;) job->fn(job->context, task);
  }
}

}  // namespace

bool parallel_available() { return runtime().parallel != nullptr; }

void parallel_run(int threads, int64_t tasks, void (*fn)(void*, int64_t), void* context) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1 || !parallel_available()) {
    for (int64_t task = 0; task < tasks; ++task) fn(context, task);
    return;
  }
  Job job;
  job.count = threads < kMostRanges ? threads : kMostRanges;
  job.fn = fn;
  job.context = context;
  for (int i = 0; i < job.count; ++i) {
    job.ranges[i].next = tasks * i / job.count;
    job.ranges[i].end = tasks * (i + 1) / job.count;
  }
  runtime().parallel(work, &job, static_cast<unsigned>(threads), 0);
}

}  // namespace ffa
