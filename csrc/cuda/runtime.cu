// What the CUDA library says about itself and the machine.
#include <cuda_runtime.h>

#include "../common/status.h"

extern "C" int ffa_cuda_device_count(void) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    // A missing driver must not be taken for a failure of the next launch.
    cudaGetLastError();
    return 0;
  }
  return count;
}
