#!/usr/bin/env bash
# The same through torchrun; NPROC, NNODES, NODE_RANK and RDZV (host:port) as torchrun means them:
#   NPROC=8 bash launchers/torchrun.sh RECIPE [section.key=value ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup eval,prep
n=$(gpus)
exec .venv/bin/torchrun --nproc-per-node "${NPROC:-$((n > 0 ? n : 2))}" --nnodes "${NNODES:-1}" \
    --node-rank "${NODE_RANK:-0}" --rdzv-backend c10d --rdzv-endpoint "${RDZV:-127.0.0.1:$(free_port)}" \
    --module medvlm.cli train "$@"
