"""Fuzzing: `fuzz.py op` calls tf_agc.agc with whatever may come, `fuzz.py graph` imports graphs that nobody built.

Options, progress and the report. The examples run in a process of their own, fuzz_rounds.py, because one of them may
end it; what they are, and what is expected of them, is in fuzz_op.py and fuzz_graph.py. No TensorFlow here.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

import rich.console
import rich.progress

from option_types import not_negative

TOOLS = pathlib.Path(__file__).resolve().parents[1]


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=["op", "graph"])
    parser.add_argument("--minutes", type=not_negative, default=1.0, help="0 is one round (default: 1)")
    parser.add_argument("--seed", type=int, help="of the first round; the next one has the next (default: any)")
    return parser.parse_args(arguments)


def fuzz(target: str, minutes: float, seed: int) -> int:
    """Runs rounds until the time is over or something is found, and prints what came out.

    Returns:
        The exit status: 1 where something was found, 130 where it was interrupted.
    """
    counts: collections.Counter[str] = collections.Counter()
    rounds, finding, interrupted = 0, None, False
    with (
        tempfile.TemporaryDirectory() as directory,
        rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TimeElapsedColumn(),
            console=rich.console.Console(stderr=True),
        ) as progress,
    ):
        current, log = pathlib.Path(directory) / "example", pathlib.Path(directory) / "log"
        command = [sys.executable, str(TOOLS), "fuzz.fuzz_rounds", target, str(seed), str(60 * minutes), str(current)]
        environment = {"TF_CPP_MIN_LOG_LEVEL": "2"} | os.environ | {"HYPOTHESIS_STORAGE_DIRECTORY": directory}
        bar = progress.add_task(target, total=max(minutes, 1e-9))
        with (
            log.open("w", encoding="utf-8") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
        ):
            assert process.stdout
            try:
                for line in process.stdout:
                    message = json.loads(line)
                    rounds += 1
                    counts.update(message["counts"])
                    finding = message["finding"]
                    examples = f"{target}: seed {message['seed']}, {sum(counts.values())} examples"
                    progress.update(bar, description=examples, completed=min(minutes, message["seconds"] / 60))
            except KeyboardInterrupt:
                interrupted = True
                process.kill()
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0 and not interrupted:
            running = current.read_text(encoding="utf-8") if current.exists() else "none yet"
            rounds += 1
            tail = log.read_text(encoding="utf-8", errors="replace")[-6000:]
            finding = {"example": running, "error": f"exit status {process.returncode}\n{tail}"}

    last = seed + max(rounds, 1) - 1
    print(f"{target}: {rounds} rounds, seeds {seed} to {last}, {sum(counts.values())} examples")
    for outcome, number in sorted(counts.items()):
        print(f"{number:8d}  {outcome}")
    if finding is None:
        print("Interrupted, no finding." if interrupted else "No finding.")
        return 130 if interrupted else 0
    print(f"FINDING, seed {last}: python tools fuzz.fuzz {target} --seed {last} --minutes 0")
    print(f"{finding['example']}\n{finding['error']}")
    return 1


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    seed = random.randrange(2**31) if options.seed is None else options.seed
    sys.exit(fuzz(options.target, options.minutes, seed))


if __name__ == "__main__":
    main()
