"""Lists what a run would use on this machine and what is missing.

    python tools/doctor.py
    torchrun ... tools/doctor.py [--config FILE and any trainer flag]

Under torchrun it also compares software, settings and clocks of all ranks, and checks the bandwidth
between them and room for a checkpoint (ranks.py).

The exit code is 0 if a run can start with default settings, else 1. Half-installed packages do not
stop it: packages that fail to load are named, with the remedy.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import socket
import sys
import warnings
from dataclasses import dataclass

from megatron_mm import cli
from megatron_mm.errors import ConfigError

CUDA_EXTRA = "pip install -e '.[cuda]'"
TE_REMEDY = f"{CUDA_EXTRA}, then pip install --no-build-isolation 'transformer-engine[pytorch]'"


@dataclass(frozen=True)
class Finding:
    """Line of the output."""

    name: str
    text: str
    ok: bool = True
    needed: bool = False  # without it no run starts

    def __str__(self) -> str:
        mark = "ok" if self.ok else "MISSING" if self.needed else "-"
        return f"{self.name:<20}{mark:<9}{self.text}"


def _version(*names: str) -> str | None:
    """Version of the first of some distributions that is installed; None if none is."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _load_error(module: str) -> str | None:
    """Returns why a module does not load, in one line; None if it does."""
    try:
        importlib.import_module(module)
    # A package that loads its libraries may raise anything, not only ImportError.
    except Exception as error:
        return _short(error)
    return None


def _short(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}"


def python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info >= (3, 12)
    return Finding("python", found if ok else f"{found}; install Python 3.12", ok, True)


def torch_and_gpu() -> list[Finding]:
    error = _load_error("torch")
    if error:
        missing = Finding("torch", f"{error}; pip install -e . -c constraints.txt", False, True)
        return [missing, Finding("gpu", "unknown without torch", False)]
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    lines = [Finding("torch", f"{torch.__version__}, built {built}")]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        text = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, sm_{major}{minor}"
        lines.append(Finding("gpu", text))
    else:
        lines.append(Finding("gpu", "none; runs use the CPU", False))
    import torch.distributed as dist

    if not dist.is_available():
        lines.append(Finding("gloo", "torch is built without distributed", False, True))
        return lines
    lines.append(Finding("gloo", "for the CPU, and for small messages", dist.is_gloo_available(),
                         True))  # fmt: skip
    nccl = dist.is_nccl_available()
    needed = torch.cuda.is_available()
    lines.append(Finding("nccl", "between GPUs" if nccl else "not in this torch", nccl, needed))
    return lines


def transformer_engine() -> Finding:
    name = "transformer-engine"
    version = _version("transformer-engine", "transformer_engine")
    if version is None and importlib.util.find_spec("transformer_engine") is None:
        return Finding(name, f"not installed; on a machine with CUDA: {TE_REMEDY}", False)
    error = _load_error("transformer_engine.pytorch")
    if error:
        text = (
            f"{version or 'files without a version'} does not load ({error}); "
            f"pip uninstall transformer-engine, or on a machine with CUDA: {TE_REMEDY}"
        )
        return Finding(name, text, False)
    import torch

    if not torch.cuda.is_available():
        text = f"{version} without a GPU: megatron-core takes its Adam, which needs CUDA; remove it"
        return Finding(name, text, False, True)
    return Finding(name, f"{version}; FP8 on this device: {_fp8_recipes()}")


def _fp8_recipes() -> str:
    import transformer_engine.pytorch as te

    able = []
    for recipe, check in (
        ("tensorwise, delayed", te.is_fp8_available),
        ("blockwise", te.is_fp8_block_scaling_available),
        ("mxfp8", te.is_mxfp8_available),
    ):
        able += [recipe] if check() else []
    return ", ".join(able) or "none, the hardware is too old"


def megatron_core() -> Finding:
    name, found = "megatron-core", _version("megatron-core")
    if found is None:
        return Finding(name, "not installed; pip install -e . -c constraints.txt", False, True)
    with contextlib.suppress(Exception):  # importing megatron-core says it again
        from megatron_mm import platform

        platform.install()  # before the import, as a run does
    error = _load_error("megatron.core")
    if error:
        # FileNotFoundError: a half-installed Transformer Engine; upstream catches ImportError.
        broken = "FileNotFoundError" in error
        hint = "see transformer-engine" if broken else "pip install -e . -c constraints.txt"
        return Finding(name, f"{found} does not load ({error}); {hint}", False, True)
    from megatron_mm.platform import MEGATRON_CORE_VERSION as wanted

    if found == wanted:
        return Finding(name, f"{found}, the one platform.py was written for")
    import torch

    # Without CUDA platform.py rejects other versions; with CUDA it redirects nothing.
    text = f"{found}, platform.py was written for {wanted}: pip install megatron-core=={wanted}"
    return Finding(name, text, torch.cuda.is_available(), True)


