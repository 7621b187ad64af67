#!/usr/bin/env bash
# After the demo: find which experts serve which skill, give every skill experts of its own, then
# reinforce right answers where only a skill's own experts learn, and print what this did to the
# questions that were asked for and to the others. Further arguments go to the reinforcement.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

run=runs/demo
python=python
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
launch=("$python" -m torch.distributed.run --standalone --nproc-per-node 2)

"${launch[@]}" tools/discover_experts.py --checkpoint "$run/checkpoint" \
    --data "$run/data/mix.jsonl" --samples 500 --out "$run/map.json"
"${launch[@]}" -m megatron_mm.train --config examples/digits/arms/align.yaml \
    --load "$run/checkpoint" --skill-map "$run/map.json" --train-iters 200 \
    --valid-data none --no-report --output-dir "$run/aligned" --save "$run/aligned/checkpoint"
"${launch[@]}" -m megatron_mm.train --config examples/digits/arms/grpo_scope.yaml \
    --load "$run/aligned/checkpoint" --skill-map "$run/map.json" --output-dir "$run/earl" "$@"
"$python" tools/arms_table.py --before "$run" --after "$run/earl"
