"""What the study shows: Markdown tables and plots of finished runs. Nothing is trained here, and no row is left out."""

import itertools
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import scipy.stats
from matplotlib.figure import Figure

from benchmarks.result_files import markdown_table
from study.study_results import Results, Run, StudyError

TITLES = {
    "agc": "AGC",
    "agc_alone": "AGC, first version",
    "batch_norm": "BatchNorm",
    "batch_norm_standardized": "BatchNorm, standardized",
    "group_norm": "GroupNorm",
    "group_norm_standardized": "GroupNorm, standardized",
    "none": "none",
    "agc_plain_kernels": "AGC, plain kernels",
    "agc_mean_scale_1": "AGC, mean scale 1",
    "agc_no_mean": "AGC, no mean subtracted",
    "agc_no_bias": "AGC, no bias",
    "agc_no_branch_factor": "AGC, branch factor 1",
}
_COLORS = dict(zip(TITLES, ("C3", "C1", "C0", "C9", "C2", "C8", "0.5", "C4", "C5", "k", "C6", "C7"), strict=True))


def standard_error(values: Sequence[float]) -> float:
    """Of a mean over seeds; NaN where there is one seed."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The difference of two means over seeds, and its margin: twice its standard error."""
    margin = 2 * math.hypot(standard_error(ours), standard_error(theirs))
    return statistics.mean(ours) - statistics.mean(theirs), margin


