"""A reward function whose module cannot be imported a second time, or takes for ever."""

import os
import time
from pathlib import Path

_SEAL = Path(os.environ["SEAL"])

if _SEAL.exists():
    os._exit(9)
if _SEAL.name == "slow":
    time.sleep(600)


def last_time(completions, **columns):
    """Ends this worker and keeps any other from starting."""
    _SEAL.touch()
    os._exit(5)
