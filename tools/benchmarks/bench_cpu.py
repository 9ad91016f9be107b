"""`bench.py cpu`: the op, its peers and the limit of the machine, timed in turns in one process.

Which candidates there are, and how each is timed; options, tables and files are bench.py's.

Everything runs inside a graph, as in `fit` and `predict`. A graph with a chain of several ops minus a graph with one,
over the difference in number, is the time of one op: calling a function, and the first op's output, which cannot lie in
an argument's memory, cancel. XLA fuses across a chain, which it could not do across the convolutions of a network: in a
longer one it computes the first ops again for every later one, so the peers' chains are short there. Taking the better
one of graph and XLA is in their favour.

In a training chain every op reads what the one before it keeps, so forward is never in place there, as it is behind a
convolution: forward + backward takes us a little longer than in a network.

A junction is where a residual branch ends: a normalization, the shortcut added, relu. In a chain of them y is the next
one's x and every one has a shortcut of its own, an argument, whose gradient is a result: memory that lives on, as that
of a shortcut does, which the convolution at the start of its branch keeps. With the same shortcut for all, or an
earlier y, sums of gradients would be timed too, which belong to the network and not to the junction. Today's other way,
our linear op and two of TensorFlow's, gets no bias, which it had not; the peers' offset and our bias are trained.
"""

import ctypes
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator

import keras
import numpy as np
import tensorflow as tf

import tf_agc
from tf_agc import reference

# Every candidate is traced once for every shape, on purpose; TensorFlow warns of that.
tf.get_logger().setLevel("ERROR")

# Ten sizes from 10^4 to 10^8 elements, at equal steps of the logarithm.
SERIES = tuple((16, round(10 ** (4 + 4 * i / 9) / (16 * 32)), 1, 32) for i in range(10))

PASSES = ("forward in place", "forward fresh", "backward in place", "forward + backward", "eager forward + backward")
JUNCTION_PASSES = tuple(f"junction {passes}" for passes in PASSES)
# Passes over memory that the limit counts. A junction reads its shortcut too, in both, and writes the gradient of that.
_TRAFFIC = dict(zip(PASSES, (2, 2, 3, 5, 5), strict=True)) | dict(zip(JUNCTION_PASSES, (3, 3, 5, 8, 8), strict=True))

# One timing repeats its call for at least this long, and a repetition of everything is done at least so often.
_MIN_SECONDS = 0.02
_REPETITIONS = 7


def _longest_chain(elements: int) -> int:
    """More ops where one op is little against calling a function."""
    return 4 if elements > 2**20 else 16


def _chain_length(candidate: "_Candidate", elements: int) -> int:
    """Ops in the longer chain of a candidate."""
    return 2 if candidate.jit and candidate.role == "peer" else _longest_chain(elements)


