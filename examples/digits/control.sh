#!/usr/bin/env bash
# The demo's control: same data, seed and steps, but the language model cannot look again.
# Further arguments go to the trainer.
set -euo pipefail

export OUTPUT=runs/demo-control
exec bash "$(dirname "${BASH_SOURCE[0]}")/demo.sh" --vision-memory none "$@"
