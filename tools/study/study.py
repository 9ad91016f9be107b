"""The training study: `run` trains and evaluates, `table` and `plot` show it, `memory` finds the largest batches.

Who calls whom: `run` makes the plan here and starts study_training.py, a fresh process of one thread for each run, as
many at once as there are cores; it trains with the demo's recipe (training_recipe.py) on splits that it gets as files.
study_results.py keeps what comes back, study_report.py shows it. `memory` is study_memory.py, which has bench_model.py
measure batch after batch.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

from benchmarks import result_files
from option_types import at_least
from study.study_results import Cell, CurvePoint, LayerRecord, Results, Run, StudyError, read_rows

# Read when TensorFlow is imported: of its log only errors are news here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

TOOLS = pathlib.Path(__file__).resolve().parents[1]
CACHE = TOOLS.parent / ".cache"
NETWORKS = ("plain", "resnet20_pre", "resnet20_post")
NORMALIZATIONS = (
    *("agc", "agc_alone", "batch_norm", "batch_norm_standardized", "group_norm", "group_norm_standardized", "none"),
    *("agc_plain_kernels", "agc_mean_scale_1", "agc_no_mean", "agc_no_bias", "agc_no_branch_factor"),
)
COMPARED = NORMALIZATIONS[:7]
MAIN = ("agc", "batch_norm", "batch_norm_standardized")
ABLATION = ("agc", *NORMALIZATIONS[7:])
SEARCH_SEED = 1000  # of no run that is reported
SEARCH_EPOCHS = 1
# By the batch size, for a batch of 128: at smaller ones proportional to the batch, and further up, as no rule would be
# fair to all methods. The best one must not be the last of them.
LEARNING_RATES = {
    128: (0.05, 0.15, 0.3, 0.6),
    8: (0.15, 0.6, 2.4),
    2: (0.15, 0.6, 2.4, 9.6),
    1: (0.15, 0.6, 2.4, 9.6),
}
# Small batches leave a second thread without work: two runs side by side take little longer than one.
RUNS_AT_ONCE = len(os.sched_getaffinity(0))
_STARTING_SECONDS = 12
_EVALUATED_IN_STEPS = 0.35  # of an image's time in training
# A step of AGC on one core with AVX2: milliseconds for itself, and for each image of 32 x 32.
_STEP_MS = {"plain": (1.7, 1.5), "resnet20_pre": (8.0, 5.3), "resnet20_post": (8.0, 6.6)}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Methods that are compared in one network at one batch size.

    Attributes:
        network: a name in NETWORKS.
        batch_size: images in a step.
        epochs: of every run.
        seeds: of every method.
        normalizations: the methods, in the order of the runs.
    """

    network: str
    batch_size: int
    epochs: int
    seeds: int
    normalizations: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A matrix of runs.

    Attributes:
        dataset: as in image_datasets.load.
        comparisons: the most informative ones first.
        search_epochs: of every run in the search for the learning rate.
        augment: whether images are shifted and mirrored at random.
        precision: as in study_training.Job.
    """

    dataset: str
    comparisons: tuple[Comparison, ...]
    search_epochs: int
    augment: bool
    precision: str

    def _cell(self, split: str, comparison: Comparison, method: str, seed: int, rate: float, epochs: int) -> Cell:
        place = (comparison.network, method, self.precision, comparison.batch_size)
        return Cell(self.dataset, split, *place, seed, rate, epochs)

    def _search(self, comparison: Comparison, method: str, rate: float) -> Cell:
        return self._cell("validation", comparison, method, SEARCH_SEED, rate, self.search_epochs)

    def search(self) -> list[Cell]:
        """Every method with every learning rate in every network at every batch size, on the validation split."""
        cells = [
            self._search(comparison, method, rate)
            for comparison in self.comparisons
            for rate in learning_rates(comparison.batch_size)
            for method in comparison.normalizations
        ]
        return list(dict.fromkeys(cells))

    def comparison(self, best_learning_rate: Callable[[Cell], float]) -> list[Cell]:
        """Every method at the learning rate that was best for it, every comparison once before second seeds."""
        cells = []
        for seed in range(max(comparison.seeds for comparison in self.comparisons)):
            for comparison in self.comparisons:
                for method in comparison.normalizations if seed < comparison.seeds else ():
                    rate = best_learning_rate(self._search(comparison, method, 0.0))
                    cells.append(self._cell("test", comparison, method, seed, rate, comparison.epochs))
        return list(dict.fromkeys(cells))


_RESNETS = ("resnet20_pre", "resnet20_post")
FULL = Plan(
    dataset="cifar10",
    comparisons=(
        *(Comparison(network, 128, 8, 3, MAIN) for network in _RESNETS),
        *(Comparison("plain", batch, 2, 3, COMPARED) for batch in (128, 2, 1, 8)),
        *(Comparison(network, batch, 2, 3, ("agc", "batch_norm")) for batch in (2, 8) for network in _RESNETS),
        *(Comparison(network, 128, 8, 1, COMPARED) for network in _RESNETS),
        *(Comparison(network, 128, 40, 1, ("agc", "batch_norm")) for network in _RESNETS),
        Comparison("resnet20_pre", 128, 4, 2, ABLATION),
    ),
    search_epochs=SEARCH_EPOCHS,
    augment=True,
    precision="mixed_bfloat16",
)
QUICK = Plan(
    dataset="digits",
    comparisons=tuple(Comparison("plain", batch, 4, 1, COMPARED) for batch in (128, 2, 8)),
    search_epochs=4,
    augment=False,
    precision="float32",
)


def learning_rates(batch_size: int) -> list[float]:
    """The rates that are tried."""
    return [float(f"{rate * batch_size / 128:.6g}") for rate in LEARNING_RATES[batch_size]]  # as the files have it


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    run = commands.add_parser("run", help="train what is not trained yet; stop it whenever you like, and go on later")
    run.add_argument("--search", action="store_true", help="search the learning rates, which the comparison needs")
    run.add_argument("--quick", action="store_true", help="digits, the plain network, one seed")
    run.add_argument("--estimate", action="store_true", help="print the plan and its hours, train nothing")
    run.add_argument(
        "--dataset",
        choices=["cifar10", "fashion_mnist"],
        help="(default: cifar10; the other one is read "
        "from Debian's package dataset-fashion-mnist, where it is installed)",
    )
    run.add_argument("--network", choices=NETWORKS, help="only this one")
    run.add_argument("--batch_size", type=int, help="only this one")
    run.add_argument("--normalization", choices=NORMALIZATIONS, nargs="+", help="only these")
    run.add_argument("--epochs", type=at_least(1), help="only the comparisons over so many")
    run.add_argument("--seeds", type=at_least(1), help="at most so many of each run")
    run.add_argument("--precision", choices=["float32", "mixed_bfloat16"], help="(default: mixed_bfloat16)")
    run.add_argument("--data_dir", type=pathlib.Path, default=CACHE / "tensorflow_datasets", help="as in demo.py")
    run.add_argument("--work_dir", type=pathlib.Path, default=CACHE / "study", help="checkpoints and copies of splits")
    run.set_defaults(call=run_plan)

    table = commands.add_parser("table", help="Markdown tables of all results")
    table.set_defaults(call=print_tables)
    plot = commands.add_parser("plot", help="PNG files beside the results")
    plot.set_defaults(call=draw_plots)
    limit = commands.add_parser("memory", help="the largest batches whose training fits a limit, by bisection")
    limit.add_argument("--network", choices=NETWORKS, help="only this one")
    limit.add_argument("--limit_mib", type=at_least(1), default=2048, help="peak resident memory (default: 2048)")
    limit.set_defaults(call=find_largest_batches)
    for command in (run, table, plot, limit):
        command.add_argument(
            "--results_dir", type=pathlib.Path, help="(default: tools/study/results; of --quick, .cache/study/quick)"
        )
    return parser.parse_args(arguments)


def _results_dir(options: argparse.Namespace) -> pathlib.Path:
    quick = getattr(options, "quick", False)
    return options.results_dir or (CACHE / "study" / "quick" if quick else TOOLS / "study" / "results")


def plan_of(options: argparse.Namespace) -> Plan:
    plan = QUICK if options.quick else FULL
    if options.quick and (options.dataset or options.network not in (None, "plain")):
        raise StudyError("--quick is the plain network on digits: leave --dataset and --network out")
    wanted = {"network": options.network, "batch_size": options.batch_size, "epochs": options.epochs}
    comparisons = []
    for comparison in plan.comparisons:
        if any(value not in (None, getattr(comparison, name)) for name, value in wanted.items()):
            continue
        methods = tuple(
            method for method in comparison.normalizations if method in (options.normalization or NORMALIZATIONS)
        )
        seeds = min(comparison.seeds, options.seeds or comparison.seeds)
        if methods:
            comparisons.append(dataclasses.replace(comparison, normalizations=methods, seeds=seeds))
    if not comparisons:
        planned = "; ".join(
            f"{each.network} at a batch of {each.batch_size} over {each.epochs} epochs" for each in plan.comparisons
        )
        raise StudyError(f"nothing of the plan is left by these options. It has {planned}")
    return dataclasses.replace(
        plan,
        dataset=options.dataset or plan.dataset,
        comparisons=tuple(comparisons),
        precision=options.precision or plan.precision,
    )


def _unfinished(options: argparse.Namespace) -> tuple[Results, list[Cell], int]:
    """The results so far, the runs still to do, and how many are finished."""
    plan, results = plan_of(options), Results(_results_dir(options))

    def best_learning_rate(wanted: Cell) -> float:
        try:
            return results.best_learning_rate(wanted)
        except StudyError:
            if options.estimate:  # the hours do not depend on it
                return wanted.learning_rate
            raise

    cells = plan.search() if options.search else plan.comparison(best_learning_rate)
    finished = results.finished()
    todo = [cell for cell in cells if cell not in finished]
    return results, todo, len(cells) - len(todo)


def run_plan(options: argparse.Namespace) -> None:
    results, todo, finished = _unfinished(options)
    seconds = {cell: estimated_seconds(cell, results) for cell in todo}
    print(f"{finished} of {finished + len(todo)} runs are finished; the others take about", end=" ")
    print(f"{sum(seconds.values()) / 3600 / RUNS_AT_ONCE:.1f} hours on {RUNS_AT_ONCE} idle cores.", flush=True)
    if options.estimate:
        for cell, estimate in seconds.items():
            print(f"{cell}: {estimate / 60:.1f} min")
        return
    if not todo:
        return

    # Here and not above: TensorFlow takes seconds to import, --help and a wrong option must not.
    import rich.console
    import rich.progress

    from benchmarks import machine

    plan, described = plan_of(options), machine.describe()
    with (
        _locked(results.directory),
        _locked(options.work_dir) as lock,
        rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(stderr=True),
        ) as progress,
    ):
        results, todo, _ = _unfinished(options)  # another process may have gone on before the lock
        seconds = {cell: estimated_seconds(cell, results) for cell in todo}
        files = _split_files(plan.dataset, options.data_dir.expanduser(), options.work_dir)
        images = _digest(files)
        described |= {f"{plan.dataset} images": images}
        results.check_versions(described)
        everything = progress.add_task("all runs", total=sum(seconds.values()))
        trainings = _Trainings(lock)

        def train(number: int, cell: Cell) -> dict:
            one = progress.add_task(f"{number}/{len(todo)}: {cell}", total=seconds[cell])
            shown = 0.0

            def show(done: float) -> None:
                nonlocal shown
                progress.update(one, completed=done * seconds[cell])
                progress.advance(everything, (done - shown) * seconds[cell])
                shown = done

            job = job_of(cell, plan.augment, files, _checkpoint(cell, images, options.work_dir))
            trained = trainings.train(job, options.work_dir / f"{cell.file_name()}.log", show)
            show(1.0)
            progress.remove_task(one)
            return trained

        with concurrent.futures.ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
            futures = {pool.submit(train, number, cell): cell for number, cell in enumerate(todo, 1)}
            # In the order in which they end, so that one that fails loses none that were finished before it.
            ended: queue.SimpleQueue[concurrent.futures.Future] = queue.SimpleQueue()
            for future in futures:
                future.add_done_callback(ended.put)
            try:
                for _ in futures:
                    future = ended.get()
                    cell = futures[future]
                    run = add_run(cell, future.result(), options.work_dir, results, described)
                    print(
                        f"{cell}, learning rate {cell.learning_rate:g}: {cell.split} accuracy {run.accuracy:.1%}, "
                        f"{1e3 * run.seconds_per_step:.1f} ms a step",
                        flush=True,
                    )
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                trainings.stop()


def estimated_seconds(cell: Cell, results: Results) -> float:
    """Of a whole run; steps take as long as in the last run of the same kind, or as _STEP_MS says."""
    images, scale = {"digits": (1038, 1 / 16)}.get(cell.dataset, (40_000, 1.0))
    fixed, per_image = _STEP_MS[cell.network]
    step = (fixed + per_image * cell.batch_size * scale) / 1e3
    for run in results.runs:
        if (run.dataset, run.network, run.normalization, run.precision, run.batch_size) == (
            cell.dataset, cell.network, cell.normalization, cell.precision, cell.batch_size
        ):  # fmt: skip
            step = run.seconds_per_step
    evaluated = images / 4 * _EVALUATED_IN_STEPS * per_image * scale / 1e3
    return _STARTING_SECONDS + cell.epochs * (step * images / cell.batch_size + evaluated)


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[int]:
    """Makes and locks it; yields the lock, which lasts as long as any process that inherits it."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lock
    except BlockingIOError:
        raise StudyError(f"another run uses {directory}: wait for it, or use another directory") from None
    finally:
        os.close(lock)


