"""`python -m ffa_kernels.backends.triton`: the table of `aot`."""

import sys

from ffa_kernels.backends.triton.aot import main

sys.exit(main())
