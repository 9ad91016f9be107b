"""`tools/gpu/gpu_check.sh`: on a GPU, are the CUDA kernels right, and how fast are they against its memory and PyTorch?

Options, the sections and their order, and what is printed and written; how things are run is in gpu_*.py. TensorFlow is
needed for --tensorflow alone. A section that fails is reported and the next one runs; what was found until then is in
the files already.

Exit codes: 0; 1 if a result was wrong or a section failed; 2 if there is no GPU, or no library that its driver runs and
nothing to build one.
"""

import argparse
import dataclasses
import datetime
import itertools
import math
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from agc_numerics import ACTIVATIONS, DATA_FORMATS, DTYPES
from benchmarks import bench_shapes
from gpu import gpu_driver
from gpu import gpu_numerics as numerics
from gpu.gpu_call import Call
from gpu.gpu_report import Report, Row

TOOLS = pathlib.Path(__file__).resolve().parents[1]
CHECKOUT = TOOLS.parent

# (N, H, W, C). Odd ones, for every type, layout and activation: no sample, one position, one channel, rows that 16
# bytes do not divide, several tiles.
ODD_SHAPES = (
    (0, 3, 3, 8),
    (2, 1, 1, 24),
    (3, 5, 7, 1),
    (2, 9, 11, 130),
    (1, 33, 31, 67),
    (5, 2, 2, 1025),
    (2, 56, 56, 24),
)
# Whose plans are compared.
SWEPT_SHAPES = ((32, 112, 112, 64), (32, 56, 56, 256), (32, 28, 28, 512), (32, 14, 14, 1024))
# For the sanitizers, which take a hundred times as long.
SMALL_SHAPES = ((2, 5, 7, 3), (2, 9, 11, 64), (1, 17, 13, 40))

# Of //cc/core/cuda:agc_cuda and what it depends on, in that directory.
_SOURCES = ("agc_cuda.cu", "backward.cu", "driver.cc", "forward.cu", "launchers.cc", "plan.cc")

# Passes over memory; of a junction, which has a bias and a shortcut.
_TRAFFIC = {"forward": 2, "backward": 3}
_JUNCTION_TRAFFIC = {"forward": 3, "backward": 5}
# What is timed goes through this much more memory than the L2 cache holds before it comes back.
_L2_TIMES = 4
_MOST_SETS = 512
_SANITIZER_SECONDS = 120
_FOUND = 86  # compute-sanitizer's exit code where it has found something
# What it says where it cannot work at all.
_REFUSAL = re.compile(
    r".*(not supported|[Uu]nable to (initialize|attach)|terminated before first instrumented API call).*"
)


