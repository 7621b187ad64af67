#!/usr/bin/env bash
# Make the digit scenes, train the small model on two CPU processes, evaluate and report.
# Further arguments go to the trainer, e.g. `demo.sh --train-iters 50`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

output=${OUTPUT:-runs/demo}
data=runs/demo/data # also read by the control, so both see the same scenes

python=python
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
# Two ranks on a small machine: one thread each, or they fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Written next to its final place and then renamed, so an interrupted run is not mistaken
# for finished data.
if [ ! -d "$data" ]; then
    rm -rf "$data.partial"
    mkdir -p "$(dirname "$data")"
    "$python" tools/make_digits.py --out "$data.partial" --jitter 1
    mv "$data.partial" "$data"
fi

# The long form of `torchrun`, which needs no script on PATH.
"$python" -m torch.distributed.run --standalone --nproc-per-node 2 \
    -m megatron_mm.train --config examples/digits/demo.yaml --output-dir "$output" \
    --save "$output/checkpoint" "$@"
