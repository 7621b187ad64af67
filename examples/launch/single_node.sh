#!/usr/bin/env bash
# Trains on the GPUs of this machine: single_node.sh CONFIG [trainer flags]
set -euo pipefail
NNODES=1 exec "$(dirname "${BASH_SOURCE[0]}")/node.sh" "$@"
