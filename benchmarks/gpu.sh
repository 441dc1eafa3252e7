#!/usr/bin/env bash
# All measurements on one GPU in under ten minutes: the GPU's tests, then benchmarks/gpu.py with the same arguments.
# PYTHON names an interpreter that has medvlm's dependencies; by default that of .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
"$python" -m pytest tests/test_gpu.py -q -rs || echo "THE GPU TESTS FAILED: the figures below are of code that is wrong"
exec "$python" benchmarks/gpu.py "$@"