@dataclasses.dataclass(frozen=True)
class Job:
    """What is timed in turns.

    Attributes:
        shape: (N, H, W, C), whatever the layout.
        data_format: "channels_last" or "channels_first".
        dtype: of the maps.
        junction: whether each candidate is followed by the addition of a shortcut, then relu, or by relu alone.
        peers: whether the peers are timed too, or ours and relu only.
    """

    shape: tuple[int, int, int, int]
    data_format: str
    dtype: str
    junction: bool = False
    peers: bool = True

    def __str__(self) -> str:
        return f"{','.join(map(str, self.shape))} {self.data_format} {self.dtype}{' junction' * self.junction}"

    def made(self, row: "Row") -> bool:
        """Whether the row came from timing this."""
        wanted = (self.shape, self.data_format, self.dtype, self.junction)
        return (row.shape, row.data_format, row.dtype, row.passes in JUNCTION_PASSES) == wanted


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured time.

    Attributes:
        shape, data_format, dtype: as in Job.
        passes: one of PASSES, or of JUNCTION_PASSES.
        candidate: what was timed; "limit" is the copy.
        role: "ours", "peer", "floor" (relu alone) or "limit".
        ms: median milliseconds of one op.
        spread_ms: half the distance between the quartiles.
        limit_ms: the copy's time for the passes over memory that this needs at least.
    """

    shape: tuple[int, int, int, int]
    data_format: str
    dtype: str
    passes: str
    candidate: str
    role: str
    ms: float
    spread_ms: float
    limit_ms: float


@dataclasses.dataclass
class _Timer:
    """Times `call`, in seconds of one call; `repeat` calls make one timing."""

    call: Callable[[], object]
    repeat: int = 1

    def warm_up(self) -> None:
        self.call()
        start = time.perf_counter()
        self.call()
        self.repeat = max(1, round(_MIN_SECONDS / (time.perf_counter() - start)))

    def seconds(self) -> float:
        start = time.perf_counter()
        for _ in range(self.repeat):
            self.call()
        return (time.perf_counter() - start) / self.repeat


# An op under test: makes the layer number i of a chain, a function of x and, of a junction, of its shortcut, else of
# None; and lists the parameters that are trained.
_MakeLayer = Callable[[int], tuple[Callable[[tf.Tensor, tf.Tensor | None], tf.Tensor], list]]


@dataclasses.dataclass(frozen=True)
class _Candidate:
    name: str
    role: str
    make_layer: _MakeLayer
    jit: bool = False
    trained: bool = True


class Copy:
    """The machine's limit: copies of the same bytes on the same number of threads."""

    def __init__(self, library: pathlib.Path, threads: int) -> None:
        self._copy = ctypes.CDLL(str(library)).TfAgcCopy
        self._copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_int] * 3]
        self._copy.restype = None
        self._threads = threads

    def timers(self, size: int) -> list[Callable[[], float]]:
        """Returns functions that time one copy of `size` bytes, one with plain and one with streaming stores."""
        memory = [np.ones(size + 64, np.int8) for _ in range(2)]
        to, source = (array.ctypes.data + -array.ctypes.data % 64 for array in memory)
        repeat = max(2, round(2e8 / size))

        def seconds(streaming: int, _keep=memory) -> float:
            start = time.perf_counter()
            self._copy(to, source, size, self._threads, streaming, repeat)
            return (time.perf_counter() - start) / repeat

        return [lambda: seconds(0), lambda: seconds(1)]


def measure(copy: Copy, job: Job, quick: bool) -> Iterator[Row | str]:
    """Times every candidate at one shape; yields rows, and a sentence for each candidate that cannot run or be timed.

    Args:
        copy: the limit.
        job: what is timed.
        quick: three repetitions instead of seven.
    """
    x, dy, shortcuts = _maps(job)
    timers: dict[str, dict[str, _Timer]] = {}
    candidates = {}
    for candidate in _candidates(job):
        try:
            made = _make_timers(candidate, x, dy, shortcuts)
            for timer in made.values():
                timer.warm_up()
        except (tf.errors.OpError, ValueError, NotImplementedError) as error:
            yield f"{candidate.name} does not run at {job}: {str(error).splitlines()[0]}"
            continue
        timers[candidate.name] = made
        candidates[candidate.name] = candidate
    copies = copy.timers(x.shape.num_elements() * x.dtype.size)

    seconds: dict[tuple[str, str], list[float]] = {}
    limits: tuple[list[float], ...] = ([], [])
    for _ in range(3 if quick else _REPETITIONS):
        for samples, timer in zip(limits, copies, strict=True):
            samples.append(timer())
        for name, made in timers.items():
            once = {key: timer.seconds() for key, timer in made.items()}
            for passes, value in _per_op(once, _chain_length(candidates[name], x.shape.num_elements())):
                seconds.setdefault((name, passes), []).append(value)

    copied = min(limits, key=statistics.median)

    def row(passes, candidate, role, samples) -> Row:
        passes = f"junction {passes}" if job.junction else passes
        limit = [value * _TRAFFIC[passes] / 2 for value in copied]
        lower, middle, upper = (1e3 * value for value in statistics.quantiles(samples or limit, n=4))
        return Row(
            job.shape,
            job.data_format,
            job.dtype,
            passes,
            candidate,
            role,
            ms=middle,
            spread_ms=(upper - lower) / 2,
            limit_ms=1e3 * statistics.median(limit),
        )

    for passes in ("forward in place", "backward in place", "forward + backward"):
        yield row(passes, "limit", "limit", None)
    for (name, passes), samples in seconds.items():
        if candidates[name].role != "ours" and statistics.median(samples) <= 0:
            yield f"{name}, {passes}: too short to be timed at {job}"
            continue
        yield row(passes, name, candidates[name].role, samples)


