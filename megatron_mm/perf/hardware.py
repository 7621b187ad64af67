"""GPUs by name: their published peaks, and the shares of them that a prediction assumes.

Peaks are dense (without sparsity) and per GPU. Products in fp32 have the peak of fp32 outside the
tensor cores, since nothing here allows TF32; those in fp64 are taken to have the same. NVLink and
network are bytes per second in one direction: half of what data sheets give for both. GB are 10^9
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_mm.errors import ConfigError, unknown


@dataclass(frozen=True)
class GPU:
    """
    Attributes:
        bf16_flops: dense peak of the tensor cores.
        fp32_flops: peak outside them.
        memory: bytes.
        bandwidth: of the memory, bytes/s.
        nvlink, network: bytes/s each way.
        domain: GPUs that NVLink connects.
    """

    name: str
    bf16_flops: float
    fp32_flops: float
    memory: float
    bandwidth: float
    nvlink: float
    network: float
    domain: int
    source: str

    def peak(self, fp32: bool) -> float:
        """FLOP/s of products in fp32, or in bf16."""
        return self.fp32_flops if fp32 else self.bf16_flops


_HOPPER = "data sheet of the {}; network: DGX H100/H200 user guide, 400 Gb/s a GPU"
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("H100", 989.4e12, 67e12, 80e9, 3.35e12, 450e9, 50e9, 8, _HOPPER.format("H100 SXM")),
        GPU("H200", 989.4e12, 67e12, 141e9, 4.8e12, 450e9, 50e9, 8, _HOPPER.format("H200 SXM")),
        GPU(
            "B200",
            2.25e15,
            75e12,
            180e9,
            8.0e12,
            900e9,
            50e9,
            8,
            "data sheet of the DGX B200 (eight of them; 400 Gb/s a GPU); fp32: of the HGX B200, "
            "600 TFLOP/s for eight",
        ),
        GPU(
            "GB200",
            2.5e15,
            80e12,
            186e9,
            8.0e12,
            900e9,
            50e9,
            72,
            "data sheet of the GB200 NVL72 (72 of them; fp32 5,760 TFLOP/s; 400 Gb/s a GPU)",
        ),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """Shares of the published peaks that are reached. Assumed, not measured on a GPU.

    Attributes:
        compute: in matrix products and attention, of the peak of their precision.
        bandwidth: of the memory, by everything else, no two operations fused.
        links: of NVLink and network.
        launch: seconds of the host for one kernel. NVIDIA measured 3.8 us between launches in a row
            (developer.nvidia.com/blog/cuda-graphs); an operator of eager torch is said to take 5
            to 25.
        wait: seconds from the end of a kernel that the host waits for to its next launch. In the
            same measurement a synchronisation after each kernel costs 6 us more than none; Python
            and torch come on top.
        reserved: share of the memory that activations and state may not have: CUDA, NCCL's
            buffers, fragmentation.
    """

    compute: float = 0.6
    bandwidth: float = 0.8
    links: float = 0.75
    launch: float = 5e-6
    wait: float = 10e-6
    reserved: float = 0.1

    @classmethod
    def given(cls, words: Sequence[str]) -> Assumptions:
        """The assumptions with some of them replaced, each as NAME=NUMBER; raises ConfigError."""
        made = cls()
        for word in words:
            name, _, number = word.partition("=")
            if name not in vars(made):
                raise unknown("assumption", name, vars(made))
            try:
                made = replace(made, **{name: float(number)})
            except ValueError:
                raise ConfigError(f"assumption {word!r}; allowed: {name}=NUMBER") from None
        for name in ("compute", "bandwidth", "links"):
            if not 0 < getattr(made, name) <= 1:
                value = getattr(made, name)
                raise ConfigError(f"assumption {name} is {value:g}; allowed: above 0, at most 1")
        for name in ("launch", "wait", "reserved"):
            if not 0 <= getattr(made, name) < 1:
                value = getattr(made, name)
                raise ConfigError(f"assumption {name} is {value:g}; allowed: 0 or more, below 1")
        return made


def gpu(name: str) -> GPU:
    """Raises ConfigError with the names there are."""
    if name not in GPUS:
        raise unknown("GPU", name, GPUS)
    return GPUS[name]