def p_value(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of Welch's t-test: how often seeds alone make means differ so much. NaN where one of them has one seed."""
    if min(len(ours), len(theirs)) < 2:
        return math.nan
    return float(scipy.stats.ttest_ind(ours, theirs, equal_var=False).pvalue)


def verdict(value: float, margin: float) -> str:
    if math.isnan(margin):
        return "one seed"
    return "equal" if abs(value) <= margin else "better" if value > 0 else "worse"


def _percent(runs: Iterable[Run]) -> list[float]:
    return [100 * run.accuracy for run in runs]


def _shown_margin(margin: float) -> str:
    return "" if math.isnan(margin) else f"{margin:.1f}"


def tables(results: Results) -> str:
    """Returns all tables in Markdown, one section for each data set and number of epochs."""
    parts = [_search_table([run for run in results.runs if run.split == "validation"])]
    for (dataset, epochs, precision), runs in _comparisons(results).items():
        parts.append(f"### {_title(dataset, epochs, precision)}")
        parts += [_accuracy_table(runs), _difference_table(runs), _smallest_batches(runs), _step_table(runs)]
    commits = sorted({run.commit for run in results.runs})
    versions = "; ".join(f"{key} {value}" for key, value in results.meta.items())
    return "\n\n".join([*filter(None, parts), f"{versions}; commits {', '.join(commits)}"])


def _title(dataset: str, epochs: int, precision: str) -> str:
    return f"{dataset}, {epochs} epoch{'s' if epochs > 1 else ''}, {precision}"


def _comparisons(results: Results) -> dict[tuple[str, int, str], list[Run]]:
    """The runs on the test split that may stand in one table."""
    found: dict[tuple[str, int, str], list[Run]] = {}
    for run in results.runs:
        if run.split == "test":
            found.setdefault((run.dataset, run.epochs, run.precision), []).append(run)
    for runs in found.values():
        for cell, group in _grouped(runs).items():
            rates = sorted({run.learning_rate for run in group})
            if len(rates) > 1:
                raise StudyError(
                    f"{', '.join(map(str, cell))} has runs at the learning rates {rates}: remove those of all but one"
                )
    return found


def _grouped(runs: Iterable[Run]) -> dict[tuple[str, int, str], list[Run]]:
    """The seeds of every network, batch size and normalization."""
    groups: dict[tuple[str, int, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.network, run.batch_size, run.normalization), []).append(run)
    order = list(TITLES)
    return {key: groups[key] for key in sorted(groups, key=lambda key: (key[0], -key[1], order.index(key[2])))}


def _search_table(runs: list[Run]) -> str:
    if not runs:
        return ""
    groups: dict[tuple[str, int, str, str, int, str], list[Run]] = {}
    for run in runs:
        key = (run.dataset, run.epochs, run.precision, run.network, run.batch_size, run.normalization)
        groups.setdefault(key, []).append(run)
    rows = [
        [
            _title(dataset, epochs, precision), network, str(batch), TITLES[method],
            ", ".join(
                f"{run.learning_rate:g}: {100 * run.accuracy:.1f}"
                for run in sorted(found, key=lambda run: run.learning_rate)
            ),
        ]
        for (dataset, epochs, precision, network, batch, method), found in groups.items()
    ]  # fmt: skip
    title = "Validation accuracy % by learning rate, one seed; the best one is used:"
    return title + "\n\n" + markdown_table(["data set", "network", "batch", "method", "rate: accuracy"], rows)


def _by_batch(runs: list[Run], cell: Callable[[list[Run]], str]) -> str:
    """One line for each network and method, one column for each batch size."""
    groups = _grouped(runs)
    batches = sorted({batch for _, batch, _ in groups})
    lines = dict.fromkeys((network, method) for network, _, method in groups)
    rows = [
        [network, TITLES[method], *(cell(groups.get((network, batch, method), [])) for batch in batches)]
        for network, method in sorted(lines, key=lambda line: (line[0], list(TITLES).index(line[1])))
    ]
    return markdown_table(["network", "method", *(f"batch {batch}" for batch in batches)], rows)


def _accuracy_table(runs: list[Run]) -> str:
    def cell(seeds: list[Run]) -> str:
        values = _percent(seeds)
        if not values:
            return ""
        return f"{statistics.mean(values):.1f} " + (
            f"± {2 * standard_error(values):.1f}" if values[1:] else "(one seed)"
        )

    return "Test accuracy %, mean over seeds ± twice its standard error:\n\n" + _by_batch(runs, cell)


def _difference_table(runs: list[Run]) -> str:
    groups = _grouped(runs)
    rows = []
    for (network, batch, method), ours in groups.items():
        for other in TITLES if method == "agc" else ():
            if other == "agc":
                continue
            theirs = groups.get((network, batch, other))
            if theirs:
                value, margin = difference(_percent(ours), _percent(theirs))
                p = p_value(_percent(ours), _percent(theirs))
                rows.append(
                    [
                        network, str(batch), TITLES[other], f"{value:+.1f}", _shown_margin(margin),
                        "" if math.isnan(p) else f"{p:.2g}", verdict(value, margin), _step_ratio(ours, theirs),
                    ]
                )  # fmt: skip
    title = (
        "AGC against the others, in points of test accuracy; equal is within the margin, twice the standard error. "
        "With three seeds that is a weak test; p is that of Welch's, which counts how few they are. The last column is "
        "the other's step time over AGC's, medians over seeds on the same machine:"
    )
    header = ["network", "batch", "against", "difference", "margin", "p", "AGC is", "step time, x AGC's"]
    return title + "\n\n" + markdown_table(header, rows)


def _step_ratio(ours: list[Run], theirs: list[Run]) -> str:
    """Their step time over ours; empty where no machine measured both."""
    for machine in dict.fromkeys(run.machine for run in ours):
        times = [
            statistics.median(run.seconds_per_step for run in runs if run.machine == machine)
            for runs in (ours, theirs)
            if any(run.machine == machine for run in runs)
        ]
        if len(times) == 2:
            return f"{times[1] / times[0]:.2f}"
    return ""


def _smallest_batches(runs: list[Run]) -> str:
    """How far every method falls from its largest batch to its smallest."""
    groups = _grouped(runs)
    rows = []
    for network, method in dict.fromkeys((network, method) for network, _, method in groups):
        batches = sorted(batch for name, batch, other in groups if (name, other) == (network, method))
        if len(batches) > 1:
            smallest, largest = batches[0], batches[-1]
            value, margin = difference(*(_percent(groups[network, batch, method]) for batch in (smallest, largest)))
            shown = _shown_margin(margin)
            rows.append([network, TITLES[method], f"{smallest}, {largest}", f"{value:+.1f}", shown])
    if not rows:
        return ""
    title = "Every method's smallest batch against its largest, in points of test accuracy:"
    return title + "\n\n" + markdown_table(["network", "method", "batches", "difference", "margin"], rows)


def _step_table(runs: list[Run]) -> str:
    """Times and memory of one machine are compared with each other alone."""
    texts = []
    for machine, group in itertools.groupby(sorted(runs, key=lambda run: run.machine), key=lambda run: run.machine):
        chosen = list(group)
        steps = _by_batch(chosen, lambda seeds: _median(1e3 * run.seconds_per_step for run in seeds))
        peaks = _by_batch(chosen, lambda seeds: _median(run.peak_mib for run in seeds))
        texts.append(f"Milliseconds a step, median over seeds ({machine}):\n\n{steps}")
        texts.append(f"Peak resident memory in training, MiB ({machine}):\n\n{peaks}")
    return "\n\n".join(texts)


def _median(values: Iterable[float]) -> str:
    values = list(values)
    return f"{statistics.median(values):.4g}" if values else ""


def draw(results: Results) -> list[pathlib.Path]:
    """Draws every comparison into PNG files beside the results; returns their paths."""
    paths = []
    for (dataset, epochs, precision), runs in _comparisons(results).items():
        cells = {run.cell for run in runs}
        curves = [point for point in results.curves if point.cell in cells]
        gains = [record for record in results.gains if record.cell in cells and record.normalization == "agc"]
        figures = {"memory": _memory_figure(runs)}
        if len({run.batch_size for run in runs}) > 1:
            figures["accuracy"] = _accuracy_figure(runs)
        for network in sorted({point.network for point in curves}):
            figures[f"curves_{network}"] = _curves_figure([point for point in curves if point.network == network])
        for network in sorted({record.network for record in gains}):
            figures[f"gains_{network}"] = _gains_figure([record for record in gains if record.network == network])
        for name, figure in figures.items():
            figure.suptitle(_title(dataset, epochs, precision))
            paths.append(results.directory / f"{dataset}_{epochs}_{precision}_{name}.png")
            figure.savefig(paths[-1], dpi=110)
    return paths


def _panels(columns: int, rows: int = 1, height: float = 4.0, **shared: Any) -> tuple[Figure, list]:
    figure = Figure(figsize=(1 + 4.5 * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared).tolist()


def _accuracy_figure(runs: list[Run]) -> Figure:
    groups = _grouped(runs)
    networks = list(dict.fromkeys(network for network, _, _ in groups))
    figure, [panels] = _panels(len(networks), sharex=True, sharey=True)
    ticks = sorted({batch for _, batch, _ in groups})
    for axes, network in zip(panels, networks, strict=True):
        for method, title in TITLES.items():
            batches = [batch for name, batch, other in groups if (name, other) == (network, method)]
            values = [_percent(groups[network, batch, method]) for batch in batches]
            margins = [2 * standard_error(seeds) for seeds in values]
            means = [statistics.mean(seeds) for seeds in values]
            if batches:
                axes.errorbar(batches, means, margins, marker="o", capsize=3, color=_COLORS[method], label=title)
        axes.set(title=network, xlabel="batch size", xscale="log")
        axes.set_xticks(ticks, map(str, ticks), minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy %, ± 2 standard errors")
    panels[0].legend(fontsize=8)
    return figure


def _curves_figure(curves: list) -> Figure:
    """Of one network."""
    batches = sorted({point.batch_size for point in curves}, reverse=True)
    methods = {point.normalization for point in curves}
    figure, panels = _panels(len(batches), rows=2, height=3.5)
    for column, batch in enumerate(batches):
        for method, title in TITLES.items():
            if method not in methods:
                continue
            points = [
                point for point in curves if (point.batch_size, point.normalization, point.seed) == (batch, method, 0)
            ]
            ends = [point for point in points if not math.isnan(point.validation_accuracy)]
            style = {"marker": ".", "color": _COLORS[method]}
            panels[0][column].plot([point.epoch for point in points], [point.loss for point in points], **style)
            accuracies = [100 * point.validation_accuracy for point in ends]
            panels[1][column].plot([point.epoch for point in ends], accuracies, label=title, **style)
        panels[0][column].set_title(f"{curves[0].network}, batch {batch}", fontsize=9)
        panels[1][column].set_xlabel("epoch, seed 0")
    panels[0][0].set_ylabel("training loss")
    panels[1][0].set_ylabel("validation accuracy %")
    panels[1][0].legend(fontsize=7)
    return figure


def _memory_figure(runs: list[Run]) -> Figure:
    groups = _grouped(runs)
    sizes = list(dict.fromkeys((network, batch) for network, batch, _ in groups))
    figure, [[axes]] = _panels(1, height=2 + len(sizes))
    for row, size in enumerate(sizes):
        for index, method in enumerate(TITLES):
            if found := groups.get((*size, method)):
                peak = statistics.median(run.peak_mib for run in found)
                axes.barh(row + 0.13 * (index - 2.5), peak, 0.12, color=_COLORS[method], label=TITLES[method])
    axes.set_yticks(range(len(sizes)), [f"{network}, {batch}" for network, batch in sizes])
    axes.invert_yaxis()
    axes.set_xlabel("peak resident memory in training, MiB")
    titles = {title: bar for bar, title in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(titles.values(), titles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _gains_figure(gains: list) -> Figure:
    """Of one network."""
    batches = sorted({record.batch_size for record in gains}, reverse=True)
    figure, panels = _panels(len(batches), rows=2, height=3.5)
    for column, batch in enumerate(batches):
        chosen = [record for record in gains if record.batch_size == batch]
        epochs = sorted({record.epoch for record in chosen})
        for index, epoch in enumerate(epochs):
            color = str(0.85 * (1 - index / max(1, len(epochs) - 1)))
            layers = [record for record in chosen if record.epoch == epoch]
            for row, quantity in enumerate(("gain", "sparsity")):
                values = [getattr(record, quantity) for record in layers]
                panels[row][column].plot(range(1, len(values) + 1), values, ".-", color=color)
        panels[0][column].set_title(f"{gains[0].network}, batch {batch}", fontsize=9)
        panels[1][column].set(xlabel="AGC layer, in the order of execution", ylim=(0, 1))
    panels[0][0].set_ylabel("mean gain, light: before training")
    panels[1][0].set_ylabel("sparsity")
    return figure