def _per_op(once: dict[str, float], length: int) -> Iterable[tuple[str, float]]:
    """Seconds of one op out of the seconds of chains of `length` ops and of one."""

    def difference(key: str) -> float:
        return (once[f"{key} long"] - once[f"{key} short"]) / (length - 1)

    forward = difference("forward")
    yield "forward in place", forward
    if "fresh long" in once:
        forward = difference("fresh")  # as in the training chain
        yield "forward fresh", forward
    if "training long" in once:
        training = difference("training")
        yield "forward + backward", training
        yield "backward in place", training - forward
    if "eager" in once:
        yield "eager forward + backward", once["eager"]


def _maps(job: Job) -> tuple[tf.Tensor, tf.Tensor, list[tf.Tensor | None]]:
    """x, dy, and a shortcut for every layer of the longest chain."""
    n, h, w, c = job.shape
    size = (n, h, w, c) if job.data_format == "channels_last" else (n, c, h, w)

    def maps(seed: int) -> tf.Tensor:
        return tf.cast(tf.random.stateless_normal(size, [7, seed]), job.dtype)

    return maps(0), maps(1), [maps(2 + i) if job.junction else None for i in range(_longest_chain(n * h * w * c))]


def _make_timers(candidate: _Candidate, x: tf.Tensor, dy: tf.Tensor, shortcuts: list) -> dict[str, _Timer]:
    longest = _chain_length(candidate, x.shape.num_elements())
    layers, parameters = zip(*(candidate.make_layer(i) for i in range(longest)), strict=True)

    def forward(length):
        @tf.function(jit_compile=candidate.jit)
        def chain(y, shortcuts):
            for layer, shortcut in zip(layers[:length], shortcuts, strict=True):
                y = layer(y, shortcut)
            return y

        return _Timer(lambda: chain(x, shortcuts[:length]))

    def fresh(length):
        @tf.function
        def several(x, shortcuts):
            # One after the other, as in a network, each with an element read, or it would be pruned. All take x, so no
            # output can lie in it.
            elements = []
            for layer, shortcut in zip(layers[:length], shortcuts, strict=True):
                with tf.control_dependencies(elements):
                    elements.append(layer(x, shortcut)[0, 0, 0, :1])
            return elements

        return _Timer(lambda: several(x, shortcuts[:length]))

    def training(length):
        trained = [parameter for of_layer in parameters[:length] for parameter in of_layer]

        @tf.function(jit_compile=candidate.jit)
        def gradients(x, shortcuts, dy):
            maps = [x, *(shortcut for shortcut in shortcuts if shortcut is not None)]
            with tf.GradientTape() as tape:
                tape.watch(maps)
                y = x
                for layer, shortcut in zip(layers[:length], shortcuts, strict=True):
                    y = layer(y, shortcut)
            return tape.gradient(y, [*maps, *trained], output_gradients=dy)

        return _Timer(lambda: gradients(x, shortcuts[:length], dy))

    def eager():
        maps = [x, *(shortcut for shortcut in shortcuts[:1] if shortcut is not None)]
        with tf.GradientTape() as tape:
            tape.watch(maps)
            y = layers[0](x, shortcuts[0])
        return tape.gradient(y, [*maps, *parameters[0]], output_gradients=dy)

    timers = {"forward long": forward(longest), "forward short": forward(1)}
    if candidate.trained:
        timers |= {"training long": training(longest), "training short": training(1)}
    if not candidate.jit:
        timers |= {"fresh long": fresh(longest), "fresh short": fresh(1)}
        if candidate.role == "ours":
            timers["eager"] = _Timer(eager)
    return timers


