"""Prints launches and host waits a layer: `python -m tools.fake_gpu.count`, with the number of a
rank's experts behind it (32)."""

from __future__ import annotations

import sys

from tools.fake_gpu.install import install


def main(words: list[str]) -> None:
    gpu = install()
    from tools.fake_gpu.measure import alone, measure, measured_run, table

    run = measured_run(experts=int(words[0])) if words else measured_run()
    found = measure(gpu, run, alone(run))
    print(table(found))
    print("\nwaits of a microbatch, its gradient norm and update, and of a step of decoding:")
    for where in (found.training.waits, found.norm.waits, found.update.waits):
        for (reason, site), times in where.by("what", "site").most_common():
            print(f"{times:8d}  {reason}  {site}")
    for (reason, site), often in found.decoding_sites.most_common():
        print(f"{often:8.1f}  {reason}  {site}  (decoding)")


if __name__ == "__main__":
    main(sys.argv[1:])
