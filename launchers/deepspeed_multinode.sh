#!/usr/bin/env bash
# Train a recipe on the hosts of a DeepSpeed hostfile (lines such as "node1 slots=8"), started over ssh:
#   HOSTFILE=hosts bash launchers/deepspeed_multinode.sh RECIPE [section.key=value ...] [--tiny]
# Repository, .venv, data and runs must lie at the same path on every host. MASTER_ADDR and MASTER_PORT may be given, and
# SSH, as in SSH="ssh -p 2222".
HOSTFILE=$(realpath "${HOSTFILE:?give the path of a hostfile, with lines such as \"node1 slots=8\"}") || exit 1
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup eval,prep
export PYTHONWARNINGS=ignore::FutureWarning
exec .venv/bin/python launchers/hostfile.py "$HOSTFILE" "$@"
