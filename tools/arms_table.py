"""Print the table of tools/arms.py; see examples/digits/arms_table.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.digits.arms_table import main  # noqa: E402

if __name__ == "__main__":
    main(sys.argv[1:])
