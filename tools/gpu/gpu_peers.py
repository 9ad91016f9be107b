"""PyTorch's layers beside ours in gpu_check.py: a training step of each, forward and backward.

Everything is timed in CUDA graphs, so what Python and launches cost is left out: that is in the peers' favour. A peer
that cannot be captured is timed as it is launched, and its name says so.
"""

from collections.abc import Callable, Iterator

import torch

from benchmarks import bench_shapes
from gpu import gpu_driver
from gpu.gpu_report import Row


def compare(check, report) -> None:
    """Times ours and every peer, the large shapes first; leaves out what is not begun before the deadline.

    Args:
        check: gpu_check.Check.
        report: gpu_report.Report.
    """
    if not torch.cuda.is_available():  # it was built without CUDA, or for a newer driver
        report.note("left out: this PyTorch finds no GPU")
        return
    report.note(f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    large = bench_shapes.LARGE_SHAPES
    cases = [(dtype, shape) for dtype in ("bfloat16", "float32") for shape in (*large[::-1], *bench_shapes.SHAPES)]
    for dtype, shape in cases:
        if check.out_of_time(report, f"{shape} {dtype}"):
            return

        # Or it has compiled the same code for so many shapes that it runs the next ones as they are.
        torch.compiler.reset()
        _compare_at(check, report, shape, dtype, junction=False)
        if shape in large:
            _compare_at(check, report, shape, dtype, junction=True)


def _compare_at(check, report, shape: tuple[int, int, int, int], dtype: str, junction: bool) -> None:
    """Times ours and the peers at one shape: the layer with ReLU, or the end of a residual block."""
    our_name = "tf_agc, junction" if junction else "tf_agc"
    peers = _junctions(shape[3]) if junction else _peers(shape[3], getattr(torch, dtype))

    def row(candidate, times):
        report.row(Row("pytorch", shape, "channels_last", dtype, "forward + backward", candidate, *times))
        return times[0]

    calls = check.calls(shape, "channels_last", dtype, junction)
    ours = row(our_name, check.driver.time_graph([call.both for call in calls]))
    del calls
    for name, module in peers:
        try:
            suffix, times = _time(
                check.driver, module, shape, dtype, check.sets(shape, dtype), inputs=2 if junction else 1
            )
            theirs = row(name + suffix, times)
            report.note(f"{name}: {theirs / ours:.2f} x the time of {our_name}")
        except RuntimeError as error:  # cuDNN has no plan for it, memory is short
            report.note(f"{name} does not run at {shape} {dtype}: {str(error).splitlines()[0]}")


class _Junction(torch.nn.Module):
    """The end of a residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(x) + shortcut)


def _junctions(channels: int) -> Iterator[tuple[str, torch.nn.Module]]:
    yield "BatchNorm2d + add + ReLU, eager", _Junction(channels).cuda()
    yield "BatchNorm2d + add + ReLU, compiled", torch.compile(_Junction(channels).cuda(), dynamic=False)


def _peers(channels: int, dtype: torch.dtype) -> Iterator[tuple[str, torch.nn.Module]]:
    def with_relu(norm):
        return torch.nn.Sequential(norm, torch.nn.ReLU()).cuda()

    groups = next(groups for groups in (32, 16, 8, 4, 3, 2, 1) if channels % groups == 0)
    yield "BatchNorm2d + ReLU, eager", with_relu(torch.nn.BatchNorm2d(channels))
    yield "BatchNorm2d + ReLU, compiled", torch.compile(with_relu(torch.nn.BatchNorm2d(channels)), dynamic=False)
    yield f"GroupNorm({groups}) + ReLU, eager", with_relu(torch.nn.GroupNorm(groups, channels, dtype=dtype))
    yield "InstanceNorm2d + ReLU, eager", with_relu(torch.nn.InstanceNorm2d(channels, affine=True))


def _time(
    driver: gpu_driver.Driver, module, shape, dtype: str, sets: int, inputs: int
) -> tuple[str, tuple[float, float]]:
    """What to add to the name, and median and spread in milliseconds of one training step."""
    n, h, w, c = shape

    def maps() -> torch.Tensor:
        values = torch.randn(n, c, h, w, device="cuda", dtype=getattr(torch, dtype))
        return values.to(memory_format=torch.channels_last)

    steps = [_step(module, [maps().requires_grad_() for _ in range(inputs)], maps()) for _ in range(sets)]

    # As PyTorch's documentation has it: a capture wants a stream on which all has run before.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps[:3]:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    current = torch.cuda.current_stream().cuda_stream
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for step in steps:
                step()
    except RuntimeError:
        torch.cuda.synchronize()
        return " (no graph)", driver.time(lambda: [step() for step in steps], sets, current)
    return "", driver.time(graph.replay, sets, current)


def _step(module, inputs: list[torch.Tensor], dy: torch.Tensor) -> Callable[[], None]:
    parameters = list(module.parameters())
    return lambda: torch.autograd.grad(module(*inputs), [*inputs, *parameters], dy) and None
