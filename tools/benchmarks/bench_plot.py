"""The plot of `bench.py report`: the op and its fastest peers against the limit. Reads rows, measures nothing."""

import pathlib

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt  # noqa: E402

_PEERS = (
    "fused_batch_norm",
    "keras BatchNormalization",
    "keras GroupNormalization",
    "keras LayerNormalization",
    "composite of stock ops",
)


def draw(rows: list, meta: dict[str, str], path: pathlib.Path) -> None:
    """Draws forward + backward of every channels_last float32 shape, of junctions too, and the series of sizes."""
    rows = [row for row in rows if row.data_format == "channels_last" and row.dtype == "float32"]
    compared = {row.shape for row in rows if row.role == "peer"}
    series = sorted({row.shape for row in rows} - compared, key=_elements)

    def draw_op(axes) -> None:
        names = {name: f"{name} + relu" for name in ("tf_agc", *_PEERS)}
        _draw_shapes(axes, rows, "forward + backward", names, 5)
        axes.set_title("float32, channels_last, relu")

    def draw_junctions(axes) -> None:
        names = {"tf_agc": "tf_agc, one op", "tf_agc + Add + relu": "tf_agc + Add + relu"}
        names |= {name: f"{name} + Add + relu" for name in _PEERS}
        _draw_shapes(axes, rows, "junction forward + backward", names, 8)
        axes.set_title("junctions, float32, channels_last")

    panels = []
    if any(row.passes == "forward + backward" and row.role == "peer" for row in rows):
        panels.append(draw_op)
    if any(row.passes == "junction forward + backward" and row.role == "peer" for row in rows):
        panels.append(draw_junctions)
    if series:
        panels.append(lambda axes: _draw_series(axes, rows, series))
    figure, axes = plt.subplots(1, len(panels), figsize=(2 + 6 * len(panels), 6), squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        panel(axis)
    caption = (
        f"{meta.get('cpu')}, {meta.get('threads')} threads, TensorFlow {meta.get('tensorflow')}, {meta.get('date')}"
    )
    figure.text(0.5, 0.005, caption, ha="center", fontsize=8, color="0.4")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_shapes(axes, rows, passes, names, copied) -> None:
    """Bars for each shape: `names` are candidates and how the legend calls them, the limit copies `copied` passes."""
    rows = [row for row in rows if row.passes == passes]
    shapes = sorted({row.shape for row in rows if row.role == "peer"}, key=lambda shape: -_elements(shape))
    height = 0.8 / len(names)
    for k, (name, label) in enumerate(names.items()):
        ratios = [_ratio(rows, shape, name) for shape in shapes]
        positions = [i + (k - (len(names) - 1) / 2) * height for i in range(len(shapes))]
        label = f"{label}, better of graph and XLA"
        axes.barh(positions, ratios, height, label=label, color="C3" if k == 0 else f"{0.4 + 0.5 * k / len(names):.2f}")
    axes.axvline(1, color="black", linewidth=1, label=f"limit: copy of {copied} tensor passes")
    axes.set_yticks(range(len(shapes)), ["x".join(map(str, shape)) for shape in shapes])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time of forward + backward in a graph / time of the copy")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.45, -0.13), ncols=2)


def _draw_series(axes, rows, series) -> None:
    for passes, style in (("forward in place", "C0o-"), ("forward + backward", "C3o-")):
        chosen = [row for shape in series for row in rows if (row.shape, row.passes) == (shape, passes)]
        ours = [row for row in chosen if row.candidate == "tf_agc"]
        sizes = [_elements(row.shape) for row in ours]
        axes.loglog(sizes, [row.ms for row in ours], style, label=passes)
        axes.loglog(sizes, [row.limit_ms for row in ours], style[:2] + "--", linewidth=1, label=f"limit, {passes}")
    axes.set_xlabel("elements")
    axes.set_ylabel("milliseconds")
    axes.set_title("cost against size, 32 channels, batch 16")
    axes.legend(fontsize=8)


def _ratio(rows, shape, name) -> float:
    chosen = [row for row in rows if row.shape == shape and row.candidate.split(",")[0] == name]
    return min((row.ms / row.limit_ms for row in chosen), default=float("nan"))


def _elements(shape) -> int:
    n, h, w, c = shape
    return n * h * w * c