def _candidates(job: Job) -> Iterator[_Candidate]:
    channels = job.shape[-1]
    data_format = job.data_format
    axis = -1 if data_format == "channels_last" else 1

    def parameters(i: int) -> list[tf.Variable]:
        # Different values, or equal ops on equal inputs would be merged into one.
        return [tf.Variable(tf.ones(channels) + 0.01 * i), tf.Variable(tf.ones(channels))]

    def end(y, shortcut):
        return tf.nn.relu(y if shortcut is None else y + shortcut)

    def agc_parameters(i: int) -> list[tf.Variable | None]:
        # With a bias where the peers' offset ends a branch.
        return [*parameters(i), tf.Variable(tf.zeros(channels)) if job.junction else None]

    def ours(i):
        gain, mean_scale, bias = trained = agc_parameters(i)

        def layer(x, shortcut):
            return tf_agc.agc(x, gain, mean_scale, bias, shortcut, activation="relu", data_format=data_format)

        return layer, [parameter for parameter in trained if parameter is not None]

    def ours_as_three_ops(i):
        gain, mean_scale = trained = parameters(i)

        def layer(x, shortcut):
            return end(tf_agc.agc(x, gain, mean_scale, data_format=data_format), shortcut)

        return layer, trained

    def composite(i):
        gain, mean_scale, bias = trained = agc_parameters(i)

        def layer(x, shortcut):
            return reference.agc(x, gain, mean_scale, "relu", 0.0, data_format, bias=bias, shortcut=shortcut)[0]

        return layer, [parameter for parameter in trained if parameter is not None]

    def batch_norm(i):
        scale, offset = parameters(i)
        layout = "NHWC" if data_format == "channels_last" else "NCHW"

        def normalize(x):
            return tf.compat.v1.nn.fused_batch_norm(x, scale, offset, is_training=True, data_format=layout)[0]

        return normalize, [scale, offset]

    def fused_batch_norm(i):
        normalize, trained = batch_norm(i)
        return lambda x, shortcut: end(normalize(x), shortcut), trained

    def cast_fused_batch_norm(i):
        normalize, trained = batch_norm(i)

        def layer(x, shortcut):
            y = normalize(tf.cast(x, tf.float32))
            if shortcut is None:
                return tf.cast(tf.nn.relu(y), x.dtype)
            return end(tf.cast(y, x.dtype), shortcut)

        return layer, trained

    def keras_layer(make):
        def make_layer(_i):
            layer = make()
            layer.build((None, *(job.shape[1:] if axis == -1 else (channels, *job.shape[1:3]))))
            trained = [weight.value for weight in layer.trainable_weights]
            return lambda x, shortcut: end(layer(x, training=True), shortcut), trained

        return make_layer

    def relu(_i):
        # Of relus that follow each other TensorFlow makes one op, which touches memory once for all of them.
        return lambda x, shortcut: tf.ensure_shape(end(x, shortcut), x.shape), []

    yield _Candidate("tf_agc", "ours", ours)
    yield _Candidate("tf_agc, XLA", "ours", ours, jit=True)
    if job.junction:
        yield _Candidate("tf_agc + Add + relu", "ours", ours_as_three_ops)
        yield _Candidate("tf_agc + Add + relu, XLA", "ours", ours_as_three_ops, jit=True)
    yield _Candidate("Add + relu alone" if job.junction else "relu alone", "floor", relu)
    if not job.peers:
        return
    groups = next(groups for groups in (8, 4, 3, 2, 1) if channels % groups == 0)
    stock = {
        "composite of stock ops": composite,
        "fused_batch_norm": fused_batch_norm,
    }
    policy = job.dtype if job.dtype == "float32" else f"mixed_{job.dtype}"
    stock |= {
        "keras BatchNormalization": keras_layer(lambda: keras.layers.BatchNormalization(axis=axis, dtype=policy)),
        "keras GroupNormalization": keras_layer(
            lambda: keras.layers.GroupNormalization(groups, axis=axis, dtype=policy)
        ),
        "keras LayerNormalization": keras_layer(lambda: keras.layers.LayerNormalization(axis=axis, dtype=policy)),
    }
    if job.dtype != "float32":  # for which it has no fast kernels of its own
        stock["fused_batch_norm in float32, cast"] = cast_fused_batch_norm
    for name, make_layer in stock.items():
        yield _Candidate(f"{name}, graph", "peer", make_layer)
        yield _Candidate(f"{name}, XLA", "peer", make_layer, jit=True)
