#!/bin/sh
# Everything that needs a GPU, in one call of under nine minutes: builds csrc for this card, runs the
# tests on it (and a slice of them under compute-sanitizer), measures, writes all of it to a folder.
#
#   bench/gpu_check.sh OUT        PYTHON names the interpreter; torch with CUDA must be there. WHEELS
#                                 names a folder of what it lacks (opacus), where there is no network.
set -u
out=${1:?usage: bench/gpu_check.sh OUT}
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl || exit 1
fi
cd "$(dirname "$0")/.." || exit 1
unset TRITON_INTERPRET
PATH=$PATH:/usr/local/cuda/bin
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PATH PYTHONPATH
status=0

note() { echo "== $1: $2" | tee -a "$out/summary.txt"; [ "$2" = 0 ] || status=1; }

cc=$("$python" -c "import torch; print('%d%d' % torch.cuda.get_device_capability())") || exit 1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader > "$out/gpu.txt"
FFA_CUDA_ARCHS=$cc timeout 60 "$python" csrc/build.py > "$out/build.txt" 2>&1; note build $?

# Most of the time is Triton's compiler: a process for each of some cores, where pytest-xdist is there.
workers=$("$python" -c "import os, xdist; print('-n', min(8, os.cpu_count()))" 2> /dev/null)
# shellcheck disable=SC2086
OMP_NUM_THREADS=1 timeout 200 "$python" -m pytest -q $workers --maxfail=100 --tb=short \
    -p no:cacheprovider -k "triton or cuda or gpu" \
    tests/test_gpu.py tests/test_chacha20.py tests/test_gaussian.py tests/test_linear.py \
    tests/test_per_sample_grad.py tests/test_clip_accumulate.py tests/test_private_update.py \
    tests/test_private_step.py tests/test_packed.py tests/test_per_sample_clip.py \
    tests/test_compile.py > "$out/tests.txt" 2>&1; note tests $?

# PyTorch's blocks are larger than the tensors in them: without its cache each tensor is a block of
# its own, past whose end the sanitizer sees. Graphs need the cache.
if command -v compute-sanitizer > /dev/null; then
    OMP_NUM_THREADS=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 80 \
        compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -x -p no:cacheprovider \
        -k "triton and (in_turn or packed_records or kind_of_bound or any_strides)" \
        tests/test_per_sample_clip.py tests/test_private_step.py tests/test_linear.py \
        > "$out/sanitizer.txt" 2>&1; note sanitizer $?
else
    echo "no compute-sanitizer on this machine" > "$out/sanitizer.txt"; note sanitizer 1
fi

timeout 190 "$python" bench/run.py --device cuda --out "$out" > "$out/bench.txt" 2>&1
note benchmark $?
cat "$out/bench.md"
tail -5 "$out/tests.txt"
cat "$out/summary.txt"
exit $status
