"""`tf_agc.export_saved_model`: models of all kinds, answered for by a process that has no tf_agc; what it refuses."""

import collections
import copy
import dataclasses
import errno
import pathlib
import re
import resource
import shutil
import sys
import threading
import weakref
from concurrent import futures

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework import versions_pb2
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework import op_def_library  # stands for the wrapper of a custom op's library

import tf_agc
from agc_testing import EPSILON, python
from serving import server_ops
from tf_agc import AutomaticGainControl, export, export_check, graph_marks, native, reference, saved_graph

pytestmark = pytest.mark.usefixtures("fresh_keras")

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "saved_model"
X = np.random.default_rng(0).standard_normal((3, 6, 5, 4)).astype(np.float32)


def _layers(dtype=None):
    """Gains and a bias that let a wrong map show, and channels that differ; without a bias, and with one."""
    random = keras.initializers.RandomNormal(1.5, 0.5)
    return [
        keras.layers.Conv2D(5, 3, use_bias=False, dtype=dtype),
        AutomaticGainControl("relu", gain_initializer=random, use_bias=False, dtype=dtype),
        keras.layers.Conv2D(3, 1, use_bias=False, dtype=dtype),
        AutomaticGainControl(
            "elu", alpha=0.5, gain_initializer="random_normal", bias_initializer="random_normal", dtype=dtype
        ),
        keras.layers.GlobalMaxPooling2D(dtype=dtype),
    ]


def _functional(dtype=None):
    outputs = inputs = keras.Input(X.shape[1:], name="image")
    for layer in _layers(dtype):
        outputs = layer(outputs)
    return keras.Model(inputs, outputs)


def _junctions(dtype=None):
    """Two residual blocks: with a bias and a shortcut, and with a shortcut alone."""
    inputs = keras.Input(X.shape[1:], name="image")
    x = keras.layers.Conv2D(4, 3, padding="same", dtype=dtype)(inputs)
    random = keras.initializers.RandomNormal(0.5, 0.5)
    x = AutomaticGainControl("relu", bias_initializer=random, dtype=dtype)(x, inputs)
    junction = AutomaticGainControl(
        "leaky_relu", negative_slope=0.1, gain_initializer=random, use_bias=False, dtype=dtype
    )
    x = junction(x * x, shortcut=x)
    return keras.Model(inputs, keras.layers.GlobalMaxPooling2D(dtype=dtype)(x))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.steps = _layers()

    def call(self, x, training=False):
        for layer in self.steps:
            x = layer(x)
        return x


class Wrapped(keras.layers.Layer):
    """A layer whose author wrapped call() in a tf.function, with control flow for AutoGraph."""

    def __init__(self):
        super().__init__()
        self.agc = AutomaticGainControl("leaky_relu")

    def build(self, input_shape):
        self.agc.build(input_shape)

    def compute_output_shape(self, input_shape):
        return input_shape

    @tf.function
    def call(self, x):
        if tf.reduce_max(x) > 1:
            x = x + 1
        return self.agc(x)


class Jit(Wrapped):
    @tf.function(jit_compile=True)
    def call(self, x):
        return self.agc(x)


def _subclassed():
    model = Subclassed()
    model(X)
    return model


def _nested():
    inputs = keras.Input(X.shape[1:])
    block = keras.Sequential([keras.layers.Conv2D(4, 3, padding="same"), AutomaticGainControl("relu")])
    return keras.Model(inputs, [_functional()(block(inputs)), Subclassed()(inputs)])


def _several_inputs():
    left, right = keras.Input(X.shape[1:], name="left"), keras.Input(X.shape[1:], name="right")
    left_agc, right_agc = AutomaticGainControl("relu")(left), AutomaticGainControl("relu6")(right)
    outputs = {"sum": left_agc + right_agc, "difference": left_agc - right_agc}
    return keras.Model({"left": left, "right": right}, outputs)


def _compiled(jit_compile):
    model = _functional()
    model.compile("sgd", "mse", jit_compile=jit_compile)
    model.fit(X, np.zeros((3, 3)), verbose=0)
    model.predict(X, verbose=0)
    return model


def _with(layer):
    """Called, and so traced with the native op, before it is exported."""
    model = keras.Sequential([keras.Input(X.shape[1:]), layer, keras.layers.GlobalAveragePooling2D()])
    model(X)
    return model


def _time_distributed():
    per_step = keras.Sequential([keras.layers.Conv1D(3, 2), AutomaticGainControl("relu")])
    return keras.Sequential([keras.Input(X.shape[1:]), keras.layers.TimeDistributed(per_step)])


def _free_size():
    inputs = keras.Input((None, None, 4))
    outputs = AutomaticGainControl("relu6", alpha=None)(keras.layers.Conv2D(3, 3)(inputs))
    return keras.Model(inputs, outputs)


MODELS = {
    "functional": _functional,
    "sequential": lambda: keras.Sequential([keras.Input(X.shape[1:]), *_layers()]),
    "subclassed": _subclassed,
    "nested": _nested,
    "several_inputs": _several_inputs,
    "compiled": lambda: _compiled(False),
    "jit_compiled": lambda: _compiled(True),
    "traced": lambda: _with(Wrapped()),
    "traced_for_xla": lambda: _with(Jit()),
    "time_distributed": _time_distributed,
    "free_size": _free_size,
    "junctions": _junctions,
    "mixed_bfloat16 junctions": lambda: _junctions("mixed_bfloat16"),
    "mixed_float16": lambda: _functional("mixed_float16"),
    "mixed_bfloat16": lambda: _functional("mixed_bfloat16"),
    "float64": lambda: _functional("float64"),
}

