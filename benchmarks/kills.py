"""What is left of runs that are killed at any step: hundreds of SIGKILLs over all methods, on tiny models (tests/kills.py).

    python benchmarks/kills.py [--kills 200 --seed 20261129]

Every killed run is run again until it finishes; its result must be that of an uninterrupted run to the byte, reports but for
times and memory, with nothing left beside it, in TMPDIR, or running. --out gets kills.json and kills.log; the table goes into
the section `kills` of --markdown. The exit status is 1 if a run failed.
"""

import argparse
import math
import os
import re
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

from sections import RESULTS, ROOT, describe, environment, keep  # noqa: E402

sys.path.insert(0, str(ROOT / "tests"))

import kills  # noqa: E402


def markdown(result: dict[str, Any]) -> str:
    """The section `kills`."""
    from lowbit.report import table

    rows = []
    for name in result["jobs"]:
        mine = [kill for kill in result["kills"] if kill["job"] == name]
        bad = sum(bool(kill["failures"]) for kill in mine)
        counted = [str(result["steps"].get(name, "-")), str(len(mine)), str(sum(kill["kills"] for kill in mine)), str(bad)]
        rows.append([name, *counted])
    total = sum(kill["kills"] for kill in result["kills"])
    failures = distinct(result["kills"])
    lines = [
        f"- Date: {result['date']}; {total} kills in {len(result['kills'])} runs, seed {result['seed']}, "
        f"{result['seconds'] / 60:.0f} minutes",
        *describe(result["environment"]),
        f"- CPU capability of torch: {result['capability']}",
        "",
        "Steps are those of an uninterrupted run at which it can be killed: files opened for writing, half written, flushed, "
        "renamed, removed, and batches read. Failed are runs whose result, run again, was another one, left something, or did "
        "not finish.",
        "",
        table(["command", "steps", "runs", "kills", "failed"], rows),
        "",
        f"{len(failures)} distinct failures, most frequent first:" if failures else "No failures.",
        "",
        *(f"- {line}" for line in failures),
    ]
    return "\n".join(lines)


def distinct(done: list[dict[str, Any]]) -> list[str]:
    """Failures that differ in more than numbers and names, most frequent first, each with one run."""
    found: dict[str, list[tuple[dict[str, Any], str]]] = {}
    for kill in done:
        for failure in kill["failures"]:
            key = re.sub(r"/\S+|\d+", "N", failure)[:60]
            found.setdefault(key, []).append((kill, failure))
    ordered = sorted(found.values(), key=len, reverse=True)
    return [
        f"{len(each)} x {each[0][1][:300]}: {each[0][0]['job']}, killed at {'; '.join(each[0][0]['steps'])}" for each in ordered
    ]


def main() -> int:
    """Kill, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=kills.SEED)
    parser.add_argument("--jobs", nargs="+", choices=list(kills.JOBS), default=list(kills.JOBS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--workers", type=int, default=1, help="processes that kill others (default 1)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "kills")
    parser.add_argument("--markdown", type=Path, default=RESULTS)
    args = parser.parse_args()
    import torch

    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    log = (args.out / "kills.log").open("a", encoding="utf-8")

    def say(kill: kills.Kill) -> None:
        told = f"{'; '.join(kill.steps)}: {'; '.join(kill.failures) or 'good'}"
        print(f"{kill.seconds:.1f} s {kill.job}: {told}", file=log, flush=True)

    with log, tempfile.TemporaryDirectory(prefix="lowbit-kills-") as root:
        done, steps = kills.run_side_by_side(
            Path(root), args.jobs, args.kills, seed=args.seed, until=began + args.seconds, workers=args.workers, say=say
        )
    result = {
        "date": date.today().isoformat(),
        "seed": args.seed,
        "seconds": time.monotonic() - began,
        "environment": environment(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "jobs": args.jobs,
        "steps": steps,
        "kills": done,
    }
    keep(result, args.out / "kills.json", markdown(result), page=args.markdown, name="kills")
    return 1 if any(kill["failures"] for kill in done) else 0


if __name__ == "__main__":
    sys.exit(main())
