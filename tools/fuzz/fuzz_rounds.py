"""The process in which examples run: rounds of hypothesis, one line of JSON after each.

What an example is, its module knows (fuzz_op.py, fuzz_graph.py): `examples()`, a strategy, and `outcome(example)`,
which returns a word for the counts, or raises what is then a finding. It may also end the process.
"""

import collections
import faulthandler
import importlib
import json
import pathlib
import sys
import time
import traceback
from collections.abc import Callable

import hypothesis

EXAMPLES = 100  # of a round
_HANGS_AFTER = 300  # seconds; a busy machine compiles for XLA in a few


def run_round(
    examples: hypothesis.strategies.SearchStrategy, outcome: Callable, seed: int, current: pathlib.Path
) -> dict:
    """Returns counts by outcome, and the finding, shrunk, or None. The file always holds the example that runs."""
    counts: collections.Counter[str] = collections.Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(examples)
    def every(example: object) -> None:
        current.write_text(repr(example), encoding="utf-8")
        faulthandler.dump_traceback_later(_HANGS_AFTER, exit=True)
        counts[outcome(example)] += 1

    finding = None
    try:
        every()
    except Exception as error:
        # What ran last is the smallest example: hypothesis shows it once more.
        finding = {"example": current.read_text(encoding="utf-8"), "error": "".join(traceback.format_exception(error))}
    faulthandler.cancel_dump_traceback_later()
    return {"seed": seed, "counts": counts, "finding": finding}


def main(target: str, seed: str, seconds: str, current: str) -> None:
    module = importlib.import_module(f"fuzz.fuzz_{target}")
    faulthandler.enable()
    start, number, finding = time.monotonic(), int(seed), None
    while finding is None and (number == int(seed) or time.monotonic() < start + float(seconds)):
        message = run_round(module.examples(), module.outcome, number, pathlib.Path(current))
        finding = message["finding"]
        number += 1
        print(json.dumps(message | {"seconds": time.monotonic() - start}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
