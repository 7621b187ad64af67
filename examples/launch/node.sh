#!/usr/bin/env bash
# Runs one node's part of a job: checks all nodes together, then trains. Start it on every node:
#   examples/launch/node.sh CONFIG [trainer flags]
# Relative paths, in CONFIG and in flags too, begin at the folder in which it is started.
#
# NNODES          number of nodes (1)
# NPROC_PER_NODE  ranks per node (8)
# RDZV_ENDPOINT   HOST:PORT of one of the nodes; its agent holds the rendezvous
# RDZV_ID         name of the job, the same on all nodes (mm)
# RDZV_TIMEOUT    seconds within which all nodes must join (600)
# MAX_RESTARTS    restarts from the last checkpoint after a rank or node fails (3); a node that died
#                 must run this script again within RDZV_TIMEOUT
# NODE_ADDR       address of this node for the others (its host name)
# STOP_TIMEOUT    seconds that ranks have to save after a signal (30); slurm.sbatch and jobset.yaml
#                 give them their grace period
# SKIP_DOCTOR     if set, skips the checks; so does a node that comes back to a job that trains
#
# PYTORCH_ALLOC_CONF (expandable_segments:True), TRITON_CACHE_DIR (a folder in TMPDIR),
# OMP_NUM_THREADS (8) and CUDA_DEVICE_MAX_CONNECTIONS (1) are kept where they are set.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

config=${1:?usage: node.sh CONFIG [trainer flags]}
shift
python=${PYTHON:-python}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
# Plug-ins may lie in the folder of the start; a second checkout there must not replace this one.
export PYTHONPATH="$root:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # megatron-core: comm order
# Microbatches have lengths of their own: fixed segments of GPU memory would fall to pieces.
if [ -z "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then
    export PYTORCH_ALLOC_CONF=expandable_segments:True
fi
# On a disk of the node: in a shared home all ranks of a job would compile into one folder.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$(id -u)}"

nodes=${NNODES:-1}
endpoint=${RDZV_ENDPOINT:-localhost:0}
if [ "$nodes" -gt 1 ]; then : "${RDZV_ENDPOINT:?HOST:PORT of one of the nodes}"; fi
conf="join_timeout=${RDZV_TIMEOUT:-600}${RDZV_CONF:+,$RDZV_CONF}"
addresses() { # one of the two may be a name, the other its address
    echo "$1"
    { getent ahosts "$1" || true; } | cut -d " " -f 1 # an unknown name has none
}
if [ -n "${NODE_ADDR:-}" ]; then # torchrun cannot tell the host by name then
    host=$(sed 's/^\[\(.*\)\]$/\1/' <<<"${endpoint%:*}")
    # Not <(...): nobody waits for its process, which stays a zombie child of the agent.
    own=$(addresses "$NODE_ADDR")
    held=$(addresses "$host")
    if grep -qxF "$own" <<<"$held"; then
        conf+=",is_host=1"
    else
        conf+=",is_host=0"
    fi
fi
launch=(
    "$python" "$root/tools/launch.py" --nnodes "$nodes" --nproc-per-node "${NPROC_PER_NODE:-8}"
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" ${NODE_ADDR:+--local-addr "$NODE_ADDR"}
    --rdzv-conf "$conf"
)
id=${RDZV_ID:-mm}
skip=${SKIP_DOCTOR:-}
if [ -z "$skip" ] && [ "$nodes" -gt 1 ]; then # the others would not come to the checks again
    if "$python" -m megatron_mm.parallel.rendezvous "$endpoint" "$id"; then skip=1; fi
fi
if [ -z "$skip" ]; then
    "${launch[@]}" --rdzv-id "$id-doctor" "$root/tools/doctor.py" --config "$config" --resume "$@" &
    doctor=$!
    # The first process of a container would not end at a signal by itself, and train after it.
    trap 'kill "$doctor" 2>/dev/null; wait "$doctor"; exit 143' TERM INT HUP USR1
    wait "$doctor"
    trap - TERM INT HUP USR1
fi
# exec, so that signals reach the agent, which forwards them to the ranks.
exec "${launch[@]}" --rdzv-id "$id" --max-restarts "${MAX_RESTARTS:-3}" \
    -m megatron_mm.train --config "$config" --resume "$@"
