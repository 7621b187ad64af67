"""Packaging. Tool settings live in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """Read as text: importing the package would need its requirements at build time."""
    text = (ROOT / "megatron_mm" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)


setup(
    name="megatron_mm",
    version=version(),
    description="Train Qwen3-Next fused with InternViT on megatron-core's parallel layers",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=find_packages(include=["megatron_mm", "megatron_mm.*"]),
    package_data={"megatron_mm.report": ["*.j2"], "megatron_mm.convert.remote": ["*.jinja"]},
    # Lower bounds only where an older version is known to lack something we call; upper
    # bounds where the next major or minor is expected to break us. NVIDIA's apex is not
    # here on purpose: the PyPI project of that name is an unrelated package, and
    # megatron-core runs without it.
    install_requires=[
        "megatron-core>=0.19.2,<0.20",
        "torch>=2.11",
        "transformers>=5.5,<6",
        "sentencepiece",
        "numpy",
        "pyarrow",  # parquet data
        "pillow",
        "pyyaml",
        "psutil",  # megatron-core's dist_checkpointing imports it without declaring it
        "tqdm",
        "tensorboard",
        "wandb>=0.31",  # finish_timeout
        "matplotlib",
        "jinja2",
        "scikit-learn",  # the scanned digits of the demo
        "scipy",
        "math-verify",  # the reward `math`
        "packaging",
    ],
    extras_require={
        # Transformer Engine's torch part is compiled against the torch that is installed, so it
        # is not here but a second command (megatron_mm/model/backends/README.md): pip would
        # build it in an environment of its own. CUDA 13 is what torch 2.11 from PyPI is built with.
        # TileLang computes a backward pass of flash-linear-attention that Triton 3.6, the one of
        # torch 2.11, gets wrong on Hopper.
        "cuda": [
            "transformer-engine[core_cu13]>=2.20,<3",
            "flash-linear-attention>=0.6",
            "tilelang[nvcc]>=0.1.15",
        ],
        "bench": ["trl==1.16.0"],  # what tools/benchmark.py rl and dpo compare steps with
        "dev": ["mypy", "pytest", "pytest-xdist", "ruff"],
    },
)
