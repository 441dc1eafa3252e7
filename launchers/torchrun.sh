#!/usr/bin/env bash
# Train a recipe through torchrun; NPROC, NNODES, NODE_RANK and RDZV (host:port) as torchrun means them:
#   NPROC=8 bash launchers/torchrun.sh RECIPE [section.key=value ...] [--tiny]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup eval,prep
if [[ ${RDZV:-} && ${NODE_RANK:-0} == 0 ]]; then require_free_port "${RDZV##*:}"; fi # the first node listens there
n=$(gpus)
exec .venv/bin/torchrun --nproc-per-node "${NPROC:-$((n > 0 ? n : 2))}" --nnodes "${NNODES:-1}" \
    --node-rank "${NODE_RANK:-0}" --rdzv-backend c10d --rdzv-endpoint "${RDZV:-127.0.0.1:$(free_port)}" \
    --module medvlm.cli train "$@"
