"""A fake GPU: tensors that say `cuda:0`, computed on the CPU under CUDA's and NCCL's rules.

    from tools.fake_gpu import install

    gpu = install()  # before megatron and megatron_mm are imported
    with gpu.counting() as counts:
        ...
    counts.launches.total(), counts.waits.by("site")

README.md says what it sees and what it cannot.
"""

from tools.fake_gpu.counts import Counts, Event, Events
from tools.fake_gpu.install import install
from tools.fake_gpu.process import Gpu

__all__ = ["Counts", "Event", "Events", "Gpu", "install"]
