"""Benchmarks: `cpu` (the op), `model` and `serving` (networks), `monitor` (GainMonitor), `report` (tables and plot).

Options, files and tables; what is measured and how is in bench_cpu.py, bench_model.py, bench_serving.py and
bench_monitor.py, the plot in bench_plot.py.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys

from benchmarks import bench_shapes, result_files

# Read when TensorFlow is imported: of its log only errors are news here.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

TOOLS = pathlib.Path(__file__).resolve().parents[1]
CHECKOUT = TOOLS.parent


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    cpu = commands.add_parser("cpu", help="the op against its peers and against a copy of the same bytes")
    cpu.add_argument("--quick", action="store_true", help="three shapes, three repetitions")
    cpu.add_argument("--shapes", type=_shapes, help="N,H,W,C, several separated by blanks, in quotes")
    cpu.add_argument("--dtype", choices=bench_shapes.DTYPES, help="(default: all three)")
    cpu.add_argument(
        "--only", choices=["op", "junctions"], help="(default: the op by itself, and junctions at the large shapes)"
    )
    cpu.add_argument("--csv", type=pathlib.Path, help="write the results here, after each shape")
    cpu.add_argument("--resume", action="store_true", help="keep what the file of --csv has, and time the rest")
    cpu.add_argument("--json", type=pathlib.Path, help="write the results here")
    cpu.add_argument(
        "--instructions", action="store_true", help="count instructions under callgrind instead of timing anything"
    )
    cpu.set_defaults(run=run_cpu)

    model = commands.add_parser("model", help="training steps of whole networks, kept activations, peak memory")
    model.add_argument("--quick", action="store_true", help="four timed steps")
    model.add_argument("--csv", type=pathlib.Path, help="write the results here, after each network")
    model.add_argument("--resume", action="store_true", help="keep what the file of --csv has, and measure the rest")
    model.set_defaults(run=run_model)

    monitor = commands.add_parser("monitor", help="what GainMonitor costs in training")
    monitor.add_argument("--quick", action="store_true", help="one network, three epochs")
    monitor.set_defaults(run=run_monitor)

    serving = commands.add_parser("serving", help="the latency of exported networks, one image, one thread")
    serving.add_argument("--quick", action="store_true", help="one network, twenty calls")
    serving.add_argument("--csv", type=pathlib.Path, help="write the results here, after each network")
    serving.set_defaults(run=run_serving)

    report = commands.add_parser("report", help="table and plot out of a CSV file of either benchmark")
    report.add_argument("csv", type=pathlib.Path)
    report.add_argument("--plot", type=pathlib.Path, help="write the plot of `cpu` here (PNG)")
    report.set_defaults(run=run_report)
    return parser.parse_args()


def _shapes(text: str) -> list[tuple[int, ...]]:
    try:
        return [bench_shapes.parse(shape) for shape in text.split() or [text]]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be shapes N,H,W,C separated by blanks, got {text!r}") from error


def bazel_build(*targets: str) -> None:
    result = subprocess.run(
        [TOOLS / "bazel.sh", "build", *targets],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        sys.exit(f"{' '.join(targets)} cannot be built:\n{result.stdout}")


def run_cpu(options: argparse.Namespace) -> None:
    if options.instructions:
        count_instructions()
        return
    bazel_build("//cc/core:libcopy_limit.so")

    # Here and not above: TensorFlow takes seconds to import, --help and a wrong option must not.
    import rich.progress
    import tensorflow as tf

    import tf_agc
    from benchmarks import bench_cpu, machine

    tf_agc.implementation("native")  # or an error that says why there is nothing to measure
    threads = os.cpu_count()
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    copy = bench_cpu.Copy(CHECKOUT / "bazel-bin/cc/core/libcopy_limit.so", threads)

    meta = machine.describe() | {"threads": str(threads)}
    console = _console()
    rows = _earlier_rows(options, meta)
    jobs = [job for job in cpu_jobs(options) if not any(job.made(row) for row in rows)]
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(task, description=str(job))
            measured = list(bench_cpu.measure(copy, job, quick=options.quick))
            for sentence in (row for row in measured if isinstance(row, str)):
                console.print(sentence)
            rows += [row for row in measured if not isinstance(row, str)]
            if options.csv:
                result_files.write_csv(options.csv, rows, meta)
            progress.advance(task)
    if options.json:
        content = {"machine": meta, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(cpu_table(rows, meta))


def cpu_jobs(options: argparse.Namespace) -> list:
    """What `cpu` times; a shape or a dtype that is asked for is timed in all its forms."""
    from benchmarks import bench_cpu

    def of_shapes(shapes, dtypes, junction) -> list[bench_cpu.Job]:
        return [
            bench_cpu.Job(shape, data_format, dtype, junction)
            for data_format in ("channels_last", "channels_first")
            for dtype in ([options.dtype] if options.dtype else dtypes)
            for shape in options.shapes or shapes
            if data_format == "channels_last" or shape in bench_shapes.CHANNELS_FIRST_SHAPES
            if shape in bench_shapes.QUICK_SHAPES or not options.quick or options.shapes
        ]

    jobs = []
    if options.only != "junctions":
        jobs += of_shapes(bench_shapes.SHAPES, bench_shapes.DTYPES, junction=False)
        if not options.shapes and not options.quick and options.dtype in (None, "float32"):
            jobs += [bench_cpu.Job(shape, "channels_last", "float32", peers=False) for shape in bench_cpu.SERIES]
    if options.only != "op":
        jobs += of_shapes(bench_shapes.JUNCTION_SHAPES, bench_shapes.JUNCTION_DTYPES, junction=True)
    return jobs


def _earlier_rows(options: argparse.Namespace, meta: dict[str, str]) -> list:
    """The rows to go on from, which were measured on the same machine with the same versions."""
    from benchmarks import machine

    if not options.resume:
        return []
    if not options.csv:
        sys.exit("--resume needs --csv, the file to go on with")
    if not options.csv.exists():
        return []
    rows, earlier = read_csv(options.csv)
    others = machine.differing(meta, earlier)
    if others:
        sys.exit(f"{options.csv} was measured with another {', '.join(others)}: remove it, or name another file")
    return rows


def count_instructions() -> None:
    """Prints instructions for each element, of code that valgrind can run: nothing above x86-64-v3."""
    bazel_build("//cc/core:bench")
    program = CHECKOUT / "bazel-bin/cc/core/bench"
    print(f"{'instructions for each element':60} x86-64-v3, one thread, relu")
    kinds = {
        "forward_in_place": "Forward",
        "backward_in_place": "Backward",
        "junction_forward_in_place": "Forward",
        "junction_backward_in_place": "Backward",
    }
    for kind, function in kinds.items():
        for dtype in ("float", "bfloat16", "half"):
            for data_format in ("channels_last", "channels_first"):
                for shape in bench_shapes.QUICK_SHAPES[1:]:
                    batch, height, width, channels = shape
                    name = f"{kind}/{dtype}/{data_format}/{batch}x{height * width}x{channels}"
                    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
                    command += [f"--toggle-collect=tf_agc::core::{function}*", program, "--once", name]
                    try:
                        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
                    except FileNotFoundError:
                        sys.exit("valgrind is missing: install the package valgrind")
                    except subprocess.CalledProcessError as error:
                        sys.exit(f"{name} failed under valgrind:\n{error.stderr}")
                    count = int(re.search(r"Collected : (\d+)", output)[1])
                    print(f"{name:60} {count / math.prod(shape):.3f}")


def run_model(options: argparse.Namespace) -> None:
    import rich.progress

    import tf_agc
    from benchmarks import bench_model, machine

    tf_agc.implementation("native")  # or an error that says why there is nothing to measure
    meta = machine.describe()
    rows = _earlier_rows(options, meta)
    networks = [name for name in bench_model.NETWORKS if not any(row.network == name for row in rows)]
    for name in rich.progress.track(networks, description="networks", console=_console()):
        rows.extend(bench_model.measure(name, options.quick))
        if options.csv:
            result_files.write_csv(options.csv, rows, meta)
    print(model_table(rows, meta))


def run_monitor(options: argparse.Namespace) -> None:
    import rich.progress

    import tf_agc
    from benchmarks import bench_model, bench_monitor, machine

    tf_agc.implementation("native")  # or an error that says why there is nothing to measure
    networks = list(bench_model.NETWORKS)[: 1 if options.quick else None]
    rows = [
        bench_monitor.measure(name, options.quick)
        for name in rich.progress.track(networks, description="networks", console=_console())
    ]
    print(monitor_table(rows, machine.describe()))


def run_serving(options: argparse.Namespace) -> None:
    import rich.progress

    from benchmarks import bench_model, bench_serving, machine

    bench_serving.use_one_thread()
    meta, rows = machine.describe(), []
    networks = list(bench_model.NETWORKS)[: 1 if options.quick else None]
    for name in rich.progress.track(networks, description="networks", console=_console()):
        rows.extend(bench_serving.measure(name, options.quick))
        if options.csv:
            result_files.write_csv(options.csv, rows, meta)
    print(serving_table(rows, meta))


def _console():
    import rich.console

    return rich.console.Console(stderr=True)


def read_csv(path: pathlib.Path) -> tuple[list, dict[str, str]]:
    """Returns what `result_files.write_csv` wrote, of either benchmark."""
    from benchmarks import bench_cpu, bench_model, bench_serving

    try:
        return result_files.read_csv(path, bench_cpu.Row, bench_model.Row, bench_serving.Row)
    except result_files.ForeignFileError:
        sys.exit(f"{path} is not a result of `bench.py cpu`, `bench.py model` or `bench.py serving`")


def _table(header: str, rows: list[list[str]], meta: dict[str, str]) -> str:
    """Returns a Markdown table and a line of what it was measured on; `header` has its columns between " | "."""
    measured_on = "; ".join(f"{key} {value}" for key, value in meta.items())
    return f"{result_files.markdown_table(header.split(' | '), rows)}\n\n{measured_on}\n"


def model_table(rows: list, meta: dict[str, str]) -> str:
    """Returns a Markdown table of networks; figures also as fractions of those of two other normalizations."""
    header = (
        "network, batch | normalization | jit | ms a step | ± | of BatchNorm | of none | kept MiB | of BatchNorm | "
        "peak MiB"
    )
    cells = []
    for row in rows:
        batch_norm, none = (
            next(r for r in rows if (r.network, r.normalization, r.jit) == (row.network, name, row.jit))
            for name in ("batch_norm", "none")
        )
        times = [f"{row.step_ms:.4g}", f"{row.spread_ms:.2g}"]
        times += [f"{row.step_ms / other.step_ms:.2f}" for other in (batch_norm, none)]
        memory = [f"{row.kept_mib:.4g}", f"{row.kept_mib / batch_norm.kept_mib:.2f}", f"{row.peak_mib:.4g}"]
        names = [f"{row.network}, {row.batch}", row.normalization, "yes" if row.jit else "no"]
        cells.append([*names, *times, *([""] * 3 if row.jit else memory)])
    return _table(header, cells, meta)


def serving_table(rows: list, meta: dict[str, str]) -> str:
    """Returns a Markdown table of exported networks."""
    cells = []
    for row in rows:
        folded = next(
            r for r in rows if (r.network, r.runtime) == (row.network, row.runtime) and "folded" in r.normalization
        )
        ratio = f"{row.median_ms / folded.median_ms:.2f}"
        cells.append(
            [
                row.network,
                row.runtime,
                row.normalization,
                f"{row.ops}",
                f"{row.median_ms:.4g}",
                f"{row.spread_ms:.2g}",
                ratio,
            ]
        )
    return _table("network | runtime | normalization | ops | ms a call | ± | of folded BatchNorm", cells, meta)


def monitor_table(rows: list, meta: dict[str, str]) -> str:
    """Returns a Markdown table of networks; shares are of CPU time, at one record an epoch."""
    header = (
        "network, batch | AGC layers | ms a step | ± | in epochs with a record | ms a record | ± | "
        "% of an epoch of 391 steps | steps for 2 %"
    )
    cells = [
        [
            *(f"{row.network}, {row.batch}", f"{row.layers}", f"{row.step_ms:.4g}", f"{row.step_spread_ms:.2g}"),
            *(f"{row.monitored_step_ms:.4g}", f"{row.record_ms:.4g}", f"{row.record_spread_ms:.2g}"),
            *(f"{100 * row.share(391):.2g}", f"{row.steps_for(0.02)}"),
        ]
        for row in rows
    ]
    return _table(header, cells, meta)


def cpu_table(rows: list, meta: dict[str, str], passes: str = "") -> str:
    """Returns a Markdown table: ours, its ratio to the limit, the fastest peer.

    With `passes`, it has these alone, where a peer does them too.
    """
    cells = []
    for row in rows:
        best = best_peer(rows, row)
        if row.role != "ours" or (passes and (row.passes != passes or not best)):
            continue
        name = row.passes if row.candidate == "tf_agc" else f"{row.candidate}, {row.passes}"
        cells.append([*_case(row), name, _time(row), f"{row.ms / row.limit_ms:.2f}", *_against(best, row)])
    return _table("N x H x W x C | layout, type | pass | ms | x limit | fastest peer, ms | speed-up", cells, meta)


def junction_table(rows: list, meta: dict[str, str]) -> str:
    """Returns a Markdown table: forward + backward of junctions, against three ops, the peers and the limit."""
    header = (
        "N x H x W x C | layout, type | junction, ms | x limit | of AGC + Add + relu | fastest peer + Add + relu, ms | "
        "speed-up"
    )
    cells = []
    for row in rows:
        if (row.candidate, row.passes) != ("tf_agc", "junction forward + backward"):
            continue
        three_ops = next(r for r in rows if r.candidate == "tf_agc + Add + relu" and _same_work(r, row))
        ratios = [f"{row.ms / row.limit_ms:.2f}", f"{row.ms / three_ops.ms:.2f}"]
        cells.append([*_case(row), _time(row), *ratios, *_against(best_peer(rows, row), row)])
    return _table(header, cells, meta)


def _case(row) -> list[str]:
    return ["x".join(map(str, row.shape)), f"{row.data_format}, {row.dtype}"]


def _time(row) -> str:
    return f"{row.ms:.3g} ± {row.spread_ms:.1g}"


def _against(peer, row) -> list[str]:
    return [f"{peer.candidate}: {peer.ms:.3g}", f"{peer.ms / row.ms:.1f}"] if peer else ["", ""]


def _same_work(one, other) -> bool:
    def key(row) -> tuple:
        return row.shape, row.data_format, row.dtype, row.passes

    return key(one) == key(other)


def best_peer(rows: list, ours) -> object:
    """The fastest peer at the same work; for an output of its own, the peers' only way."""
    passes = ours.passes.replace("forward fresh", "forward in place")
    work = dataclasses.replace(ours, passes=passes)
    same = [row for row in rows if row.role == "peer" and _same_work(row, work)]
    return min(same, key=lambda row: row.ms, default=None)


def run_report(options: argparse.Namespace) -> None:
    rows, meta = read_csv(options.csv)
    if not hasattr(rows[0], "passes"):
        print((serving_table if hasattr(rows[0], "runtime") else model_table)(rows, meta))
        return
    junctions = [row for row in rows if row.passes.startswith("junction")]
    if len(junctions) < len(rows):
        print(cpu_table(rows, meta, "forward + backward"))
    if junctions:
        print(junction_table(junctions, meta))
    if options.plot:
        from benchmarks import bench_plot

        bench_plot.draw(rows, meta, options.plot)


def main() -> None:
    options = parse_options()
    options.run(options)


if __name__ == "__main__":
    main()