@dataclasses.dataclass
class Check:
    """What the sections need."""

    driver: gpu_driver.Driver
    launchers: gpu_driver.Launchers
    library: pathlib.Path
    small: bool = False
    full: bool = False
    shape: tuple[int, ...] | None = None  # the only one whose bandwidth is wanted
    deadline: float = math.inf  # of time.monotonic, of the section: what is not begun until then is left out

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def out_of_time(self, report: Report, what: str) -> bool:
        """Whether the section has to end before `what`; if so, it is noted."""
        if self.seconds_left <= 0:
            report.note(f"left out for want of time, from {what} on")
        return self.seconds_left <= 0

    # ---- Correctness ----

    def correctness(self, report: Report) -> None:
        """Every result against float64, twice: the second run must give the same bits."""
        count, worst = 0, (0.0, "")
        for seed, (shape, dtype, activation, addends, offsets) in enumerate(self._cases()):
            if self.out_of_time(report, f"{shape} {dtype} {activation}"):
                break
            n, h, w, c = shape
            case = numerics.make_case((n, h * w, c), dtype, activation, seed, addends)
            want = numerics.expected(case)
            for layout, misaligned in itertools.product(DATA_FORMATS, offsets):
                words = ["x".join(map(str, shape)), layout, dtype, activation, *addends]
                what = " ".join(words + ["misaligned"] * misaligned)
                call = Call(self.driver, self.launchers, case, layout, misaligned)
                call.run()
                stored = call.results()
                for name, error in call.errors(stored, want).items():
                    if not error <= 1:  # NaN, too
                        report.fail(f"{what}: {name} is off by {error:.3g} times what is allowed")
                    elif error > worst[0]:
                        worst = error, f"{name} of {what}"
                call.run()
                again = call.results()
                for name, values in stored.items():
                    if values.tobytes() != again[name].tobytes():
                        report.fail(f"{what}: {name} has other bits when it is computed again")
                count += 1
        report.note(f"{count} cases; the largest error is {worst[0]:.2f} of what is allowed ({worst[1]})")

    def _cases(self) -> Iterator[tuple]:
        """Shape, dtype, activation, what is added to z, and whether maps are misaligned: all values to try."""
        both = ("bias", "shortcut")
        if self.small:
            shapes = itertools.product(SMALL_SHAPES, ("bfloat16", "float32"), ("relu", "elu"))
            yield from ((*case, addends, (False,)) for case in shapes for addends in ((), both))
            return
        turns = itertools.cycle([("bias",), ("shortcut",), both])
        # Two samples of the largest: how a sample is laid out does not depend on how many there are.
        large = sorted({(2, *shape[1:]) for shape in bench_shapes.LARGE_SHAPES})
        if not self.full:
            yield from ((shape, "bfloat16", "relu", both, (False,)) for shape in large)
            for number, case in enumerate(itertools.product(ODD_SHAPES, DTYPES, ACTIVATIONS)):
                yield *case, () if number % 4 == 0 else next(turns), (number % 3 == 0,)
            return
        for case in itertools.product(ODD_SHAPES, DTYPES, ACTIVATIONS):
            # In turn, so that every activation and every type meets each.
            yield from ((*case, addends, (False, True)) for addends in ((), next(turns)))
        for case in itertools.product((*bench_shapes.SHAPES, *large), DTYPES, ("relu",)):
            yield from ((*case, addends, (False,)) for addends in ((), both))

    def huge(self, report: Report) -> None:
        """More than 2^31 elements: the same sample again and again, of which the last comes out as the first."""
        if self.out_of_time(report, "its only case"):
            return
        positions, channels, dtype = 56 * 56, 64, "float16"
        batch = 2**31 // (positions * channels) + 2
        size = positions * channels * 2
        if self.driver.free_bytes < 4 * batch * size + 2**30:
            report.note(f"left out: {4 * batch * size / 2**30 + 1:.0f} GiB are needed")
            return
        case = numerics.make_case((1, positions, channels), dtype, "relu", seed=1)
        one = Call(self.driver, self.launchers, case, "channels_last")
        one.run()
        many = Call(self.driver, self.launchers, case, "channels_last", repeat=batch)
        many.run()
        for sample in (0, batch // 2, batch - 2, batch - 1):
            for name in ("y", "mean", "dx"):
                if many.sample(name, sample).tobytes() != one.sample(name, 0).tobytes():
                    report.fail(f"sample {sample} of {batch}: {name} is not what it is alone")
        report.note(f"{batch} samples, {batch * positions * channels / 2**31:.4f} x 2^31 elements")

    # ---- Time ----

    def bandwidth(self, report: Report) -> None:
        """Each pass against a copy of the same bytes, both in graphs that walk through more than the L2 cache."""
        shapes = [(shape, "channels_last") for shape in (*reversed(bench_shapes.LARGE_SHAPES), *bench_shapes.SHAPES)]
        shapes += [(shape, "channels_first") for shape in bench_shapes.CHANNELS_FIRST_SHAPES]
        if self.shape:
            shapes = [(self.shape, layout) for layout in DATA_FORMATS]
        for dtype, (shape, layout) in itertools.product(("bfloat16", "float32", "float16"), shapes):
            if self.out_of_time(report, f"{shape} {layout} {dtype}"):
                return
            for junction in (False, True) if shape in bench_shapes.LARGE_SHAPES else (False,):
                candidate, passes = ("tf_agc, junction", _JUNCTION_TRAFFIC) if junction else ("tf_agc", _TRAFFIC)
                calls = self.calls(shape, layout, dtype, junction)
                copy_ms = self._copy_ms(calls)
                for name, traffic in passes.items():
                    ms, spread = self.driver.time_graph([getattr(call, name) for call in calls])
                    row = Row("bandwidth", shape, layout, dtype, name, candidate, ms, spread, copy_ms * traffic / 2)
                    report.row(row)
                del calls  # before there are others

    def _copy_ms(self, calls: list[Call]) -> float:
        """Of one copy of a map tensor: the faster one of copies in a graph and on a stream."""
        copies = [call.copy_maps for call in calls]
        in_graph, _ = self.driver.time_graph(copies)
        on_stream, _ = self.driver.time(lambda: [copy() for copy in copies], len(copies), self.driver.stream)
        return min(in_graph, on_stream)

    def calls(self, shape: tuple[int, int, int, int], layout: str, dtype: str, junction: bool = False) -> list[Call]:
        """Calls of one shape, with memory of their own, that together go through more than the L2 cache holds."""
        n, h, w, c = shape
        case = numerics.make_timing_case((n, h * w, c), dtype, "relu", junction)
        first = Call(self.driver, self.launchers, case, layout)
        others = range(1, self.sets(shape, dtype))
        return [first, *(Call(self.driver, self.launchers, case, layout, like=first) for _ in others)]

    def sets(self, shape: tuple[int, int, int, int], dtype: str) -> int:
        """How many sets of tensors that takes: of each, a pass reads and writes two at least."""
        bytes_of_pass = 2 * math.prod(shape) * numerics.storage(dtype).itemsize
        return min(_MOST_SETS, max(2, math.ceil(_L2_TIMES * self.driver.l2_bytes / bytes_of_pass)))

    def latency(self, report: Report) -> None:
        """One sample in the cache, in a graph, against a kernel that does nothing."""
        empty = self.driver.empty_kernel()
        empty_ms, spread = self.driver.time_graph([empty] * 100)
        n, h, w, c = bench_shapes.LATENCY_SHAPE
        report.row(Row("latency", bench_shapes.LATENCY_SHAPE, "", "", "", "empty kernel", empty_ms, spread))
        for dtype in ("bfloat16", "float32"):
            if self.out_of_time(report, dtype):
                return
            case = numerics.make_timing_case((n, h * w, c), dtype, "relu")
            call = Call(self.driver, self.launchers, case, "channels_last")
            for passes in _TRAFFIC:
                ms, spread = self.driver.time_graph([getattr(call, passes)] * 100)
                report.row(
                    Row("latency", bench_shapes.LATENCY_SHAPE, "channels_last", dtype, passes, "tf_agc", ms, spread)
                )
                report.note(f"{dtype} {passes}: {ms / empty_ms:.1f} x an empty kernel")

    def sweep(self, report: Report) -> None:
        """Other plans than the rule's, where they keep a tile on chip; the rule's own comes first."""
        segments, clusters, prefetch = (128, 64), (1, 2, 4, 8), (0, 1)
        try:
            for shape in SWEPT_SHAPES:
                if self.out_of_time(report, str(shape)):
                    return
                self.launchers.try_plan()
                calls = self.calls(shape, "channels_last", "bfloat16")
                copy_ms = self._copy_ms(calls)
                seen = set()
                for trial in ((0, 0, 0, 0), *itertools.product(segments, clusters, (0,), prefetch)):
                    self.launchers.try_plan(*trial)
                    for name, traffic in _TRAFFIC.items():
                        plan = calls[0].plan(name)
                        # Another plan that is not on chip would need another workspace.
                        if (name, plan) in seen or (any(trial) and not plan.startswith("on chip")):
                            continue
                        seen.add((name, plan))
                        ms, spread = self.driver.time_graph([getattr(call, name) for call in calls])
                        candidate = plan if any(trial) else f"the rule, {plan}"
                        row = Row("sweep", shape, "channels_last", "bfloat16", name, candidate, ms, spread)
                        report.row(dataclasses.replace(row, copy_ms=copy_ms * traffic / 2))
                del calls  # before there are others
        finally:
            self.launchers.try_plan()

    def pytorch(self, report: Report) -> None:
        """A training step, forward and backward, of ours and of PyTorch's layers with ReLU, and of a junction."""
        try:
            from gpu import gpu_peers
        except ImportError as error:
            report.note(f"left out: PyTorch cannot be imported ({error})")
            return
        gpu_peers.compare(self, report)

    # ---- Tools ----

    def sanitizer(self, report: Report) -> None:
        """memcheck and racecheck over small shapes."""
        tool = find_tool("compute-sanitizer") or shutil.which("compute-sanitizer", path=_usual_path())
        if tool is None:
            report.note("left out: there is no compute-sanitizer in CUDA_HOME, on PATH or in /usr/local/cuda")
            return
        for check in ("memcheck", "racecheck"):
            if self.out_of_time(report, check):
                return
            seconds = min(_SANITIZER_SECONDS, self.seconds_left)
            with tempfile.TemporaryDirectory() as directory:
                command = [tool, "--tool", check, "--error-exitcode", str(_FOUND)]
                command += [sys.executable, str(TOOLS), "gpu.gpu_check", "--small", "--library", str(self.library)]
                command += ["--section", "correctness", "--output", directory]
                try:
                    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
                except subprocess.TimeoutExpired:
                    report.note(f"{check}: left out, it did not end within {seconds:.0f} seconds")
                    continue
            output = done.stdout + done.stderr
            refusal = _REFUSAL.search(output)
            if done.returncode == 0:
                report.note(f"{check}: {done.stdout.strip().splitlines()[-1].strip('= ')}")
            elif refusal and done.returncode != _FOUND:
                report.note(f"{check}: not available here: {refusal[0].strip('= ')}")
            else:
                report.fail(f"{check} ended with {done.returncode}:\n{output[-3000:]}")

    def tensorflow(self, report: Report) -> None:
        """The Python tests on the GPU, the layout optimizer's transposes, and the op's time in a graph."""
        # Read when TensorFlow is imported, here and in the process of the tests: neither takes the whole GPU from the
        # other.
        os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
        from gpu import gpu_tensorflow

        gpu_tensorflow.check(report, self)


# In their order, and by which share of the time each has to end.
SECTIONS = {
    "bandwidth": 0.3,
    "latency": 0.35,
    "correctness": 0.5,
    "sweep": 0.65,
    "pytorch": 0.85,
    "sanitizer": 0.97,
    "huge": 1.0,
}


def _usual_path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/local/cuda/bin"


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: CUDA_HOME's, or the one on PATH, or that of the usual place."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(name, path=f"{home}/bin" if home else _usual_path())


def build(compute_capability: str, directory: pathlib.Path) -> pathlib.Path:
    """Compiles cc/core/cuda for one compute capability, such as "90"; needs nvcc and a C++ compiler, not Bazel.

    Raises:
        gpu_driver.Error: there is no nvcc, or it refuses the sources.
    """
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise gpu_driver.Error(
            "there is no nvcc to build the kernels with; name a built library with --library "
            "(tools/bazel.sh build --config=cuda //cc/core/cuda:libtf_agc_cuda.so)"
        )
    sources = [str(CHECKOUT / "cc/core/cuda" / name) for name in _SOURCES]
    library = directory / "libtf_agc_cuda.so"
    command = [nvcc, "-shared", "-std=c++17", "-O3", "-Xcompiler=-fPIC", f"-I{CHECKOUT}", "-o", str(library)]
    command += [f"-gencode=arch=compute_{compute_capability},code=sm_{compute_capability}", *sources]
    # The CUDA runtime inside is ours alone: PyTorch brings another one into the process.
    command += ["-Xlinker=--exclude-libs,ALL", "-Xlinker=-z,now"]
    # nvcc itself looks in lib64 alone, which the toolkit from Python's index has not.
    toolkit = pathlib.Path(nvcc).resolve().parent.parent
    folders = [toolkit / folder for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")]
    command += [f"-L{folder}" for folder in folders if (folder / "libcudart_static.a").is_file()][:1]
    print(f"building for sm_{compute_capability} with {nvcc}", flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise gpu_driver.Error(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return library


def describe(driver: gpu_driver.Driver, commit: str | None) -> dict[str, str]:
    """What stands beside every result."""

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changed = output("git", "status", "--porcelain", "--untracked-files=no", "--", "cc", "tools/*.py")
    of_checkout = output("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or of_checkout + (" with changes" if changed else ""),
        **driver.describe(),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        or "unknown",
        "python": platform.python_version(),
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/gpu/gpu_check.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--library", type=pathlib.Path, help="a built libtf_agc_cuda.so; otherwise nvcc builds one")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("gpu_check"), help="the directory for gpu.csv and gpu.json"
    )
    parser.add_argument(
        "--section", action="append", choices=(*SECTIONS, "tensorflow"), help="only this one; may be given again"
    )
    parser.add_argument("--tensorflow", action="store_true", help="the TensorFlow op as well")
    parser.add_argument(
        "--minutes", type=float, default=9, help="for all sections together; what is not begun by then is left out"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="few small shapes for correctness")
    size.add_argument("--full", action="store_true", help="all shapes and addends for correctness")
    parser.add_argument(
        "--build-for",
        metavar="90",
        help="only build libtf_agc_cuda.so into --output, for that compute capability; needs no GPU",
    )
    parser.add_argument(
        "--shape",
        type=bench_shapes.parse,
        metavar="N,H,W,C",
        help="the bandwidth of this one alone",
    )
    parser.add_argument("--commit", help="what is tested, where the checkout has no .git")
    options = parser.parse_args(arguments)
    if options.library is not None and not options.library.is_file():
        parser.error(f"--library must name a built libtf_agc_cuda.so, got {options.library}")
    if any((options.output / name).exists() for name in ("gpu.csv", "gpu.json")):
        parser.error(f"--output must be a directory without results, and {options.output} has some: name another one")
    if options.build_for is not None and not options.build_for.isdigit():
        parser.error(f"--build-for must be a compute capability without its point such as 90, got {options.build_for}")
    options.library = options.library and options.library.resolve()  # without a slash it would be looked for elsewhere
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        if options.build_for is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            print(f"built {build(options.build_for, options.output)}")
            return 0
        with tempfile.TemporaryDirectory() as directory:
            driver = gpu_driver.Driver()
            library = options.library or build("".join(map(str, driver.compute_capability)), pathlib.Path(directory))
            launchers = gpu_driver.Launchers(library)
            launchers.start(driver.stream)
            check = Check(driver, launchers, library, options.small, options.full, options.shape)
            report = Report(options.output, describe(driver, options.commit))
            return run(check, report, options)
    except gpu_driver.Error as error:
        print(f"tf_agc: nothing was checked: {error}.", file=sys.stderr)
        return 2


def run(check: Check, report: Report, options: argparse.Namespace) -> int:
    """The chosen sections, each until its share of the time is over, which does not count the build."""
    names = options.section or list(SECTIONS)
    if options.tensorflow and "tensorflow" not in names:
        names.append("tensorflow")
    start, seconds = time.monotonic(), 60 * options.minutes
    for number, name in enumerate(names, 1):
        # Of some sections alone, or with TensorFlow's, each has the same share.
        share = SECTIONS[name] if names == list(SECTIONS) else number / len(names)
        check.deadline = start + seconds * share
        report.run(name, getattr(check, name))
    print(f"\n{len(report.failures)} failed" + "".join(f"\n  {failure}" for failure in report.failures))
    print(f"results: {options.output}/gpu.csv, {options.output}/gpu.json")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
