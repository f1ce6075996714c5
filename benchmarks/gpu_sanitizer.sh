#!/usr/bin/env bash
# compute-sanitizer over every shipped kernel configuration. Needs a GPU and CUDA's tools. TOOLS: which of its tools.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
# Without torch's caching allocator every tensor is an allocation of its own, and a stray access shows.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in ${TOOLS:-memcheck racecheck synccheck initcheck}; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 1 "$python" -m benchmarks.gpu_check
done
