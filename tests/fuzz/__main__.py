"""`make fuzz`: generated bad inputs for every loader and every option; a table of what came of them.

python -m tests.fuzz --count 2000                 all of it
python -m tests.fuzz --count 200 --only loaders
python -m tests.fuzz --replay "VAE file" flip 7   one input again, which stays in out/fuzz/case
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .campaign import run_all
from .commands import Commands
from .harness import UNCLEAR, Loaders, table, write_failures
from .subjects import SUBJECTS

OUT = Path(__file__).resolve().parents[2] / "out" / "fuzz"


def main() -> int:
    """Returns 1 if an input ended in a traceback, a silent wrong result, a hang, or took too much memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("loaders", "commands"))
    parser.add_argument("--replay", nargs=3, metavar=("SUBJECT", "KIND", "SEED"))
    args = parser.parse_args()
    if args.replay:
        name, kind, seed = args.replay
        print(Loaders(OUT, [name]).run(name, kind, int(seed)) if name in SUBJECTS else Commands(OUT).run(int(seed)))
        return 0
    outcomes = run_all(OUT, args.count, seed=args.seed, only=args.only, report=lambda text: print(text, flush=True))
    bad = write_failures(outcomes, OUT)
    for outcome in sorted(bad, key=lambda outcome: (outcome.owner, outcome.verdict)):
        print(f"{outcome.verdict}: {outcome.owner}: {outcome.subject}, {outcome.kind}, {outcome.seed}: {outcome.what}")
        print(f"    {outcome.said}")
    print(table(outcomes))
    unclear = sum(outcome.verdict == UNCLEAR for outcome in outcomes)
    print(f"{len(outcomes)} inputs, {len(bad)} failures in {OUT / 'failures.json'}, {unclear} unclear errors beside it")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
