"""How lowbit takes damaged input: thousands of seeded cases, each in a process of its own with limits (tests/fuzz.py).

    python benchmarks/fuzz.py [--cases 5000 --seed 20261129]      # counts and distinct failures, into RESULTS.md
    python benchmarks/fuzz.py --case 1234                         # one case again, with what it printed

--out gets fuzz.json and fuzz.log, a line for each failure; the table goes into the section `fuzz` of --markdown. The exit
status is 1 if a case failed.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

from sections import RESULTS, ROOT, describe, environment, keep  # noqa: E402

sys.path.insert(0, str(ROOT / "tests"))

import fuzz  # noqa: E402

KINDS = ("ran", "clean", "bare", "traceback", "wrong", "stuck", "hang", "memory", "signal", "litter")


def markdown(result: dict[str, Any]) -> str:
    """The section `fuzz`."""
    from lowbit.report import table

    lines = [
        f"- Date: {result['date']}; {result['cases']:,} cases of seed {result['seed']}, {result['seconds'] / 60:.0f} minutes",
        *describe(result["environment"]),
        f"- CPU capability of torch: {result['capability']}",
        "",
        "Cases by what was damaged and by how they ended (tests/fuzz.py has the words); only ran and clean are right.",
        "",
    ]
    kinds = [kind for kind in KINDS if any(kind in row for row in result["kinds"].values())]
    rows = [[area, *(str(row.get(kind, 0)) for kind in kinds)] for area, row in sorted(result["kinds"].items())]
    rows.append(["all", *(str(sum(row.get(kind, 0) for row in result["kinds"].values())) for kind in kinds)])
    lines += [table(["damaged", *kinds], rows), ""]
    lines.append(f"{len(result['failures'])} distinct failures, most frequent first:" if result["failures"] else "No failures.")
    lines += ["", *(f"- {line}" for line in map(escaped, result["failures"]))]
    return "\n".join(lines)


def escaped(line: str) -> str:
    """A line of text as Markdown that shows it, in ASCII."""
    text = line.encode("ascii", "backslashreplace").decode()
    text = "".join(letter if letter.isprintable() or letter == "\n" else f"\\x{ord(letter):02x}" for letter in text)
    return text.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*").replace("\n", " ")[:420]


def main() -> int:
    """Run, count, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first (default 0)")
    parser.add_argument("--seed", type=int, default=fuzz.SEED)
    parser.add_argument("--case", type=int, help="run this one alone and tell everything")
    parser.add_argument("--area", choices=list(fuzz.AREAS), help="only cases of it")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after so many")
    parser.add_argument("--workers", type=int, default=1, help="processes that run cases (default 1)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--markdown", type=Path, default=RESULTS)
    args = parser.parse_args()
    import torch

    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lowbit-fuzz-") as root:
        materials = fuzz.Materials(Path(root))
        if args.case is not None:
            one = fuzz.case(materials, args.case, args.seed)
            verdict = fuzz.judged(one, materials, Path(root) / "case")
            print("\n".join(f"{key}: {value}" for key, value in asdict(verdict).items()))
            return 0 if verdict.kind in fuzz.GOOD else 1
        numbers = range(args.first, args.first + args.cases)
        chosen = [n for n in numbers if args.area in (None, fuzz.area(n, args.seed))]
        began = time.monotonic()
        with (args.out / "fuzz.log").open("a", encoding="utf-8", errors="backslashreplace") as log:

            def say(verdict: fuzz.Verdict) -> None:
                if verdict.kind not in fuzz.GOOD:
                    line = f"{verdict.number} {verdict.kind} [{verdict.where}] {verdict.story} -> {verdict.message[:200]!r}"
                    print(line, file=log, flush=True)
                if verdict.number % 100 == 99:
                    print(f"{verdict.number + 1} cases, {time.monotonic() - began:.0f} s", file=sys.stderr)

            count = fuzz.run_cases(materials, chosen, seed=args.seed, say=say, until=began + args.seconds, workers=args.workers)
    result = {
        "date": date.today().isoformat(),
        "cases": sum(sum(row.values()) for row in count.kinds.values()),
        "seed": args.seed,
        "seconds": time.monotonic() - began,
        "environment": environment(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kinds": count.kinds,
        "failures": count.lines(),
    }
    keep(result, args.out / "fuzz.json", markdown(result), page=args.markdown, name="fuzz")
    return 1 if count.failures else 0


if __name__ == "__main__":
    sys.exit(main())
