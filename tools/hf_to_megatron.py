"""Convert a Hugging Face folder to a megatron checkpoint; see megatron_mm/convert/commands."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_mm.convert.commands.hf_to_megatron import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
