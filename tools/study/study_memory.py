"""`study.py memory`: the largest batch whose training stays below a limit, by bisection on measured peaks.

A limit that the system enforces would not do: TensorFlow reserves far more addresses than it uses. The measurement is
bench_model.py's, in a fresh process each; options and files are study.py's.
"""

import dataclasses
import math
import signal
import subprocess
from collections.abc import Callable

from benchmarks import bench_model
from study.study_results import StudyError

# Names of the study and of the benchmark.
NETWORKS = {
    "plain": "plain CNN, 6 layers",
    "resnet20_pre": "ResNet-20, pre-activation",
    "resnet20_post": "ResNet-20, post-activation",
}
NORMALIZATIONS = ("agc", "batch_norm")
_PRECISION = 0.02


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """A network with a normalization; peak_mib is that of largest_batch, at most limit_mib."""

    network: str
    normalization: str
    limit_mib: float
    largest_batch: int
    peak_mib: float


def _peak_mib(network: str, normalization: str, batch: int) -> float:
    """Infinite where there is not so much memory at all."""
    try:
        return bench_model.peak_of_fresh_process(network, normalization, batch)
    except subprocess.CalledProcessError as error:
        if error.returncode == -signal.SIGKILL:
            return math.inf
        raise StudyError(
            f"{network} with {normalization} at a batch of {batch} ended with {error.returncode}: see above"
        ) from error


def largest_batch(
    network: str,
    normalization: str,
    limit_mib: float,
    peak_mib: Callable[[str, str, int], float] = _peak_mib,
) -> LargestBatch:
    """Doubles the batch until it is too large, then halves the interval down to 2 % of it; 0 where none fits."""
    fits, too_large = (0, float("nan")), None
    while too_large is None or too_large - fits[0] > max(1, _PRECISION * fits[0]):
        batch = max(1, 2 * fits[0]) if too_large is None else (fits[0] + too_large) // 2
        peak = peak_mib(network, normalization, batch)
        if peak <= limit_mib:
            fits = (batch, peak)
        else:
            too_large = batch
    return LargestBatch(network, normalization, float(limit_mib), *fits)


def table(rows: list[LargestBatch]) -> str:
    """Returns a Markdown table, AGC against BatchNormalization, of the networks that have both."""
    lines = ["| network | limit, MiB | largest batch: AGC | BatchNorm | ratio |", "|---|---|---|---|---|"]
    batch_norms = {row.network: row for row in rows if row.normalization == "batch_norm"}
    for agc in rows:
        if agc.normalization == "agc" and agc.network in batch_norms:
            other = batch_norms[agc.network]
            ratio = agc.largest_batch / other.largest_batch if other.largest_batch else float("nan")
            lines.append(
                f"| {agc.network} | {agc.limit_mib:g} | {agc.largest_batch} | {other.largest_batch} | {ratio:.2f} |"
            )
    return "\n".join(lines)
