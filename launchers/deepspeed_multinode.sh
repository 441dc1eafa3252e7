#!/usr/bin/env bash
# Train a recipe on the hosts of a DeepSpeed hostfile (lines such as "node1 slots=8"), started over ssh with pdsh:
#   HOSTFILE=hosts bash launchers/deepspeed_multinode.sh RECIPE [section.key=value ...]
# Repository, .venv, data and runs must lie at the same path on every host. MASTER_ADDR and MASTER_PORT may be given.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
HOSTFILE=${HOSTFILE:?give the path of a hostfile: lines such as "node1 slots=8"}
[[ -f $HOSTFILE ]] || { echo "$HOSTFILE: no such hostfile" >&2; exit 1; }
setup eval,prep
export PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore::FutureWarning
exec .venv/bin/deepspeed --hostfile "$HOSTFILE" ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
    --master_port "${MASTER_PORT:-29500}" --no_local_rank --module medvlm.cli train "$@"
