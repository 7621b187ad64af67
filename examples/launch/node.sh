#!/usr/bin/env bash
# One node's part of a job: check the nodes together, then train. The same on every node:
#   examples/launch/node.sh CONFIG [trainer flags]
#
# NNODES          nodes of the job (1)
# NPROC_PER_NODE  ranks of a node (8)
# RDZV_ENDPOINT   HOST:PORT of one of the nodes; its agent holds the rendezvous
# RDZV_ID         name of the job, equal on its nodes (mm)
# RDZV_TIMEOUT    seconds until all nodes must be there (600)
# MAX_RESTARTS    how often the job starts again from its last checkpoint when a rank or a node
#                 fails (3); a node that died has to run this script again within RDZV_TIMEOUT
# NODE_ADDR       this node's address for the others (its host name)
# SKIP_DOCTOR     if set, no checks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

config=${1:?usage: node.sh CONFIG [trainer flags]}
shift
python=${PYTHON:-python}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # megatron-core: comm order

nodes=${NNODES:-1}
endpoint=${RDZV_ENDPOINT:-localhost:0}
if [ "$nodes" -gt 1 ]; then : "${RDZV_ENDPOINT:?HOST:PORT of one of the nodes}"; fi
conf="join_timeout=${RDZV_TIMEOUT:-600}${RDZV_CONF:+,$RDZV_CONF}"
if [ -n "${NODE_ADDR:-}" ]; then # the host name says nothing then
    if [ "$NODE_ADDR" = "${endpoint%:*}" ]; then conf+=",is_host=1"; else conf+=",is_host=0"; fi
fi
launch=(
    "$python" tools/launch.py --nnodes "$nodes" --nproc-per-node "${NPROC_PER_NODE:-8}"
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" ${NODE_ADDR:+--local-addr "$NODE_ADDR"}
    --rdzv-conf "$conf"
)
id=${RDZV_ID:-mm}
if [ -z "${SKIP_DOCTOR:-}" ]; then
    "${launch[@]}" --rdzv-id "$id-doctor" tools/doctor.py --config "$config" "$@"
fi
# exec: a signal for this script is one for the agent, which hands it to the ranks.
exec "${launch[@]}" --rdzv-id "$id" --max-restarts "${MAX_RESTARTS:-3}" \
    -m megatron_mm.train --config "$config" --resume "$@"
