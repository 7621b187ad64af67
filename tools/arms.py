"""Compare arms on the digit scenes; see examples/digits/compare_arms.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.digits.compare_arms import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