def _split_files(dataset: str, data_dir: pathlib.Path, work_dir: pathlib.Path) -> dict[str, str]:
    """Writes the splits where a process can read them in a moment; returns the path of each."""
    # Another directory may hold other images: never the copies of the one before.
    origin = hashlib.sha256(os.fsencode(data_dir.resolve())).hexdigest()[:8]
    paths = {name: work_dir / f"{dataset}-{origin}-{name}.npz" for name in ("train", "validation", "test")}
    if not all(path.exists() for path in paths.values()):
        from study import image_datasets, study_training

        try:
            loaded = image_datasets.load(dataset, data_dir)
        except image_datasets.DatasetUnavailableError as error:
            raise StudyError(str(error)) from error
        for name, path in paths.items():
            study_training.save_split(getattr(loaded, name), path)
    return {name: str(path) for name, path in paths.items()}


def _digest(files: dict[str, str]) -> str:
    """Tells the images and labels of all splits from others, wherever they come from."""
    import numpy as np

    digest = hashlib.sha256()
    for name in sorted(files):
        with np.load(files[name]) as split:
            for array in (split["images"], split["labels"]):
                digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:12]


def job_of(cell: Cell, augment: bool, files: dict[str, str], checkpoint: pathlib.Path) -> dict:
    """What study_training.Job is made of; the search is not told where the test split is."""
    names = ("train", "validation", "test") if cell.split == "test" else ("train", "validation")
    job = {key: value for key, value in dataclasses.asdict(cell).items() if key not in ("dataset", "split")}
    return job | {"augment": augment, "splits": {name: files[name] for name in names}, "checkpoint": str(checkpoint)}


