#!/usr/bin/env bash
# Train a recipe on all local GPUs, or on two CPU ranks where there are none:
#   bash launchers/local.sh RECIPE [section.key=value ...] [--tiny]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
setup eval,prep
run_training "$@"
