#!/usr/bin/env bash
# After the demo: find which experts serve which skill, then reinforce right answers that go
# through them, and print accuracies before and after. Further arguments go to the trainer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

run=runs/demo
python=python
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

"$python" tools/discover_experts.py --checkpoint "$run/checkpoint" \
    --data "$run/data/mix.jsonl" --samples 2000 --out "$run/map.json"
"$python" -m torch.distributed.run --standalone --nproc-per-node 2 \
    -m megatron_mm.train --config examples/digits/arms/earl.yaml --load "$run/checkpoint" \
    --skill-map "$run/map.json" --output-dir "$run/earl" "$@"
"$python" tools/arms_table.py --before "$run" --after "$run/earl"