def _checkpoint(cell: Cell, images: str, work_dir: pathlib.Path) -> pathlib.Path:
    return work_dir / f"{cell.file_name()}-{images}.npz"


def add_run(cell: Cell, trained: dict, work_dir: pathlib.Path, results: Results, described: dict[str, str]) -> Run:
    """Adds what a training process returned to the results; only then its checkpoint goes."""
    values = dataclasses.asdict(cell)
    gains = [LayerRecord(**values, **record) for record in trained["gains"]]
    curve = [CurvePoint(**values, **({"validation_accuracy": float("nan")} | point)) for point in trained["curve"]]
    last = [record for record in gains if record.epoch == gains[-1].epoch]

    def mean(name: str) -> float:
        return sum(getattr(record, name) for record in last) / len(last) if last else float("nan")

    run = Run(
        **values,
        **{name: trained[name] for name in ("accuracy", "loss", "seconds_per_step", "peak_mib")},
        mean_gain=mean("gain"),
        sparsity=mean("sparsity"),
        machine=f"{described['cpu']}, {described['cores']} cores, {described['instruction set']}",
        commit=described["commit"],
    )
    images = f"{cell.dataset} images"
    versions = {name: described[name] for name in ("tf_agc", "tensorflow", "keras", "python", images)}
    # The gains of one seed make a picture, those of all of them a large file.
    results.add(run, curve, gains if cell.split == "test" and cell.seed == 0 else [], versions)
    _checkpoint(cell, described[images], work_dir).unlink(missing_ok=True)
    return run


