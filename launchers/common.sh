# Sourced by the other launchers: makes .venv if absent and installs medvlm into it. Safe and fast to run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export TOKENIZERS_PARALLELISM=false

setup() { # setup EXTRAS: for example "eval,prep"
    local stamp python=${PYTHON:-python3}
    for stamp in .venv/medvlm-dev .venv/medvlm-"$1"; do # "dev" holds all the others
        if [[ -f $stamp && ! setup.cfg -nt $stamp ]]; then return; fi
    done
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "medvlm needs Python 3.10 or newer" >&2; exit 1; }
    echo "Setting up .venv (once; some minutes)"
    # An installed CUDA build of torch is used as it is.
    if "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        [[ -d .venv ]] || "$python" -m venv --system-site-packages .venv
    else
        [[ -d .venv ]] || "$python" -m venv .venv
    fi
    .venv/bin/python -m pip install --quiet --upgrade pip 'setuptools>=77' wheel
    if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
            .venv/bin/python -m pip install --quiet 'torch>=2.11'
        else
            .venv/bin/python -m pip install --quiet torch==2.13.0 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
        fi
    fi
    # DeepSpeed compiles nothing ahead of time.
    DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --editable ".[$1]"
    touch "$stamp"
}

free_port() { # so that two runs on one machine do not meet
    .venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

require_free_port() { # require_free_port PORT
    .venv/bin/python - "$1" <<'END' || exit 2
import socket, sys
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
try:
    s.bind(("", int(sys.argv[1])))
except (OSError, ValueError, OverflowError) as error:
    sys.exit(f"port {sys.argv[1]} cannot be used ({error}); give another one")
END
}

gpus() { .venv/bin/python -c 'import torch; print(torch.cuda.device_count())'; }

run_training() { # run_training RECIPE [section.key=value ...]: all local GPUs, or two CPU ranks
    local n; n=$(gpus)
    local chosen=(--num_gpus "$n")
    if ((n == 0)); then
        chosen=(--num_gpus 2)
        export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    elif [[ ${CUDA_VISIBLE_DEVICES:-} =~ ^[0-9,]+$ ]]; then
        chosen=() # DeepSpeed takes these and no others, unless it is given a number; it knows no names (MIG-...)
    fi
    PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore::FutureWarning .venv/bin/deepspeed ${chosen[@]+"${chosen[@]}"} \
        --no_local_rank --master_port "${MASTER_PORT:-$(free_port)}" --module medvlm.cli train "$@"
}
