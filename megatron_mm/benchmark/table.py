"""Formats a throughput result as text."""

from __future__ import annotations

from typing import Any


def text(result: dict[str, Any]) -> str:
    """Returns a paragraph for each side, with its phases by time on the slowest rank."""
    rank = result["units"]["rank"]
    peak = result["gemm_flops_per_second_per_rank"] / 1e12
    memory = ", ".join(
        f"{name.removesuffix('_bytes').replace('_', ' ')} {value / 2**30:.2f} GiB"
        for name, value in result["memory"].items()
    )
    lines = [f"{result['layout']['world_size']} x {rank}, {peak:.3g} TFLOP/s each in a GEMM"]
    lines.append(f"memory of the rank that needs most: {memory}")
    for name, side in result["sides"].items():
        seconds, (low, high) = side["seconds"]["median"], side["seconds"]["quartiles"]
        speed = side["tokens_per_second"]
        lines += [
            "",
            f"{name}: {speed['median']:,.4g} tokens/s "
            f"({speed['quartiles'][0]:,.4g} to {speed['quartiles'][1]:,.4g}), "
            f"{side['samples_per_second']['median']:,.4g} samples/s, "
            f"{side['tokens_per_second_per_rank']:,.4g} tokens/s/{rank}",
            f"  {side['model_tflops_per_second_per_rank']:.4g} model TFLOP/s/{rank}, "
            f"MFU {100 * side['mfu']:.1f} % of the GEMM",
            f"  a step {seconds:.4g} s ({low:.4g} to {high:.4g}, {side['rounds']} rounds), of it:",
        ]
        phases = sorted(side["phases"].items(), key=lambda item: -item[1]["most"])
        for phase, entry in phases:
            sent = f", {entry['bytes'] / 2**20:,.2f} MiB sent" if entry.get("bytes") else ""
            share = 100 * entry["seconds"] / side["seconds"]["mean"]
            lines.append(
                f"    {phase:<24}{entry['seconds']:>10.4f} s {share:>5.1f} %, "
                f"at most {entry['most']:.4f}{sent}"
            )
        for part, value in side["rollout_seconds"].items():
            lines.append(f"    (rollout's own clock) {part:<12}{value:.4f} s")
    return "\n".join(lines)