class _Trainings:
    """The training processes that run at this moment.

    Attributes:
        lock: the lock that they inherit.
    """

    def __init__(self, lock: int) -> None:
        self.lock = lock
        self._processes: set[subprocess.Popen] = set()
        self._stopped = False
        self._guard = threading.Lock()

    def train(self, job: dict, log: pathlib.Path, show: Callable[[float], None]) -> dict:
        """Trains in a fresh process and returns its result; `show` gets the part that is done."""
        command = [sys.executable, str(TOOLS), "study.study_training", json.dumps(job)]
        environment = os.environ | {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
        message: dict = {}
        with log.open("w", encoding="utf-8") as errors:
            with self._guard:
                if self._stopped:
                    raise concurrent.futures.CancelledError
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, pass_fds=[self.lock]
                )
                self._processes.add(process)
            with process:
                for line in process.stdout:
                    if line.endswith("\n"):  # and was not cut off with the process
                        message = json.loads(line)
                    if "step" in message:
                        show(message["step"] / message["steps"])
            with self._guard:
                self._processes.discard(process)
        if "result" not in message:
            raise StudyError(
                f"a training process ended with exit code {process.returncode}: see {log}; the same command goes on"
            )
        log.unlink()
        return message["result"]

    def stop(self) -> None:
        """Ends all of them, and no further one starts."""
        with self._guard:
            self._stopped = True
            for process in self._processes:
                process.kill()


