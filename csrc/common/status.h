// The entry points that every compiled library has: its ABI version and the texts of its statuses.
#pragma once

#include "../ffa.h"

extern "C" int ffa_abi_version(void) { return FFA_ABI_VERSION; }

extern "C" const char* ffa_status_string(int status) {
  switch (status) {
    case FFA_OK:
      return "ok";
    case FFA_BAD_DTYPE:
      return "dtype not served by this kernel";
    case FFA_BAD_SIZE:
      return "a size is negative, too large, or does not fit the others";
    case FFA_BAD_VALUE:
      return "a scalar argument is out of range";
    case FFA_NO_MEMORY:
      return "out of memory for scratch space";
    case FFA_CUDA_ERROR:
      return "the CUDA runtime refused the launch";
    case FFA_WRONG_ARCH:
      return "the library has no code for this device: name its compute capability in "
             "FFA_CUDA_ARCHS and run `make lib`";
    default:
      return "unknown status";
  }
}
