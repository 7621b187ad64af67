"""GPUs by name: their published peaks, and the shares of them that a prediction assumes.

Peaks are dense (without sparsity) and per GPU. NVLink and network are bytes per second in one
direction: half of what data sheets give for both. GB are 10^9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mm.errors import unknown


@dataclass(frozen=True)
class GPU:
    """
    Attributes:
        bf16_flops: dense peak of the tensor cores.
        memory: bytes.
        bandwidth: of the memory, bytes/s.
        nvlink, network: bytes/s each way.
        domain: GPUs that NVLink connects.
    """

    name: str
    bf16_flops: float
    memory: float
    bandwidth: float
    nvlink: float
    network: float
    domain: int
    source: str


_HOPPER = "data sheet of the {}; network: DGX H100/H200 user guide, 400 Gb/s a GPU"
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("H100", 989.4e12, 80e9, 3.35e12, 450e9, 50e9, 8, _HOPPER.format("H100 SXM")),
        GPU("H200", 989.4e12, 141e9, 4.8e12, 450e9, 50e9, 8, _HOPPER.format("H200 SXM")),
        GPU(
            "B200",
            2.25e15,
            180e9,
            8.0e12,
            900e9,
            50e9,
            8,
            "data sheet of the DGX B200 (eight of them; 400 Gb/s a GPU)",
        ),
        GPU(
            "GB200",
            2.5e15,
            186e9,
            8.0e12,
            900e9,
            50e9,
            72,
            "data sheet of the GB200 NVL72 (72 of them; 400 Gb/s a GPU)",
        ),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """Shares of the published peaks that are reached. Assumed, not measured on a GPU.

    Attributes:
        compute: of the tensor cores, in matrix products and attention.
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


def gpu(name: str) -> GPU:
    """Raises ConfigError with the names there are."""
    if name not in GPUS:
        raise unknown("GPU", name, GPUS)
    return GPUS[name]
