#!/usr/bin/env bash
# Trains on several machines that are reachable by ssh and share this repository's folder and the
# folder in which it is started, where relative paths begin:
#   NODES="a b c d" examples/launch/multi_node.sh examples/mm-80b.yaml [trainer flags]
# With a scheduler, use slurm.sbatch or jobset.yaml instead. A failed node rejoins if node.sh is
# started there by hand with the same variables.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -ra nodes <<<"${NODES:?the hosts, separated by spaces; the first holds the rendezvous}"

words=$(printf ' %q' "$launch/node.sh" "$@")
variables="NNODES=${#nodes[@]} RDZV_ENDPOINT=${nodes[0]#*@}:${PORT:-29500} RDZV_ID=mm-$$"
# And what the libraries read; no tokens, which ssh's command line would show.
read -ra more < <(compgen -e | grep -E '^(NCCL|GLOO|TORCH|CUDA|NVTE|UCX|FI|WANDB)_' |
    grep -vx WANDB_API_KEY | tr '\n' ' ') || true
for name in NPROC_PER_NODE RDZV_TIMEOUT RDZV_CONF MAX_RESTARTS STOP_TIMEOUT SKIP_DOCTOR PYTHON \
    OMP_NUM_THREADS PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF TRITON_CACHE_DIR LD_LIBRARY_PATH \
    PYTHONPATH TMPDIR HF_HOME HF_HUB_OFFLINE "${more[@]}"; do
    if [ -n "${!name:-}" ]; then variables+=$(printf ' %s=%q' "$name" "${!name}"); fi
done
children=()
# With a terminal (-tt), a node's script ends when its connection does.
trap 'kill "${children[@]}" 2>/dev/null || true' EXIT
for node in "${nodes[@]}"; do
    ${SSH:-ssh -tt -o BatchMode=yes} "$node" "cd $(printf %q "$PWD") && $variables$words" </dev/null &
    children+=($!)
done
failed=0
for child in "${children[@]}"; do wait "$child" || failed=1; done
exit "$failed"