def find_largest_batches(options: argparse.Namespace) -> None:
    import rich.console
    import rich.progress

    from benchmarks import machine
    from study import study_memory

    path = _results_dir(options) / "memory.csv"
    described = machine.describe()
    rows = _finished_batches(path, options.limit_mib, described)
    finished = {(row.network, row.normalization) for row in rows}
    networks = [name for key, name in study_memory.NETWORKS.items() if options.network in (None, key)]
    cases = [(network, method) for network in networks for method in study_memory.NORMALIZATIONS]
    todo = [case for case in cases if case not in finished]
    for case in rich.progress.track(todo, description="networks", console=rich.console.Console(stderr=True)):
        rows.append(study_memory.largest_batch(*case, options.limit_mib))
        result_files.write_csv(path, rows, described)
    print(study_memory.table(rows))


def _finished_batches(path: pathlib.Path, limit_mib: int, described: dict[str, str]) -> list:
    """The rows to go on from, which have to be of the same limit, machine, versions and commit."""
    from benchmarks import machine
    from study import study_memory

    if not path.exists():
        return []
    rows, made_by = read_rows(path, study_memory.LargestBatch)
    differing = machine.differing(described, made_by)
    if any(row.limit_mib != limit_mib for row in rows):
        differing.append("limit_mib")
    if not differing:
        return rows
    raise StudyError(f"{path} was made with another {', '.join(differing)}: remove it, or pass another --results_dir")


def print_tables(options: argparse.Namespace) -> None:
    from study import study_report

    print(study_report.tables(_some_results(options)))


def draw_plots(options: argparse.Namespace) -> None:
    from study import study_report

    for path in study_report.draw(_some_results(options)):
        print(path)


def _some_results(options: argparse.Namespace) -> Results:
    results = Results(_results_dir(options))
    if not results.runs:
        raise StudyError(f"{results.directory} has no results: pass another --results_dir, or run the study first")
    return results


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    try:
        options.call(options)
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on.", file=sys.stderr)
        sys.exit(130)
    except (StudyError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
