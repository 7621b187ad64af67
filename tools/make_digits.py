"""Write the digit-scene data set; see examples/digits/make_digits.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.digits.make_digits import main  # noqa: E402

if __name__ == "__main__":
    main(sys.argv[1:])
