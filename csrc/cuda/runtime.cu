// What the CUDA library says about itself and the machine.
#include "../common/status.h"
#include "launch.h"

namespace ffa::FFA_ISA {

struct Probe : EveryArch {
  using Registers = Nothing;
  using Shared = Nothing;

  template <class Block>
  FFA_DEVICE void operator()(Block&, int64_t, Shared&) const {}
};

}  // namespace ffa::FFA_ISA

extern "C" int ffa_cuda_device_count(void) { return ffa::FFA_ISA::device_count(); }

extern "C" int ffa_cuda_check_device(void) {
  return ffa::FFA_ISA::check_device<ffa::FFA_ISA::Probe>();
}

extern "C" int ffa_cuda_serial(void) {
#if defined(__CUDACC__)
  return 0;
#else
  return 1;
#endif
}