_ANSWER = """
import pathlib, sys
sys.modules["tf_agc"] = None  # an import of it would fail
import numpy as np, tensorflow as tf
where = pathlib.Path(sys.argv[1])
for model in where.iterdir():
    signature = tf.saved_model.load(str(model / "1")).signatures["serving_default"]
    inputs = np.load(model / "inputs.npz")
    answers = signature(**{name: tf.constant(value) for name, value in inputs.items()})
    np.savez(model / "answers.npz", **{name: tf.cast(value, tf.float64) for name, value in answers.items()})
"""


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """The directory of the exports of all models."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def answered(where):
    """The models, their answers here, and those of their portable exports in one process without tf_agc."""
    if not native.STATUS.available:
        pytest.fail(f"this test needs the native library: {native.STATUS.reason}")
    models = {}
    for name, make in MODELS.items():
        keras.utils.set_random_seed(1)
        model = make()
        version = tf_agc.export_saved_model(model, where / name)
        assert version == where / name / "1"
        arguments = {"left": X, "right": 2 * X} if name == "several_inputs" else X
        signature = tf.saved_model.load(str(version)).signatures["serving_default"]
        inputs = arguments if isinstance(arguments, dict) else dict.fromkeys(signature.structured_input_signature[1], X)
        dtypes = {key: spec.dtype for key, spec in signature.structured_input_signature[1].items()}
        np.savez(version.parent / "inputs.npz", **{key: tf.cast(v, dtypes[key]) for key, v in inputs.items()})
        models[name] = model, model(arguments)
    script = where.parent / "answer.py"
    script.write_text(_ANSWER)
    python(script, where)
    return {name: (model, want, np.load(where / name / "answers.npz")) for name, (model, want) in models.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_portable_model_answers_without_tf_agc(answered, name):
    _, want, got = answered[name]
    want = want if isinstance(want, dict) else {f"output_{i}": y for i, y in enumerate(tf.nest.flatten(want))}
    assert set(got) == set(want)
    name = name.partition(" ")[0]
    epsilon = EPSILON[name.removeprefix("mixed_") if name.startswith("mixed") or name == "float64" else "float32"]
    for key, value in want.items():
        value = tf.cast(value, tf.float64).numpy()
        assert np.abs(value).max() > 1e-3
        # Two layers of each kind: a handful of roundings each.
        np.testing.assert_allclose(got[key], value, rtol=0, atol=16 * epsilon * np.abs(value).max())


def _saved_model(version):
    return saved_model_pb2.SavedModel.FromString((version / "saved_model.pb").read_bytes())


@pytest.mark.parametrize("name", MODELS)
def test_the_oldest_stock_server_knows_all_of_it(answered, where, name):
    saved_model = _saved_model(where / name / "1")
    assert server_ops.unknown(saved_model) == []
    # What TensorFlow Serving looks for, besides.
    assert saved_model.saved_model_schema_version == 1
    (meta_graph_def,) = saved_model.meta_graphs
    assert list(meta_graph_def.meta_info_def.tags) == ["serve"]
    nodes = {node.name for node in meta_graph_def.graph_def.node}
    signature = meta_graph_def.signature_def["serving_default"]
    assert signature.method_name == "tensorflow/serving/predict"
    assert signature.inputs and signature.outputs
    for tensor in (*signature.inputs.values(), *signature.outputs.values()):
        assert tensor.name.partition(":")[0] in nodes


@pytest.mark.parametrize(
    "op, attributes, message",
    [
        ("TfAgc>Agc", {}, "the op TfAgc>Agc is not in server_ops.txt: server_ops.py says how it comes there"),
        ("Relu", {"T": 1, "turbo": 1}, "the op Relu has no attribute turbo"),
        ("Relu", {"T": 20}, "the attribute T of the op Relu must be one of .*DT_HALF.*, got DT_RESOURCE$"),
        ("Relu", {}, "the op Relu must have the attribute T"),
    ],
)
def test_what_a_stock_server_does_not_know(op, attributes, message):
    saved_model = saved_model_pb2.SavedModel()
    graph_def = saved_model.meta_graphs.add().graph_def
    graph_def.versions.producer = tf.version.GRAPH_DEF_VERSION
    node = graph_def.library.function.add().node_def.add(op=op)
    for name, value in attributes.items():
        node.attr[name].type = value
    (sentence,) = server_ops.unknown(saved_model)
    assert re.match(message, sentence)


@pytest.mark.parametrize(
    "versions, message",
    [
        ({"producer": 9999, "min_consumer": 9999}, "the graph needs a consumer of version 9999, the release is "),
        ({"producer": -1}, "the graph's producer is -1, the release reads those from 0"),
    ],
)
def test_graphs_that_a_stock_server_does_not_read(versions, message):
    saved_model = saved_model_pb2.SavedModel()
    saved_model.meta_graphs.add().graph_def.versions.MergeFrom(versions_pb2.VersionDef(**versions))
    (sentence,) = server_ops.unknown(saved_model)
    assert sentence.startswith(message)


def _ops(version):
    return [node.op for node in saved_graph.nodes(saved_graph.read(version))]


def test_the_model_is_left_as_it_was(tmp_path, counters):
    model = _compiled(False)
    model.add_metric = None  # of the user's own
    wrapped = Wrapped()
    wrapping = _with(wrapped)
    assert not wrapping.jit_compile  # Keras decides at the first reading
    layers = [*model._flatten_layers(), *wrapping._flatten_layers()]
    before = [dict(vars(layer)) for layer in layers]
    weights = model.get_weights()

    tf_agc.export_saved_model(model, tmp_path / "model")
    tf_agc.export_saved_model(wrapping, tmp_path / "wrapping")

    for layer, attributes in zip(layers, before, strict=True):
        # Keras itself leaves these behind, empty, where it writes a SavedModel.
        functions = {"train_function", "test_function", "predict_function"}
        added = vars(layer).keys() - attributes.keys()
        assert added <= functions and all(vars(layer)[name] is None for name in added)
        assert all(vars(layer)[name] is value for name, value in attributes.items()), layer
    for weight, value in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(weight, value)
    # What was traced in the export, and what is traced now, is the native op as ever.
    counters.reset()
    model.predict(X, verbose=0)
    wrapping.predict(X[:, :5], verbose=0)
    assert counters.read()["forward"] == 3


@pytest.mark.parametrize("make", [_functional, _junctions])
def test_native_keeps_the_op_and_every_bit(tmp_path, capsys, native_required, make):
    model = make()
    version = tf_agc.export_saved_model(model, tmp_path / "net", portable=False)
    assert _ops(version).count("TfAgc>Agc") == 2
    assert capsys.readouterr().out == (
        f"Exported '{model.name}' to {version}: serving_default; 2 x TfAgc>Agc; "
        "answers differ from the model's by at most 0 of the largest.\n"
    )
    answers = tf.saved_model.load(str(version)).signatures["serving_default"](image=X)
    np.testing.assert_array_equal(answers["output_0"], tf.function(model)(X))


class StochasticDepth(keras.layers.Layer):
    """Drops a residual branch in training, which is what `call` takes it for unless it is told."""

    def __init__(self):
        super().__init__()
        self.agc = AutomaticGainControl("relu")

    def build(self, input_shape):
        self.agc.build(input_shape)

    def call(self, x, training=True):
        keep = tf.cast(tf.random.uniform([tf.shape(x)[0], 1, 1, 1]) < 0.5, x.dtype)
        return x + (2 * keep * self.agc(x) if training else self.agc(x))


TRAINING_ONLY = {
    "flip": lambda: keras.layers.RandomFlip(),
    "rotation": lambda: keras.layers.RandomRotation(0.5),
    "zoom": lambda: keras.layers.RandomZoom(0.5),
    "translation": lambda: keras.layers.RandomTranslation(0.5, 0.5),
    "contrast": lambda: keras.layers.RandomContrast(0.9),
    "crop": lambda: keras.layers.RandomCrop(4, 3),
    "pipeline": lambda: keras.layers.Pipeline([keras.layers.RandomFlip(), keras.layers.RandomRotation(0.5)]),
    "nested": lambda: keras.Sequential([keras.Input(X.shape[1:]), keras.layers.RandomFlip()]),
    "dropout": lambda: keras.layers.Dropout(0.5),
    "spatial dropout": lambda: keras.layers.SpatialDropout2D(0.5),
    "Gaussian dropout": lambda: keras.layers.GaussianDropout(0.5),
    "noise": lambda: keras.layers.GaussianNoise(1.0),
    "batch statistics": lambda: keras.layers.BatchNormalization(moving_mean_initializer="ones"),
    "stochastic depth": StochasticDepth,
}


@pytest.mark.parametrize("kind", TRAINING_ONLY)
def test_a_served_model_is_one_of_inference(tmp_path, capsys, kind):
    model = keras.Sequential([keras.Input(X.shape[1:]), TRAINING_ONLY[kind](), *_layers()])
    model.compile("sgd", "mse")
    model.fit(X, np.zeros((3, 3)), verbose=0)  # traces the layers for training
    version = tf_agc.export_saved_model(model, tmp_path / "net")
    assert "not compared" not in capsys.readouterr().out
    signature = tf.saved_model.load(str(version)).signatures["serving_default"]
    (name,) = signature.structured_input_signature[1]
    want = model(X, training=False).numpy()
    for _ in range(2):
        got = signature(**{name: tf.constant(X)})["output_0"].numpy()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_one_line_says_what_was_exported(tmp_path, capsys):
    version = tf_agc.export_saved_model(_functional(), str(tmp_path / "net"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"Exported 'functional' to {version}: serving_default; stock ops only; answers differ")
    tf_agc.export_saved_model(_functional(), tmp_path / "net", verbose=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("padding", ["copies", "zeros", "NaN"])
@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("alone", [True, False], ids=["op", "model"])
def test_a_sample_is_answered_alike_in_every_batch(tmp_path, native_required, portable, alone, padding):
    # A model server joins requests to batches and pads those to allowed sizes with copies of a sample.
    x = np.random.default_rng(1).standard_normal((3, 33, 31, 40)).astype(np.float32) if alone else X
    model = keras.Sequential([keras.Input(x.shape[1:]), AutomaticGainControl("relu")]) if alone else _functional()
    version = tf_agc.export_saved_model(model, tmp_path / "net", portable=portable)
    signature = tf.saved_model.load(str(version)).signatures["serving_default"]
    (name,) = signature.structured_input_signature[1]
    pad = {"copies": x[:1], "zeros": np.zeros_like(x[:1]), "NaN": np.full_like(x[:1], np.nan)}[padding]

    def answer(batch):
        return signature(**{name: tf.constant(batch)})["output_0"].numpy()

    single = np.concatenate([answer(x[i : i + 1]) for i in range(3)])
    assert np.isfinite(single).all() and single.std() > 1e-3
    for size in (3, 4, 8, 33):
        padded = np.concatenate([x, np.repeat(pad, size - 3, axis=0)])
        if alone and not portable:
            np.testing.assert_array_equal(answer(padded)[:3], single)
        else:
            np.testing.assert_allclose(answer(padded)[:3], single, rtol=1e-5, atol=1e-6)


def test_tensorflow_s_batching_changes_no_bit(tmp_path, native_required):
    # The scheduler that model servers have: it joins single requests, and pads to allowed sizes.
    x = np.random.default_rng(1).standard_normal((7, 33, 31, 40)).astype(np.float32)
    model = keras.Sequential([keras.Input(x.shape[1:]), AutomaticGainControl("elu")])
    version = tf_agc.export_saved_model(model, tmp_path / "net", portable=False)
    loaded = tf.saved_model.load(str(version))  # has the variables, which a traced call only refers to
    signature = loaded.signatures["serving_default"]
    (name,) = signature.structured_input_signature[1]
    sizes = []

    def noted(batch):
        sizes.append(len(batch))
        return batch

    @tf.nondifferentiable_batch_function(
        num_batch_threads=2, max_batch_size=8, batch_timeout_micros=50_000, allowed_batch_sizes=[4, 8]
    )
    def serve(batch):
        batch = tf.ensure_shape(tf.numpy_function(noted, [batch], tf.float32), (None, *x.shape[1:]))
        return signature(**{name: batch})["output_0"]

    with futures.ThreadPoolExecutor(7) as pool:
        batched = list(pool.map(lambda i: serve(tf.constant(x[i : i + 1])).numpy(), range(7)))
    assert sizes and set(sizes) <= {4, 8}
    for i, answer in enumerate(batched):
        np.testing.assert_array_equal(answer, signature(**{name: tf.constant(x[i : i + 1])})["output_0"])


# ---------------------------------------------------------------- signatures


def test_signatures_beside_the_model_s_own(tmp_path, native_required):
    model = _functional()
    features = keras.Model(model.input, model.layers[2].output)
    calls = tf.Variable(0.0, trainable=False)

    @tf.function(input_signature=[{"a": tf.TensorSpec([None, 6, 5, 4]), "b": tf.TensorSpec([None], tf.int64)}])
    def embed(inputs):
        calls.assign_add(1.0)
        return {"features": features(inputs["a"]), "b": inputs["b"], "calls": calls.read_value()}

    embed({"a": X, "b": tf.range(3, dtype=tf.int64)})  # a trace with the native op
    version = tf_agc.export_saved_model(model, tmp_path / "net", signatures={"embed": embed})
    assert not any(op.startswith("TfAgc") for op in _ops(version))
    assert calls.numpy() == 1  # the check puts back what it changes

    loaded = tf.saved_model.load(str(version))
    assert set(loaded.signatures) == {"serving_default", "embed"}
    names = list(loaded.signatures["embed"].structured_input_signature[1])
    inputs = dict(zip(sorted(names), [tf.constant(X), tf.range(3, dtype=tf.int64)], strict=True))
    got = loaded.signatures["embed"](**inputs)
    np.testing.assert_allclose(got["features"], features(X), rtol=1e-5, atol=1e-5)
    assert got["calls"].numpy() == 2 and got["b"].numpy().tolist() == [0, 1, 2]


def test_a_signature_in_place_of_the_model_s_own(tmp_path):
    model = Subclassed()
    model.build((None, *X.shape[1:]))  # never called, so its inputs are not known to Keras
    with pytest.raises(ValueError, match="the inputs of model '.*' are not known: call it on a batch, or pass a sign"):
        tf_agc.export_saved_model(model, tmp_path / "net")
    function = tf.function(lambda image: tf.nn.softmax(model(image)), input_signature=[tf.TensorSpec([None, 6, 5, 4])])
    version = tf_agc.export_saved_model(model, tmp_path / "net", signatures={"serving_default": function})
    signatures = tf.saved_model.load(str(version)).signatures
    assert set(signatures) == {"serving_default"}
    got = signatures["serving_default"](image=X)["output_0"]
    np.testing.assert_allclose(got, tf.nn.softmax(model(X)), rtol=1e-5)


def test_gradients_in_a_signature(tmp_path, native_required):
    def saliency_of(model):
        def saliency(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = model(x)
            return tape.gradient(y, x)

        return tf.function(saliency, input_signature=[tf.TensorSpec([None, 6, 5, 4])])

    model = _functional()
    want = saliency_of(model)(X)
    with pytest.raises(ValueError, match="with the custom op TfAgc>AgcGrad: build the .*implementation..reference.."):
        tf_agc.export_saved_model(model, tmp_path / "net", signatures={"saliency": saliency_of(model)})
    assert not (tmp_path / "net").exists()
    with tf_agc.implementation("reference"):
        version = tf_agc.export_saved_model(model, tmp_path / "net", signatures={"saliency": saliency_of(model)})
    got = tf.saved_model.load(str(version)).signatures["saliency"](tf.constant(X))["output_0"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_an_answer_that_varies_is_not_compared(tmp_path, capsys):
    @tf.function(input_signature=[tf.TensorSpec([None, 3])])
    def noise(x):
        return {"noisy": x + tf.random.normal([3]), "exact": x + 1}

    tf_agc.export_saved_model(_functional(), tmp_path / "net", signatures={"serving_default": noise})
    line = "answers differ from the model's by at most 0 of the largest; not compared: noisy of serving_default (varies"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda x: x + tf.random.normal([3]), "varies from call to call"),
        (lambda x: tf.sqrt(-1 - tf.abs(x)), "no finite entry"),
        (lambda x: x[:0], "no finite entry"),
    ],
)
def test_an_export_that_compared_nothing_says_so(tmp_path, capsys, function, reason):
    signatures = {"serving_default": tf.function(function, input_signature=[tf.TensorSpec([None, 3])])}
    tf_agc.export_saved_model(_functional(), tmp_path / "net", signatures=signatures)
    line = f"; no answers were compared; not compared: output_0 of serving_default ({reason}).\n"
    assert capsys.readouterr().out.endswith(line)


def _rounded(factor):
    """The definition, with other roundings or wrong."""
    correct = reference.agc

    def agc(*arguments, **named):
        y, mean = correct(*arguments, **named)
        return factor * y, mean

    return agc


def _discrete(dtype=None):
    """Whether roundings turn a pixel, a depth in integers and a class."""
    inputs = keras.Input((48, 48, 4))
    x = AutomaticGainControl(dtype=dtype)(inputs)
    shade = keras.ops.sigmoid(x)
    pixels = keras.ops.cast(255 * shade, "uint8")
    depth = keras.ops.cast(2.0**24 * keras.ops.cast(shade, "float32"), "int32")
    return keras.Model(inputs, {"pixels": pixels, "depth": depth, "class": keras.ops.argmax(x, -1)})


def test_roundings_turn_a_few_integers(tmp_path, monkeypatch, capsys, native_required):
    monkeypatch.setattr(reference, "agc", _rounded(1 + 1e-4))
    tf_agc.export_saved_model(_discrete(), tmp_path / "net")
    line = capsys.readouterr().out
    assert "answers differ from the model's in " in line and " of 41472 integers, bools and strings.\n" in line
    assert " in 0 of" not in line


@pytest.mark.parametrize(
    "dtype, factor, message",
    [
        (
            None,
            1.05,
            r"output 'pixels' .* in [1-9][0-9]\.\d\d% of 18432 entries \(by more than 0.001 .* the 1% that round",
        ),
        (None, -1, r"output 'pixels' .* differs from the model's in [89]\d\.\d\d% of 18432 entries"),
        ("mixed_float16", -1, r"output 'pixels' .* in [5-9]\d\.\d\d% of 18432 entries .* more than the 10% that round"),
        (
            "mixed_bfloat16",
            -1,
            r"output 'pixels' .* in [3-9]\d\.\d\d% of 18432 entries .* more than the 25% that round",
        ),
    ],
)
def test_a_wrong_graph_turns_many_integers(tmp_path, monkeypatch, native_required, dtype, factor, message):
    monkeypatch.setattr(reference, "agc", _rounded(factor))
    with pytest.raises(RuntimeError, match=message):
        tf_agc.export_saved_model(_discrete(dtype), tmp_path / "net")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_a_wrong_graph_turns_classes(tmp_path, monkeypatch, native_required, dtype):
    monkeypatch.setattr(reference, "agc", _rounded(-1))
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, keras.ops.argmax(AutomaticGainControl(dtype=dtype)(inputs), -1))
    with pytest.raises(RuntimeError, match=r"'output_0' .* differs from the model's in 100.00% of 128 entries"):
        tf_agc.export_saved_model(model, tmp_path / "net")


class Flipping:
    """A signature that is wrong in one of its two answers, in some of the calls."""

    variables = ()

    def __init__(self, calls):
        self.calls, self.count = calls, 0

    def __call__(self, x):
        self.count += 1
        positive = x > 0
        return {"output_0": tf.stack([positive[0] ^ (self.count in self.calls), positive[1]])}


@pytest.mark.parametrize("calls, asked, off", [((), 1, 0), ((1,), 50, 1), ((1, 2), 2, 2), ((1, 49), 49, 2)])
def test_few_integers_are_compared_for_more_inputs(calls, asked, off):
    function = tf.function(lambda x: x > 0, input_signature=[tf.TensorSpec([None])])
    endpoint = export_check.Endpoint(function, function.input_signature, function.get_concrete_function())
    signature = Flipping(calls)
    if off > 1:
        with pytest.raises(RuntimeError, match=rf"in {off / (2 * asked):.2%} of {2 * asked} entries"):
            export_check._compare("f", endpoint, signature, None, 1e-3, 0.01)
    else:
        comparison = export_check._compare("f", endpoint, signature, None, 1e-3, 0.01)["output_0"]
        assert (comparison.entries, comparison.off) == (2 * asked, off)
    assert signature.count == asked


Pair = collections.namedtuple("Pair", ["first", "second"])


@pytest.mark.parametrize(
    "outputs, names",
    [
        (lambda x: Pair(x, 2 * x), {"first", "second"}),
        (lambda x: (x, 3), {"output_0", "output_1"}),
        (lambda x: {"a b": x}, {"a b"}),
        (lambda x, scale=2.0: scale * x, {"output_0"}),
    ],
)
def test_outputs_have_names(tmp_path, outputs, names):
    signatures = {"serving_default": tf.function(outputs, input_signature=[tf.TensorSpec([None, 3])])}
    version = tf_agc.export_saved_model(_functional(), tmp_path / "net", signatures=signatures)
    assert set(tf.saved_model.load(str(version)).signatures["serving_default"].structured_outputs) == names


@pytest.mark.parametrize(
    "outputs, got",
    [
        (lambda x: {"a": {"b": x}, "c": x}, "'a': dict"),
        (lambda x: [x, {"b": x}], "'output_1': dict"),
        (lambda x: [x, [x, x]], "'output_1': list"),
        (lambda x: {1: x}, "the key 1"),
        (lambda x: {"a": x, "b": None}, "'b': NoneType"),
        (lambda x: None, "'output_0': NoneType"),
        (lambda x: {}, "no output"),
        (tf.RaggedTensor.from_tensor, "'output_0': RaggedTensor"),
        (tf.sparse.from_dense, "'output_0': SparseTensor"),
    ],
)
def test_bad_outputs(tmp_path, outputs, got):
    signatures = {"f": tf.function(outputs, input_signature=[tf.TensorSpec([None, 3])])}
    message = (
        f"signature 'f' must return a dense tensor, or a list, a tuple or a dict with str keys of them, got {got}$"
    )
    with pytest.raises(ValueError, match=message):
        tf_agc.export_saved_model(_functional(), tmp_path / "net", signatures=signatures)
    assert not (tmp_path / "net").exists()


def _of_inputs(*names):
    inputs = [keras.Input((3,), name=name) for name in names]
    return keras.Model(inputs, keras.layers.add([*inputs, inputs[0]]))


def test_input_names(tmp_path):
    # A server has the model's names; Python's loaded signature takes names of arguments.
    names = ["image-1", "a.b", "1st", "plain"]
    version = tf_agc.export_saved_model(_of_inputs(*names), tmp_path / "net", warmup=[np.ones((1, 3))] * 4)
    signature = tf.saved_model.load(str(version)).signatures["serving_default"]
    assert set(signature.structured_input_signature[1]) == {"image_1", "a_b", "arg_1st", "plain"}
    assert set(_records(version)[0].inputs) == set(names)
    assert set(saved_graph._read(version).meta_graphs[0].signature_def["serving_default"].inputs) == set(names)


@pytest.mark.parametrize(
    "names, message",
    [
        (
            ["x y"],
            "an input of signature 'serving_default' must have a name of the characters .*, got 'x y': rename it",
        ),
        (["bär"], "must have a name of the characters A-Z a-z 0-9 _ . - that does not begin with _ or -.*, got 'bär'"),
        (["_x"], "that does not begin with _ or - and is not 'self', got '_x'"),
        (["self"], "and is not 'self', got 'self'"),
        (
            ["a-b", "a.b"],
            "of signature 'serving_default' must have different names where each . and - is a _, got a-b, a.b",
        ),
    ],
)
def test_bad_input_names(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        tf_agc.export_saved_model(_of_inputs(*names), tmp_path / "net")
    assert not (tmp_path / "net").exists()


class TwoInputs(keras.Model):
    def call(self, x, y, training):
        return x + y


def test_a_model_of_two_arguments_needs_a_signature(tmp_path):
    model = TwoInputs(name="two")
    model(X, X, training=False)
    message = r"the call\(\) of model 'two' takes more than one input \(y\): pass a signature 'serving_default'"
    with pytest.raises(ValueError, match=message):
        tf_agc.export_saved_model(model, tmp_path / "net")
    assert not (tmp_path / "net").exists()
    spec = tf.TensorSpec([None, 3])
    function = tf.function(lambda x, y: model(x, y, training=False), input_signature=[spec, spec])
    tf_agc.export_saved_model(model, tmp_path / "net", signatures={"serving_default": function})


def _fixed(kind):
    inputs = keras.Input(batch_shape=(4, 8, 3), name="steps")
    if kind == "sequential":
        return keras.Sequential([inputs, AutomaticGainControl(), keras.layers.LSTM(2, stateful=True)])
    x = AutomaticGainControl()(inputs)
    x = keras.ops.reshape(x, (4, 24)) if kind == "reshape" else keras.layers.LSTM(2, stateful=True)(x)
    return keras.Model({"steps": inputs}, x)


@pytest.mark.parametrize("kind", ["reshape", "stateful", "sequential"])
def test_a_fixed_batch_size_stays(tmp_path, kind):
    model = _fixed(kind)
    version = tf_agc.export_saved_model(model, tmp_path / "net")
    signature = tf.saved_model.load(str(version)).signatures["serving_default"]
    (spec,) = signature.structured_input_signature[1].values()
    assert spec.shape.as_list() == [4, 8, 3]
    x = tf.constant(np.random.default_rng(1).standard_normal((4, 8, 3)), tf.float32)
    got = signature(**{spec.name: x})["output_0"]
    np.testing.assert_allclose(got, model({"steps": x} if kind != "sequential" else x), rtol=1e-5, atol=1e-6)


def test_a_first_call_fixes_no_batch_size(tmp_path):
    model = keras.Sequential(_layers())
    model(X)
    signature = tf.saved_model.load(str(tf_agc.export_saved_model(model, tmp_path / "net"))).signatures[
        "serving_default"
    ]
    (spec,) = signature.structured_input_signature[1].values()
    assert spec.shape.as_list() == [None, *X.shape[1:]]


_SPEC = [tf.TensorSpec([None, 6, 5, 4])]


@pytest.mark.parametrize(
    "signatures, error, message",
    [
        ([lambda x: x], TypeError, "signatures must be a dict of tf.functions, got list"),
        ({"a": lambda x: x}, TypeError, r"signatures\['a'\] must be a tf.function, got function: make it with"),
        ({"a": tf.function(lambda x: x)}, ValueError, r"signatures\['a'\] must have an input_signature, got None"),
        ({3: tf.function(abs, input_signature=_SPEC)}, ValueError, "a name in signatures must be a str .*, got 3"),
        ({"variables": tf.function(abs, input_signature=_SPEC)}, ValueError, "is none of .*, got 'variables'"),
        ({"_a": tf.function(abs, input_signature=_SPEC)}, ValueError, "does not start with '_' .*, got '_a'"),
        (
            {"a": tf.function(lambda x: tf.reshape(x, [-1, 7]), input_signature=[tf.TensorSpec([None, None])])},
            ValueError,
            r"signature 'a' takes no random inputs .*\(x \(None, None\)\): pass example inputs as warmup. .* multiple",
        ),
        (
            {"a": tf.function(abs, input_signature=[tf.RaggedTensorSpec([None, None])])},
            TypeError,
            r"the input_signature of signatures\['a'\] must have tf.TensorSpecs only, got a RaggedTensorSpec: a model",
        ),
        (
            {"a": tf.function(lambda x: tf.py_function(abs, [x], tf.float32), input_signature=_SPEC)},
            ValueError,
            "the model calls Python .* its graph has the ops EagerPyFunc",
        ),
    ],
)
def test_bad_signatures(tmp_path, signatures, error, message):
    with pytest.raises(error, match=message):
        tf_agc.export_saved_model(_functional(), tmp_path / "new" / "net", signatures=signatures)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- versions


def _names(directory):
    return sorted(entry.name for entry in directory.iterdir())


def test_versions_count_up_and_are_replaced_when_told_to(tmp_path):
    base = tmp_path / "net"
    for name in ("notes", "7", "-3", "1.5"):
        (base / name).mkdir(parents=True)
    (base / "7" / "saved_model.pb").write_text("an older one")
    model = _functional()
    assert tf_agc.export_saved_model(model, base).name == "8"
    (base / "8" / "mark").touch()
    assert tf_agc.export_saved_model(model, base, overwrite=True).name == "8"
    assert not (base / "8" / "mark").exists()
    assert (base / "7" / "saved_model.pb").read_text() == "an older one"
    assert _names(base) == ["-3", "1.5", "7", "8", "notes"]


def test_overwrite_replaces_nothing_but_a_saved_model(tmp_path):
    base = tmp_path / "photos"
    (base / "2024").mkdir(parents=True)
    (base / "2024" / "cat.jpg").touch()
    with pytest.raises(FileExistsError, match="overwrite replaces the directory of a SavedModel and nothing else, got"):
        tf_agc.export_saved_model(_functional(), base, overwrite=True)
    assert _names(base) == ["2024"] and _names(base / "2024") == ["cat.jpg"]


def test_the_old_version_returns_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    base = tmp_path / "net"
    version = tf_agc.export_saved_model(_functional(), base)
    rename, content = pathlib.Path.rename, (version / "saved_model.pb").read_bytes()

    def fails_once(source, target):
        if source.name.startswith(".export") and not source.name.endswith("replaced"):
            raise OSError(errno.EIO, "broken")
        return rename(source, target)

    monkeypatch.setattr(pathlib.Path, "rename", fails_once)
    with pytest.raises(OSError, match="broken"):
        tf_agc.export_saved_model(_functional(), base, overwrite=True)
    assert _names(base) == ["1"] and (version / "saved_model.pb").read_bytes() == content


def test_a_version_appears_complete(tmp_path, monkeypatch):
    # What a server that polls could see, at the moment before the last.
    seen = []
    check = export.check_answers

    def look_and_check(directory, *arguments):
        seen.extend(_names(directory.parent))
        return check(directory, *arguments)

    monkeypatch.setattr(export, "check_answers", look_and_check)
    version = tf_agc.export_saved_model(_functional(), tmp_path / "net")
    (staging,) = seen
    assert staging.startswith(".export-") and not staging.isdigit()
    assert _names(tmp_path / "net") == ["1"]
    # Another user's server can read it: mkdtemp, for one, would have made it private.
    (tmp_path / "made").mkdir()
    assert version.stat().st_mode == (tmp_path / "made").stat().st_mode


def test_exports_at_the_same_time_take_different_numbers(tmp_path):
    sources = [tmp_path / f".export-{i}" for i in range(16)]
    for source in sources:
        source.mkdir()
        (source / source.name).touch()
    barrier, versions = threading.Barrier(len(sources)), []

    def publish(source):
        barrier.wait()
        versions.append((export._publish(source, tmp_path, overwrite=False), source.name))

    threads = [threading.Thread(target=publish, args=[source]) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(version.name) for version, _ in versions) == list(range(1, 17))
    assert all((version / content).exists() for version, content in versions)


def test_numbers_that_no_server_reads(tmp_path):
    # Those of an int64 are read.
    base = tmp_path / "net"
    (base / str(2**63)).mkdir(parents=True)
    assert tf_agc.export_saved_model(_functional(), base).name == "1"
    (base / str(2**63 - 1)).mkdir()
    with pytest.raises(ValueError, match=f"path has the last version .*, there is no next one: .*{2**63 - 1}"):
        tf_agc.export_saved_model(_functional(), base)
    assert _names(base) == ["1", str(2**63 - 1), str(2**63)]


# ---------------------------------------------------------------- warm-up


def _records(version):
    from tensorflow_serving.apis import prediction_log_pb2

    file = version / "assets.extra" / "tf_serving_warmup_requests"
    records = [prediction_log_pb2.PredictionLog.FromString(r.numpy()) for r in tf.data.TFRecordDataset(str(file))]
    return [record.predict_log.request for record in records]


def test_warmup_records(tmp_path):
    scale = tf.function(
        lambda x, by: x * by, input_signature=[tf.TensorSpec([None], name="x"), tf.TensorSpec([], name="by")]
    )
    warmup = {"serving_default": X.astype(np.float64), "scale": ([1, 2], 3)}
    version = tf_agc.export_saved_model(_functional(), tmp_path / "net", signatures={"scale": scale}, warmup=warmup)
    requests = {request.model_spec.signature_name: request for request in _records(version)}
    assert set(requests) == {"serving_default", "scale"}
    assert {request.model_spec.name for request in requests.values()} == {"net"}
    image = requests["serving_default"].inputs["image"]
    assert image.dtype == tf.float32.as_datatype_enum
    np.testing.assert_array_equal(tf.make_ndarray(image), X)
    assert tf.make_ndarray(requests["scale"].inputs["x"]).tolist() == [1, 2]
    assert tf.make_ndarray(requests["scale"].inputs["by"]) == 3


@pytest.mark.parametrize("warmup", [[X, 2 * X], {"left": X, "right": 2 * X}, {"serving_default": [X, 2 * X]}])
def test_warmup_of_several_inputs(tmp_path, warmup):
    version = tf_agc.export_saved_model(_several_inputs(), tmp_path / "net", warmup=warmup)
    (request,) = _records(version)
    np.testing.assert_array_equal(tf.make_ndarray(request.inputs["right"]), 2 * X)


def test_warmup_is_what_the_check_uses_where_random_inputs_do_not_do(tmp_path):
    rows = tf.function(lambda x: tf.reshape(x, [-1, 7]), input_signature=[tf.TensorSpec([None, None])])
    signatures, warmup = {"serving_default": rows}, np.ones((2, 7))
    version = tf_agc.export_saved_model(_functional(), tmp_path / "net", signatures=signatures, warmup=warmup)
    assert _records(version)[0].inputs["x"].tensor_shape.dim[1].size == 7


@pytest.mark.parametrize(
    "warmup, message",
    [
        (X[..., :2], r"'image' must have dtype float32 and shape \(None, 6, 5, 4\), got float32 and \(3, 6, 5, 2\)"),
        ({"picture": X}, "warmup of 'serving_default' must have the inputs image, got picture"),
        ([X, X], r"'image' must have dtype float32 and shape .*, got float32 and \(2, 3, 6, 5, 4\)"),
        ("cat.jpg", "'image' must be convertible to float32: "),
        (X[:0], r"warmup of 'serving_default': 'image' must have entries, got the shape \(0, 6, 5, 4\)"),
        (tf.RaggedTensor.from_tensor(X), "'image' must be a dense tensor, got a RaggedTensor"),
        (tf.sparse.from_dense(X), "'image' must be a dense tensor, got a SparseTensor"),
    ],
)
def test_bad_warmup(tmp_path, warmup, message):
    with pytest.raises(ValueError, match=message):
        tf_agc.export_saved_model(_functional(), tmp_path / "net", warmup=warmup)
    assert not (tmp_path / "net").exists()


def test_warmup_must_be_complete(tmp_path):
    signatures = {"abs": tf.function(tf.abs, input_signature=[tf.TensorSpec([None])])}
    for warmup, got in [(X, "a ndarray"), ({"abs": [1.0]}, "the keys abs")]:
        with pytest.raises(ValueError, match=f"with inputs for each of serving_default, abs, got {got}"):
            tf_agc.export_saved_model(_functional(), tmp_path / "net", signatures=signatures, warmup=warmup)


def test_warmup_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving", None)
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    with pytest.raises(ImportError, match="warmup needs the package tensorflow-serving-api: pip install"):
        tf_agc.export_saved_model(_functional(), tmp_path / "net", warmup=X)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "model, error, message",
    [
        (AutomaticGainControl(), TypeError, "model must be a keras.Model, got AutomaticGainControl"),
        (
            keras.Sequential([AutomaticGainControl()], name="s"),
            ValueError,
            "model 's' is not built: call it on a batch",
        ),
    ],
)
def test_bad_models(tmp_path, model, error, message):
    with pytest.raises(error, match=message):
        tf_agc.export_saved_model(model, tmp_path)


@pytest.mark.parametrize("name", ["portable", "overwrite"])
def test_switches_are_bools(tmp_path, name):
    with pytest.raises(TypeError, match=f"{name} must be a bool, got 'no'"):
        tf_agc.export_saved_model(_functional(), tmp_path, **{name: "no"})


def test_the_scope_of_a_strategy(tmp_path):
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = _functional()
        message = (
            "must be called outside of the scope of a tf.distribute strategy, got the scope of a MirroredStrategy: "
        )
        with pytest.raises(RuntimeError, match=message):
            tf_agc.export_saved_model(model, tmp_path / "net")
    assert not (tmp_path / "net").exists()
    tf_agc.export_saved_model(model, tmp_path / "net")


@pytest.mark.parametrize("path", ["file", "file/below", "dangling/below", "n" * 256])
def test_paths_that_cannot_be_made(tmp_path, path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "nowhere")
    with pytest.raises(OSError, match="path cannot be written: .*: '.*" + path):
        tf_agc.export_saved_model(_functional(), tmp_path / path)
    assert _names(tmp_path) == ["dangling", "file"]


@pytest.mark.parametrize(
    "path, error, message",
    [
        (3, TypeError, "path must be a str or a pathlib.Path, got int"),
        (b"net", TypeError, "path must be a str or a pathlib.Path, got bytes"),
        ("", ValueError, "path must be a local directory, got ''"),
        ("gs://bucket/net", ValueError, "path must be a local directory, got 'gs://bucket/net' .export locally"),
        (
            "a[1]/net",
            ValueError,
            r"path must be without the characters \* \? \[ \\ and NUL, got '\[' in '.*/a\[1\]/net'",
        ),
        ("net*", ValueError, r"path must be without .*, got '\*' in"),
        ("net?", ValueError, r"path must be without .*, got '\?' in"),
        ("a\\net", ValueError, r"path must be without .*, got '\\\\' in"),
        ("net\0", ValueError, r"path must be without .*, got '\\x00' in"),
        (FIXTURE / "model", ValueError, "for numbered versions, got one with a SavedModel in it"),
    ],
)
def test_bad_paths(path, error, message):
    with pytest.raises(error, match=message):
        tf_agc.export_saved_model(_functional(), path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_directory_that_is_read_only(tmp_path, monkeypatch, number):
    # Root, who may run the tests, writes everywhere.
    def mkdir(self, *arguments, **keywords):
        raise OSError(number, "No writing here", str(self))

    monkeypatch.setattr(pathlib.Path, "mkdir", mkdir)
    with pytest.raises(OSError, match=f"path cannot be written: No writing here: '{tmp_path}'") as caught:
        tf_agc.export_saved_model(_functional(), tmp_path)
    assert caught.value.errno == number
    assert _names(tmp_path) == []


def test_a_disk_that_is_full_for_the_weights(tmp_path):
    model = _functional()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # a write beyond fails, in TensorFlow's C++ too
    try:
        with pytest.raises(OSError, match="path cannot be written: '.*net': .* File too large"):
            tf_agc.export_saved_model(model, tmp_path / "new" / "net")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _names(tmp_path) == []


def test_a_disk_that_is_full_for_the_graph(tmp_path, monkeypatch):
    def write_bytes(self, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(pathlib.Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="path cannot be written: No space left on device: ") as caught:
        tf_agc.export_saved_model(_functional(), tmp_path / "net")
    assert caught.value.errno == errno.ENOSPC
    assert _names(tmp_path) == []


class Custom(keras.layers.Layer):
    """Makes an op that TensorFlow has no wrapper for, as those of other libraries."""

    def call(self, x):
        return op_def_library.apply_op("KthOrderStatistic", input=x, k=1)[:, tf.newaxis]

    def compute_output_spec(self, x):
        return keras.KerasTensor((x.shape[0], 1))


def test_custom_ops_of_others_are_named(tmp_path):
    model = keras.Sequential([keras.Input((4, 3)), AutomaticGainControl(), keras.layers.Flatten(), Custom()])
    with pytest.raises(ValueError, match="stock TensorFlow ops only, .* the custom ops KthOrderStatistic: leave out"):
        tf_agc.export_saved_model(model, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_xla_s_own_ops_are_stock(tmp_path):
    # keras.ops.slice_update makes one.
    inputs = keras.Input((4, 3))
    outputs = AutomaticGainControl()(keras.ops.slice_update(inputs, (0, 0, 0), keras.ops.ones((1, 1, 1))))
    version = tf_agc.export_saved_model(keras.Model(inputs, outputs), tmp_path / "net")
    assert "XlaDynamicUpdateSlice" in _ops(version)


def test_a_wrong_answer_is_an_error(tmp_path, monkeypatch, native_required):
    correct = reference.agc

    def wrong(*arguments, **named):
        y, mean = correct(*arguments, **named)
        return 1.01 * y, mean

    monkeypatch.setattr(reference, "agc", wrong)
    (tmp_path / "net").mkdir()
    message = "output 'output_0' of the exported signature 'serving_default' differs from the model's by 0.0.* 0.001"
    with pytest.raises(RuntimeError, match=message):
        tf_agc.export_saved_model(_functional(), tmp_path / "net")
    assert _names(tmp_path / "net") == []


def test_native_is_native_in_every_scope(tmp_path, native_required):
    with tf_agc.implementation("reference"):
        version = tf_agc.export_saved_model(_functional(), tmp_path / "net", portable=False)
    assert _ops(version).count("TfAgc>Agc") == 2


def test_native_without_the_op(tmp_path, native_required):
    model = keras.Sequential([keras.Input(X.shape[1:]), AutomaticGainControl(name="agc")])
    signatures = {"serving_default": tf.function(lambda x: 2 * x, input_signature=_SPEC)}
    with pytest.raises(
        ValueError, match="the graph has none, though the model has the layers agc: let a signature run"
    ):
        tf_agc.export_saved_model(model, tmp_path / "net", portable=False, signatures=signatures)
    assert not (tmp_path / "net").exists()
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    tf_agc.export_saved_model(plain, tmp_path / "net", portable=False)


def test_native_without_the_library(tmp_path, monkeypatch):
    status = dataclasses.replace(native.STATUS, available=False, reason="it is on holiday")
    monkeypatch.setattr(native, "STATUS", status)
    with pytest.raises(RuntimeError, match="the native implementation is not available: it is on holiday"):
        tf_agc.export_saved_model(_functional(), tmp_path / "net", portable=False)
    assert not (tmp_path / "net").exists()
    assert not any(op.startswith("TfAgc") for op in _ops(tf_agc.export_saved_model(_functional(), tmp_path / "net")))


# ---------------------------------------------------------------- for ever


def test_an_old_saved_model_answers_as_ever(native_required):
    assert sum(file.stat().st_size for file in FIXTURE.rglob("*") if file.is_file()) < 200_000
    ops = _ops(FIXTURE / "model")
    assert ops.count("TfAgc>Agc") == 54 and ops.count("TfAgc>AgcGrad") == 24
    loaded, answers = tf.saved_model.load(str(FIXTURE / "model")), np.load(FIXTURE / "answers.npz")
    got = {}
    for name in ("serving_default", "gradients"):
        got |= loaded.signatures[name](x=answers["x"], shortcut=answers["shortcut"])
    assert set(got) == set(answers) - {"x", "shortcut"}
    for name, value in got.items():
        # Any machine: a few roundings of the largest entry; answers are those of the reference in float64.
        tolerance = 32 * EPSILON[value.dtype.name] * np.abs(answers[name]).max()
        np.testing.assert_allclose(tf.cast(value, tf.float64), answers[name], rtol=0, atol=tolerance, err_msg=name)


def test_an_old_saved_model_becomes_portable(tmp_path, native_required):
    # The rewriting alone, on every variant of the op: only its gradients have no definition to call.
    shutil.copytree(FIXTURE / "model", tmp_path / "model")
    saved_graph.rewrite(tmp_path / "model", {}, portable=True)
    ops = _ops(tmp_path / "model")
    assert ops.count("TfAgc>Agc") == 0 and ops.count("TfAgc>AgcGrad") == 24
    answers = np.load(FIXTURE / "answers.npz")
    signatures = tf.saved_model.load(str(tmp_path / "model")).signatures
    for signature in ("serving_default", "gradients"):
        for name, value in signatures[signature](x=answers["x"], shortcut=answers["shortcut"]).items():
            tolerance = 32 * EPSILON[value.dtype.name] * np.abs(answers[name]).max()
            np.testing.assert_allclose(tf.cast(value, tf.float64), answers[name], rtol=0, atol=tolerance, err_msg=name)
    fingerprint = tf.saved_model.experimental.read_fingerprint(str(tmp_path / "model"))
    old = tf.saved_model.experimental.read_fingerprint(str(FIXTURE / "model"))
    assert fingerprint.saved_model_checksum != old.saved_model_checksum


def _standardized(dtype=None):
    inputs = keras.Input((8, 9, 3), name="image")
    x = tf_agc.StandardizedConv2D(4, 3, name="first", dtype=dtype)(inputs)
    x = AutomaticGainControl("relu", dtype=dtype)(x)
    x = tf_agc.StandardizedDepthwiseConv2D(3, use_gain=True, gain_initializer="random_normal", dtype=dtype)(x)
    x = keras.layers.TimeDistributed(tf_agc.StandardizedConv1D(5, 2, dtype=dtype), dtype=dtype)(x)
    return keras.Model(inputs, AutomaticGainControl(dtype=dtype)(x))


def _makers(version):
    """How many kernels of the convolutions in a SavedModel come of each op, constants or what reads and computes."""
    found = collections.Counter()
    for function in saved_graph.read(version).library.function:
        by_name = {node.name: node for node in function.node_def}
        for node in function.node_def:
            if node.op in ("Conv2D", "DepthwiseConv2dNative"):
                kernel = by_name[node.input[1].partition(":")[0]]
                while kernel.op in ("ExpandDims", "Reshape"):
                    kernel = by_name[kernel.input[0].partition(":")[0]]
                found[kernel.op] += 1
    return found


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("dtype", [None, "mixed_bfloat16", "float64"])
def test_standardized_kernels_are_constants(portable, dtype, tmp_path):
    model = _standardized(dtype)
    version = tf_agc.export_saved_model(model, tmp_path / "model", portable=portable)
    assert set(_makers(version)) == {"Const"}
    # What computed them is gone.
    assert "Rsqrt" not in _ops(version)
    assert not portable or server_ops.unknown(_saved_model(version)) == []


def test_gains_are_in_the_kernels(tmp_path):
    inputs = keras.Input((8, 9, 3), name="image")
    random = {"gain_initializer": "random_normal", "bias_initializer": "random_normal"}
    x = tf_agc.StandardizedConv2D(4, 3, use_bias=False)(inputs)
    x = AutomaticGainControl("relu", **random)(x)
    x = tf_agc.StandardizedDepthwiseConv2D(3, depth_multiplier=2, use_bias=False)(x)
    folded = keras.Model(inputs, AutomaticGainControl("relu", **random)(x))
    version = tf_agc.export_saved_model(folded, tmp_path / "folded")
    counts = collections.Counter(_ops(version))
    # What is left of a layer: a mean with its scale, a subtraction, a bias, an activation. Nothing looks at shapes.
    assert {counts[op] for op in ("Mean", "Mul", "Sub", "AddV2", "Relu")} == {2}
    assert not {"Shape", "ConcatV2", "Reshape", "StridedSlice"} & set(counts)


def test_custom_gradients_keep_what_they_read(tmp_path):
    @tf.custom_gradient
    def cubed(x):
        slope = 3 * x * x  # which nothing but the gradient reads
        return x**3, lambda upstream: upstream * slope

    class Cubed(keras.layers.Layer):
        def call(self, x):
            return cubed(x)

    model = keras.Sequential([keras.Input((8, 9, 3)), tf_agc.StandardizedConv2D(4, 3), Cubed()])
    version = tf_agc.export_saved_model(model, tmp_path / "model")
    assert set(_makers(version)) == {"Const"} and "Rsqrt" not in _ops(version)
    saved = tf.saved_model.load(version)
    loaded = saved.signatures["serving_default"]
    (name,) = loaded.structured_input_signature[1]
    x = tf.constant(np.random.default_rng(0).standard_normal((2, 8, 9, 3)), tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        answers = *loaded(**{name: x}).values(), model(x)
    expected = tape.gradient(answers[1], x)
    np.testing.assert_allclose(tape.gradient(answers[0], x), expected, rtol=1e-4, atol=1e-5 * np.max(np.abs(expected)))


def test_kernels_of_exports_are_those_of_the_moment(tmp_path):
    """In functions that were traced long before too, and what is exported stays out of the model."""
    model = _standardized()

    @tf.function(input_signature=[tf.TensorSpec([None, 8, 9, 3])])
    def answer(x):
        return {"y": model(x, training=False)}

    x = np.random.default_rng(0).standard_normal((2, 8, 9, 3)).astype(np.float32)
    for _ in range(2):
        before = answer(x)["y"]
        version = tf_agc.export_saved_model(model, tmp_path / "model", signatures={"serving_default": answer})
        assert set(_makers(version)) == {"Const"}
        loaded = tf.saved_model.load(version).signatures["serving_default"]
        np.testing.assert_allclose(loaded(x=tf.constant(x))["y"], before, rtol=1e-4, atol=1e-5)
        kernel = model.get_layer("first").kernel
        kernel.assign(kernel[::-1] + 0.1)
        assert np.max(np.abs(answer(x)["y"] - before)) > 0.1


def test_copies_of_a_layer_have_kernels_of_their_own(tmp_path):
    layer = tf_agc.StandardizedConv2D(4, 3, name="first")
    layer.build((None, 8, 9, 3))
    other = copy.deepcopy(layer)
    other.name = "second"
    other.kernel.assign(other.kernel[::-1])
    inputs = keras.Input((8, 9, 3))
    model = keras.Model(inputs, keras.layers.Concatenate()([layer(inputs), other(inputs)]))
    version = tf_agc.export_saved_model(model, tmp_path / "model")  # or an error, that it answers otherwise
    assert set(_makers(version)) == {"Const"}


def test_kernels_of_a_loaded_model_stay_computed(tmp_path, monkeypatch):
    tf.saved_model.save(_standardized(), str(tmp_path / "loaded"))
    monkeypatch.setattr(graph_marks, "_marks", weakref.WeakKeyDictionary())  # as in another process
    inputs = keras.Input((8, 9, 3))
    loaded = keras.layers.TFSMLayer(tmp_path / "loaded", call_endpoint="serving_default")
    version = tf_agc.export_saved_model(keras.Model(inputs, loaded(inputs)), tmp_path / "model")
    assert set(_makers(version)) == {"Identity"}


@pytest.mark.parametrize("room, expected", [(0, {"Identity"}), (500, {"Identity", "Const"})])
def test_kernels_that_a_file_cannot_hold_stay_computed(room, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_graph, "_LARGEST_CONSTANTS", room)
    assert set(_makers(tf_agc.export_saved_model(_standardized(), tmp_path / "model"))) == expected