def optional(
    name: str, module: str, used: str, remedy: str, distribution: str | None = None
) -> Finding:
    if importlib.util.find_spec(module) is None:
        return Finding(name, f"not installed; {remedy}", False)
    error = _load_error(module)
    if error:
        return Finding(name, f"does not load ({error}); {remedy}", False)
    return Finding(name, f"{_version(distribution or name) or 'version unknown'}; {used}")


def fused_packages(has_gpu: bool) -> list[Finding]:
    on_cuda = f"on a machine with CUDA: {CUDA_EXTRA}"
    fla = optional("fla", "fla", "the delta rule", on_cuda, "flash-linear-attention")
    if fla.ok and not has_gpu:
        # transformers calls its kernels wherever it is installed.
        fla = Finding("fla", f"{fla.text.split(';')[0]} without a GPU: remove it", False)
    elif fla.ok:
        from megatron_mm.model.backends.fla_here import missing_fla

        if (problem := missing_fla()) is not None:
            fla = Finding("fla", problem, False)
    own = "FLA brings its own convolution"
    build = (
        "not on PyPI (the apex there is another package): build github.com/NVIDIA/apex with "
        "--cpp_ext --cuda_ext"
    )
    adam = "megatron-core takes its Adam where Transformer Engine has none"
    attention = "Transformer Engine may choose it"
    return [
        fla,
        optional("causal-conv1d", "causal_conv1d", f"not used: {own}", f"not needed: {own}"),
        optional("apex", "apex", adam, build),
        optional("flash-attn", "flash_attn", attention, "not needed: cuDNN has attention too"),
    ]


def used(findings: dict[str, Finding], has_gpu: bool) -> list[Finding]:
    """Lists the implementations a run would use, by default and by choice."""
    te, fla, apex = (findings[name].ok for name in ("transformer-engine", "fla", "apex"))
    other = " (or --transformer-impl transformer_engine)" if te and has_gpu else ""
    adam = "Transformer Engine's" if te else "apex's" if apex else "torch's"
    delta = "FLA's Triton kernel" if fla and has_gpu else "ours in torch"
    packed = "torch's varlen_attn in 16 bits from Ampere on, else " if has_gpu else "torch's "
    slow = has_gpu and not fla
    if slow:
        delta += ", the slower one: install fla; a run says what it costs"
    return [
        Finding("-> linear", f"megatron-core's in torch{other}"),
        Finding("-> attention", f"{packed}scaled_dot_product_attention{other}"),
        Finding("-> experts", f"ours in torch{other}"),
        Finding("-> gated delta rule", delta, not slow),
        Finding("-> optimizer", f"{adam} Adam"),
    ]


def a_run_loads() -> Finding:
    """Imports what a run imports, with platform.py's redirects in place."""
    try:
        from megatron_mm import platform

        platform.install()
    except Exception as problem:  # a half-installed megatron-core may raise anything
        return Finding("a run", f"cannot start: {_short(problem)}", False, True)
    error = _load_error("megatron_mm.train.loop")
    text = f"cannot start: {error}" if error else "can start with default settings"
    return Finding("a run", text, error is None, True)


def examine() -> list[Finding]:
    """Examines this machine."""
    lines = [python(), *torch_and_gpu()]
    has_gpu = next(line.ok for line in lines if line.name == "gpu")
    lines += [megatron_core(), transformer_engine(), *fused_packages(has_gpu)]
    lines += used({line.name: line for line in lines}, has_gpu)
    return [*lines, a_run_loads()]


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 if a run can start, 1 if not, 2 for settings without torchrun."""
    cli.setup_logging(cli.rank())
    warnings.simplefilter("ignore")
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    if {"-h", "--help"} & {*argv}:
        cli.say((__doc__ or "").strip())
        return 0
    if argv and not launched:
        return cli.fail(ConfigError("settings are compared between ranks: start it with torchrun"))
    logging.disable(logging.ERROR)  # what packages say while they load
    lines = examine()
    logging.disable(logging.NOTSET)
    able = all(line.ok for line in lines if line.needed)
    if not launched or os.environ["LOCAL_RANK"] == "0":
        where = f"{socket.gethostname()}: " if launched else ""
        for line in lines:
            if not launched or not able or os.environ["RANK"] == "0":
                cli.say(f"{where}{line}")
    if not launched or not able:
        return int(not able)
    from megatron_mm.doctor import ranks

    return ranks.main(argv, lambda name, text, ok: cli.say(Finding(name, text, ok, True)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
