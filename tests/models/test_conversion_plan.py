"""What `convert` makes of the layers behind a BatchNormalization: junctions, pooled maps, causal networks."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import tf_agc
from tf_agc import AutomaticGainControl, conversion_table, convert

_X = np.random.default_rng(0).standard_normal((4, 8, 9, 3)).astype(np.float32)


@pytest.fixture
def fresh(fresh_keras):
    """Names and weights do not depend on the order of tests, and no warning passes unseen."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def _conv(name=None, channels=3, **arguments):
    return layers.Conv2D(channels, 3, padding="same", name=name, **arguments)


def _norm(name=None, **arguments):
    return layers.BatchNormalization(name=name, **arguments)


def _agc(name=None, **arguments):
    arguments = {"use_bias": True, "mean_scale_initializer": keras.initializers.Constant(0.25), **arguments}
    return AutomaticGainControl(name=name, **arguments)


def _agc_layers(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, AutomaticGainControl)]


def _randomize(model):
    rng = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(0.5 + rng.random(weight.shape))


def _fused(model, **arguments):
    """What becomes of each layer, in short."""
    return {row.layer: (row.activation, *row.fused) for row in conversion_table(model, **arguments)}


def _assert_computes_as(make, x=_X):
    """The copy of a model of BatchNormalizations computes what the same model with linear AGC layers does."""
    converted, expected = convert(make(_norm), standardize=False), make(_agc)
    _randomize(converted)
    for layer in _agc_layers(expected):
        weights = converted.get_layer(layer.name).get_weights()
        layer.set_weights(weights)
    for layer in expected.layers:
        if not isinstance(layer, AutomaticGainControl) and layer.weights:
            layer.set_weights(converted.get_layer(layer.name).get_weights())
    keras.tree.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), converted(x), expected(x)
    )
    return converted


# Junctions.
@pytest.mark.parametrize(
    "name, activation, fused",
    [
        ("ReLU", lambda: layers.ReLU(name="act"), ("relu", None)),
        ("relu6", lambda: layers.Activation("relu6", name="act"), ("relu6", None)),
        ("LeakyReLU", lambda: layers.LeakyReLU(0.2, name="act"), ("leaky_relu", 0.2)),
        ("ELU", lambda: layers.ELU(0.7, name="act"), ("elu", 0.7)),
        ("swish", lambda: layers.Activation("swish", name="act"), None),
        ("other dtype", lambda: layers.ReLU(dtype="float64", name="act"), None),
        ("regularized", lambda: layers.ReLU(activity_regularizer="l2", name="act"), None),
    ],
)
def test_the_activation_behind_a_sum(name, activation, fused, fresh):
    def make(norm):
        inputs = keras.Input((8, 9, 3))
        x = layers.Add(name="add")([norm("norm")(_conv("conv")(inputs)), inputs])
        return keras.Model(inputs, activation()(x))

    converted = _assert_computes_as(make)
    layer = converted.get_layer("norm")
    assert (layer._fused, layer.negative_slope or layer.alpha) == (fused or ("linear", None))
    assert _fused(make(_norm)) == {"norm": (fused[0], "add", "act") if fused else ("linear", "add")}
    assert len(converted.layers) == (3 if fused else 4)


_SUMS = {
    "Add": lambda x, y: layers.Add(name="add")([x, y]),
    "swapped": lambda x, y: layers.Add(name="add")([y, x]),
    "layers.add": lambda x, y: layers.add([x, y]),
    "+": lambda x, y: x + y,
    "swapped +": lambda x, y: y + x,
    "ops.add": lambda x, y: ops.add(x2=x, x1=y),
}


@pytest.mark.parametrize("name", _SUMS)
def test_ways_to_write_a_sum(name, fresh):
    def make(norm):
        inputs = keras.Input((8, 9, 3))
        return keras.Model(inputs, ops.relu(_SUMS[name](norm("norm")(_conv("conv")(inputs)), inputs)))

    converted = _assert_computes_as(make)
    assert [layer.name for layer in converted.layers[1:]] == ["conv", "norm"] and len(converted.operations) == 3
    assert converted.get_layer("norm")._fused == "relu"


@pytest.mark.parametrize("swapped", [False, True])
def test_a_projected_shortcut(swapped, fresh):
    """The longer way is the branch, and the other layer's output its shortcut."""

    def make(norm):
        inputs = keras.Input((8, 9, 3))
        shortcut = norm("projected")(layers.Conv2D(5, 1, name="projection")(inputs))
        x = _conv("conv1")(inputs)
        x = norm("branch")(_conv("conv2", 5)(x))
        both = [x, shortcut] if swapped else [shortcut, x]
        return keras.Model(inputs, layers.ReLU(name="out")(layers.Add(name="add")(both)))

    converted = _assert_computes_as(make)
    assert _fused(make(_norm)) == {"projected": ("linear",), "branch": ("relu", "add", "out")}
    assert converted.layers[-1].name == "branch"


def test_the_copy_is_the_model_by_hand(fresh):
    def make(by_hand):
        inputs = keras.Input((8, 9, 3), name="image")
        x = _conv("conv")(inputs)
        if by_hand:
            x = _agc("norm", activation="relu")(x, shortcut=inputs)
        else:
            x = layers.ReLU()(layers.Add()([_norm("norm")(x), inputs]))
        return keras.Model(inputs, layers.MaxPooling2D(name="pool")(x), name="model")

    converted = convert(make(False), standardize=False)
    assert converted.to_json() == make(True).to_json()
    assert (
        str(conversion_table(make(False))).splitlines()[1] == "norm   AGC, relu  with add_1, re_lu_1; standardizes conv"
    )


def test_the_copy_trains_is_saved_and_converted_no_further(fresh, tmp_path):
    inputs = keras.Input((8, 9, 3))
    x = layers.ReLU()(layers.Add()([_norm("norm")(_conv()(inputs)), inputs]))
    x = layers.ReLU()(layers.Add()([_norm("next")(_conv()(x)), x]))
    converted = convert(keras.Model(inputs, layers.Flatten()(x)), calibrate_with=_X)
    converted.compile(keras.optimizers.SGD(0.1, clipnorm=1.0), "mse", jit_compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert np.isfinite(converted.train_on_batch(_X, np.zeros((4, 216))))
        converted.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(_X), converted(_X))
    # A copy of a model that has AGC already keeps the shortcut.
    both = convert(keras.Model(inputs, _norm("last")(converted(inputs)[:, None, :, None])))
    (nested,) = [layer for layer in both.layers if isinstance(layer, keras.Model)]
    np.testing.assert_array_equal(nested(_X), converted(_X))


def _three_inputs(norm, inputs, x):
    return layers.ReLU()(layers.Add()([norm("norm")(x), inputs, x]))


def _broadcast(norm, inputs, x):
    return layers.ReLU()(layers.Add()([norm("norm")(x), layers.GlobalMaxPooling2D(keepdims=True)(inputs)]))


def _one_more_axis(norm, inputs, x):
    return layers.ReLU()(norm("norm")(x) + inputs[:, None])


def _twice(norm, inputs, x):
    y = norm("norm")(x)
    return layers.ReLU()(layers.Add()([y, y]))


def _norm_read_elsewhere(norm, inputs, x):
    y = norm("norm")(x)
    return layers.Concatenate()([layers.ReLU()(layers.Add()([y, inputs])), y])


def _norm_is_an_output(norm, inputs, x):
    y = norm("norm")(x)
    return [layers.ReLU()(layers.Add()([y, inputs])), y]


def _sum_is_one_of_several_outputs(norm, inputs, x):
    return [layers.Add()([norm("norm")(x), inputs]), x]


def _regularized_sum(norm, inputs, x):
    return layers.ReLU()(layers.Add(activity_regularizer="l1")([norm("norm")(x), inputs]))


def _regularized_norm(norm, inputs, x):
    return layers.ReLU()(layers.Add()([norm("norm", activity_regularizer="l1")(x), inputs]))


def _another_dtype(norm, inputs, x):
    return layers.ReLU()(layers.Add(dtype="float64")([norm("norm")(x), inputs]))


def _another_operation(norm, inputs, x):
    return layers.ReLU()(layers.Subtract()([norm("norm")(x), inputs]))


@pytest.mark.parametrize(
    "make",
    [
        *(_three_inputs, _broadcast, _one_more_axis, _twice, _norm_read_elsewhere, _norm_is_an_output),
        *(_sum_is_one_of_several_outputs, _regularized_sum, _regularized_norm, _another_dtype, _another_operation),
    ],
)
def test_sums_that_stay(make, fresh):
    def model(norm):
        inputs = keras.Input((8, 9, 3))
        return keras.Model(inputs, make(norm, inputs, _conv("conv")(inputs)))

    converted = _assert_computes_as(model)
    assert _fused(model(_norm)) == {"norm": ("linear",)}
    assert len(converted.operations) == len(model(_norm).operations)


def test_a_sum_that_is_read_elsewhere_keeps_its_activation(fresh):
    def make(norm):
        inputs = keras.Input((8, 9, 3))
        x = layers.Add(name="add")([norm("norm")(_conv("conv")(inputs)), inputs])
        return keras.Model(inputs, layers.Concatenate()([layers.ReLU()(x), x]))

    _assert_computes_as(make)
    assert _fused(make(_norm)) == {"norm": ("linear", "add")}


def test_a_sum_in_another_model_stays(fresh):
    """Whether BatchNormalization is inside and the Add outside, or the other way round."""
    inputs = keras.Input((8, 9, 3))
    inner = keras.Model(inputs, _norm("norm")(_conv()(inputs)), name="inner")
    assert _fused(keras.Model(inputs, layers.ReLU()(inner(inputs) + inputs))) == {"inner/norm": ("linear",)}
    pair = [keras.Input((8, 9, 3)), keras.Input((8, 9, 3))]
    add = keras.Model(pair, layers.ReLU()(layers.Add()(pair)))
    model = keras.Model(inputs, add([_norm("norm")(_conv()(inputs)), inputs]))
    assert _fused(model) == {"norm": ("linear",)}
    assert convert(model)(_X).shape == (4, 8, 9, 3)


def test_a_shared_layer_before_sums(fresh):
    """Its calls may have a shortcut or not; they have one activation, or none."""

    def make(norm, last):
        inputs = keras.Input((8, 9, 3))
        shared = norm("shared")
        x = layers.ReLU(name="a")(layers.Add(name="add")([shared(_conv("conv1")(inputs)), inputs]))
        return keras.Model(inputs, last()(shared(_conv("conv2")(x))))

    _assert_computes_as(lambda norm: make(norm, layers.ReLU))
    _assert_computes_as(lambda norm: make(norm, layers.ELU))
    assert _fused(make(_norm, lambda: layers.ReLU(name="b"))) == {"shared": ("relu", "add", "a", "b")}
    assert _fused(make(_norm, layers.ELU)) == {"shared": ("linear", "add")}


def test_a_sum_of_two_calls_of_one_layer(fresh):
    def make(norm):
        inputs = keras.Input((8, 9, 3))
        shared = norm("shared")
        return keras.Model(inputs, layers.ReLU()(shared(inputs) + shared(_conv("conv")(inputs))))

    _assert_computes_as(make)


def test_a_shared_model_that_broadcasts_in_one_call(fresh):
    """The shapes are the same in its own graph, where no size is known, and in its other call."""

    def make(norm, shapes):
        pair = [keras.Input((None, None, 3)) for _ in range(2)]
        x = norm("norm")(layers.Conv2D(3, 1, name="conv")(pair[0]))
        inner = keras.Model(pair, layers.ReLU(name="relu")(layers.Add(name="add")([x, pair[1]])), name="inner")
        inputs = keras.Input((8, 9, 3))
        x = inner([inputs, inputs])
        return keras.Model(inputs, inner([x, layers.GlobalMaxPooling2D(keepdims=True)(x)]) if shapes == 2 else x)

    assert _fused(make(_norm, 1)) == {"inner/norm": ("relu", "add", "relu")}
    model = make(_norm, 2)
    assert _fused(model) == {"inner/norm": ("linear",)}
    assert convert(model)(_X).shape == (4, 8, 9, 3)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
def test_dtype_policies(policy, fresh):
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input((8, 9, 3))
        x = _conv()(inputs)
        model = keras.Model(inputs, layers.ReLU(name="relu")(layers.Add(name="add")([_norm("norm")(_conv()(x)), x])))
        assert _fused(model) == {"norm": ("relu", "add", "relu")}
        assert keras.backend.standardize_dtype(convert(model)(_X).dtype) == policy.removeprefix("mixed_")
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("size", [64, None])
def test_all_junctions_of_resnet50(size, fresh):
    model = keras.applications.ResNet50(weights=None, include_top=False, input_shape=(size, size, 3))
    table = conversion_table(model)
    junctions = [row for row in table if len(row.fused) == 2]
    assert [row.fused for row in junctions] == [
        [row.layer.replace("3_bn", end) for end in ("add", "out")] for row in junctions
    ]
    assert len(junctions) == 16 and all(row.activation == "relu" for row in junctions)
    assert [row.layer for row in table if row.activation == "linear"] == [f"conv{n}_block1_0_bn" for n in range(2, 6)]


# Maps that are averaged.
def _averaged(model, **arguments):
    return {row.layer: row.averaged_by for row in conversion_table(model, **arguments)}


_AVERAGES = {
    "GlobalAveragePooling2D": lambda x: layers.GlobalAveragePooling2D(name="pool")(x),
    "keepdims": lambda x: layers.GlobalAveragePooling2D(keepdims=True, name="pool")(x),
    "AveragePooling2D": lambda x: layers.Flatten()(layers.AveragePooling2D((8, 9), name="pool")(x)),
    "ops.mean": lambda x: ops.mean(x, axis=(1, 2)),
    "ops.mean, negative": lambda x: ops.mean(x, axis=[-2, -3], keepdims=True),
    "ops.mean of everything": lambda x: ops.mean(x),
    "ops.sum": lambda x: ops.sum(x, axis=(1, 2)),
    "ops.average_pool": lambda x: ops.average_pool(x, (8, 9)),
    "behind an activation": lambda x: layers.GlobalAveragePooling2D(name="pool")(layers.ReLU()(x)),
    "behind another activation": lambda x: layers.GlobalAveragePooling2D(name="pool")(ops.silu(x)),
    "behind PReLU and Dropout": lambda x: layers.GlobalAveragePooling2D()(layers.Dropout(0.5)(layers.PReLU()(x))),
    "behind a convolution": lambda x: layers.GlobalAveragePooling2D(name="pool")(layers.Conv2D(2, 1)(x)),
    "behind Concatenate": lambda x: layers.GlobalAveragePooling2D()(layers.Concatenate()([x, layers.ReLU()(x)])),
    "beside another reader": lambda x: layers.Multiply()([x, layers.GlobalAveragePooling2D(keepdims=True)(x)]),
    "behind AveragePooling2D": lambda x: layers.GlobalAveragePooling2D()(layers.AveragePooling2D(2)(x)),
    "behind ZeroPadding2D": lambda x: layers.GlobalAveragePooling2D()(layers.ZeroPadding2D(1)(x)),
    "behind UpSampling2D": lambda x: layers.GlobalAveragePooling2D()(layers.UpSampling2D(2)(x)),
    "behind Reshape": lambda x: layers.GlobalAveragePooling1D()(layers.Reshape((72, 3))(x)),
    "behind ops.reshape": lambda x: ops.mean(ops.reshape(x, (-1, 72, 3)), axis=1),
    "ops.mean twice": lambda x: ops.mean(ops.mean(x, axis=1), axis=1),
    "DepthwiseConv2D": lambda x: layers.Flatten()(layers.DepthwiseConv2D((8, 9))(x)),
    "Dropout and Add": lambda x: layers.GlobalAveragePooling2D()(layers.Add()([layers.Dropout(0.1)(x), x])),
    "two convolutions and Add": lambda x: layers.GlobalAveragePooling2D()(layers.Add()([_conv()(x), _conv()(x)])),
    "Average": lambda x: layers.GlobalAveragePooling2D()(layers.Average()([x, layers.Dropout(0.1)(x)])),
    "Subtract behind convolutions": lambda x: ops.mean(_conv()(x) - _conv()(x), axis=(1, 2)),
    "in a nested model": lambda x: keras.Sequential([keras.Input((8, 9, 3)), layers.GlobalAveragePooling2D()])(x),
}
_OTHERS = {
    "maximum": lambda x: layers.GlobalMaxPooling2D()(x),
    "a part of the map": lambda x: layers.AveragePooling2D(4)(x),
    "one axis": lambda x: ops.mean(x, axis=1),
    "channels": lambda x: ops.mean(x, axis=-1),
    "a sum with activations": lambda x: ops.mean(layers.Add()([_conv()(x), layers.ReLU()(_conv()(x))]), axis=(1, 2)),
    "nothing": lambda x: layers.Flatten()(x),
}


@pytest.mark.parametrize("name", [*_AVERAGES, *_OTHERS])
def test_what_averages_maps(name, fresh):
    inputs = keras.Input((8, 9, 3))
    model = keras.Model(inputs, (_AVERAGES | _OTHERS)[name](_norm("norm")(inputs)))
    (row,) = conversion_table(model)
    assert bool(row.averaged_by) == (name in _AVERAGES)
    assert np.all(convert(model).get_layer("norm").mean_scale == (0 if name in _AVERAGES else 0.25))


def test_the_table_says_where_the_mean_is_let_through(fresh):
    inputs = keras.Input((8, 9, 3))
    x = layers.ReLU(name="relu")(_norm("norm")(inputs))
    model = keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool")(_norm("last")(x)))
    assert str(conversion_table(model)).splitlines() == [
        "layer  becomes",
        "norm   AGC, relu    with relu",
        "last   AGC, linear  mean scale 0 at first, as pool averages the map",
    ]


def test_averages_behind_a_junction(fresh):
    """Both of its inputs count, if they are BatchNormalizations, and nothing before those."""
    inputs = keras.Input((8, 9, 3))
    x = layers.ReLU()(_norm("first")(inputs))
    x = layers.ReLU()(layers.Add()([_norm("branch")(_conv()(x)), _norm("projected")(layers.Conv2D(3, 1)(x))]))
    y = layers.ReLU()(layers.Add()([_norm("last")(_conv()(x)), x]))
    model = keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool")(y))
    assert _averaged(model) == {"first": "", "branch": "", "projected": "", "last": "pool"}
    model = keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool")(x))
    assert _averaged(model) == {"first": "", "branch": "pool", "projected": "pool"}


def test_averages_outside_of_a_nested_model(fresh):
    """As transfer learning has it; and in TimeDistributed."""
    inputs = keras.Input((8, 9, 3))
    backbone = keras.Model(inputs, layers.ReLU()(_norm("norm")(_conv()(inputs))), name="backbone")
    model = keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool")(backbone(inputs)))
    assert _averaged(model) == {"backbone/norm": "pool"}
    assert _averaged(backbone) == {"norm": ""}
    clips = keras.Input((2, 8, 9, 3))
    steps = layers.TimeDistributed(backbone, name="steps")(clips)
    pooled = layers.TimeDistributed(layers.GlobalAveragePooling2D(), name="pools")(steps)
    assert list(_averaged(keras.Model(clips, pooled))) == ["steps/backbone/norm"]
    assert _averaged(keras.Model(clips, pooled))["steps/backbone/norm"].startswith("pools/")


@pytest.mark.parametrize("kind", ["ConvMixer", "squeeze and excite"])
def test_the_output_of_a_converted_network_depends_on_its_input(kind, fresh):
    inputs = keras.Input((16, 16, 3))
    x = _norm()(layers.Activation("gelu")(layers.Conv2D(8, 2, strides=2)(inputs)))
    if kind == "ConvMixer":
        for _ in range(2):
            y = _norm()(layers.Activation("gelu")(layers.DepthwiseConv2D(3, padding="same")(x)))
            x = _norm()(layers.Activation("gelu")(layers.Conv2D(8, 1)(layers.Add()([y, x]))))
    else:
        scale = layers.Dense(8, "sigmoid")(layers.Dense(4, "relu")(layers.GlobalAveragePooling2D(keepdims=True)(x)))
        x = _norm()(layers.Conv2D(8, 3)(layers.Multiply()([x, scale])))
    model = keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))
    images = np.random.default_rng(0).standard_normal((16, 16, 16, 3)).astype(np.float32)
    images += np.arange(16, dtype=np.float32)[:, None, None, None] / 8
    converted = convert(model, calibrate_with=images)
    assert np.min(np.std(converted(images), axis=0)) > 0.01


# Causal networks.
def _causal_model(norms=2, **arguments):
    inputs = keras.Input((12, 3))
    x = layers.Conv1D(4, 3, padding="causal", name="conv")(inputs)
    for number in range(norms):
        x = layers.Conv1D(4, 3, padding="causal")(layers.ReLU()(_norm(f"norm{number}")(x)))
    return keras.Model(inputs, x, **arguments)


_REASON = "left alone, AGC averages over later steps too and the network is causal (replace_causal=True replaces it)"


def test_causal_networks_are_left_alone(fresh):
    model = _causal_model(name="causal")
    reasons = [row.reason for row in conversion_table(model)]
    assert reasons == [f"{_REASON}: conv is causal", f"{_REASON}: conv1d is causal"]
    with pytest.raises(ValueError) as error:
        convert(model)
    assert str(error.value) == (
        f"model 'causal' has no BatchNormalization layer that can be replaced:\n  {_REASON} (2 layers): norm0, norm1"
    )


def test_causal_networks_are_replaced_where_asked(fresh):
    model = _causal_model()
    assert [row.activation for row in conversion_table(model, replace_causal=True)] == ["relu", "relu"]
    converted = convert(model, replace_causal=True)
    assert len(_agc_layers(converted)) == 2
    x = np.random.default_rng(0).standard_normal((2, 12, 3)).astype(np.float32)
    later = x.copy()
    later[:, 6:] += 1
    assert np.array_equal(model(x)[:, :6], model(later)[:, :6])
    assert not np.allclose(converted(x)[:, :6], converted(later)[:, :6])


_CAUSAL = {
    "Conv1D": layers.Conv1D(3, 3, padding="causal"),
    "ZeroPadding1D": layers.ZeroPadding1D((2, 0)),
    "attention": lambda x: layers.MultiHeadAttention(2, 2)(x, x, use_causal_mask=True),
    "nested": lambda x: _causal_model(0)(x),
    "ops.pad": lambda x: layers.Conv1D(3, 3)(ops.pad(x, ((0, 0), (2, 0), (0, 0)))),
    "ZeroPadding2D": lambda x: layers.Reshape((14, 3))(
        layers.ZeroPadding2D(((2, 0), (0, 0)))(layers.Reshape((12, 1, 3))(x))
    ),
    "Cropping1D": lambda x: layers.Cropping1D((0, 2))(layers.Conv1D(3, 3)(layers.ZeroPadding1D(2)(x))),
    "LSTM": layers.LSTM(3, return_sequences=True),
    "RNN": layers.RNN(layers.GRUCell(3), return_sequences=True),
}
_NOT_CAUSAL = {
    "Conv1D": layers.Conv1D(3, 3, padding="same"),
    "ZeroPadding1D": layers.ZeroPadding1D(1),
    "attention": lambda x: layers.MultiHeadAttention(2, 2)(x, x),
    "nested": layers.Identity(),
    "ops.pad": lambda x: ops.pad(x, ((0, 0), (1, 1), (0, 0))),
    "ZeroPadding2D": lambda x: layers.Reshape((14, 3))(
        layers.ZeroPadding2D(((1, 1), (0, 0)))(layers.Reshape((12, 1, 3))(x))
    ),
    "Cropping1D": lambda x: layers.Cropping1D((0, 1))(x),
    "LSTM": layers.Bidirectional(layers.LSTM(3, return_sequences=True)),
    "RNN": layers.RNN(layers.GRUCell(3), return_sequences=True, go_backwards=True),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("where", ["before", "behind"])
@pytest.mark.parametrize("name", _CAUSAL)
def test_what_is_causal(name, where, causal, fresh):
    layer = (_CAUSAL if causal else _NOT_CAUSAL)[name]
    inputs = keras.Input((12, 3))
    x = layer(inputs) if where == "before" else inputs
    x = layers.Dense(3)(_norm("norm")(layers.Dense(3)(x)))
    x = layer(x) if where == "behind" else x
    assert bool(conversion_table(keras.Model(inputs, x))[0].reason) == causal


def test_what_is_beside_a_causal_branch_is_replaced(fresh):
    images, sequence = keras.Input((8, 9, 3)), keras.Input((12, 3))
    x = layers.Flatten()(_norm("image")(images))
    y = layers.Flatten()(layers.Conv1D(2, 3, padding="causal", name="conv")(_norm("sequence")(sequence)))
    model = keras.Model([images, sequence], layers.Dense(2)(layers.Concatenate()([x, y])))
    with pytest.warns(UserWarning, match="sequence: left alone, AGC averages over later steps"):
        converted = convert(model)
    assert [layer.name for layer in _agc_layers(converted)] == ["image"]


def test_an_encoder_of_images_before_a_causal_decoder_is_replaced(fresh):
    images, words = keras.Input((8, 9, 3)), keras.Input((12, 3))
    memory = layers.Reshape((72, 3))(_norm("image")(images))
    x = words
    for number in range(2):
        x = _norm(f"words{number}")(layers.MultiHeadAttention(2, 2)(x, x, use_causal_mask=True))
        x = layers.MultiHeadAttention(2, 2)(query=x, value=memory)
    replaced = {row.layer: not row.reason for row in conversion_table(keras.Model([images, words], x))}
    assert replaced == {"image": True, "words0": False, "words1": False}


def test_steps_of_timedistributed_before_a_recurrent_layer_are_replaced(fresh):
    clips = keras.Input((5, 8, 9, 3))
    inner = keras.Sequential([keras.Input((8, 9, 3)), _norm("norm"), layers.Flatten()], name="inner")
    x = layers.TimeDistributed(inner, name="steps")(clips)
    x = _norm("sequence")(layers.LSTM(3, return_sequences=True)(x))
    replaced = {row.layer: not row.reason for row in conversion_table(keras.Model(clips, x))}
    assert replaced == {"steps/inner/norm": True, "sequence": False}


# Refusals and warnings of many layers.
def test_reasons_are_told_once(fresh):
    x = inputs = keras.Input((1, 1, 3))
    for number in range(10):
        x = _norm(f"norm{number}")(layers.Dense(number + 1)(x))
    x = _norm("flat")(layers.Flatten()(x))
    with pytest.raises(ValueError) as error:
        convert(keras.Model(inputs, x, name="deep"))
    assert str(error.value).splitlines()[1:] == [
        "  left alone, a map of one position is its own mean (10 layers): "
        "norm0, norm1, norm2, norm3, norm4, norm5, norm6, norm7, ...",
        "  flat: left alone, AGC takes 1 to 6 spatial axes: input shape (None, 10)",
    ]


# Convolutions.
def _standardized(model, **arguments):
    return {row.layer: row.standardized for row in conversion_table(model, **arguments)}


@pytest.mark.parametrize(
    "conv, kind",
    [
        (layers.Conv2D(4, 3, name="conv"), tf_agc.StandardizedConv2D),
        (layers.Conv2D(6, 1, groups=3, use_bias=False, name="conv"), None),  # filters of one input
        (layers.Conv2D(4, 3, activation="relu", name="conv"), None),
        (layers.DepthwiseConv2D(3, depth_multiplier=2, name="conv"), tf_agc.StandardizedDepthwiseConv2D),
        (layers.DepthwiseConv2D(1, name="conv"), None),
        (layers.SeparableConv2D(4, 3, name="conv"), None),
        (layers.Conv2DTranspose(4, 3, name="conv"), None),
        (layers.Dense(4, name="conv"), None),
    ],
)
def test_kinds_of_convolutions(conv, kind, fresh):
    inputs = keras.Input((8, 9, 3))
    model = keras.Model(inputs, _norm("norm")(conv(inputs)))
    _randomize(model)
    assert _standardized(model) == {"norm": ["conv"] if kind else []}
    assert _standardized(model, standardize=False) == {"norm": []}
    layer = convert(model).get_layer("conv")
    assert type(layer) is (kind or type(conv))
    np.testing.assert_array_equal(layer.bias, conv.bias)
    assert type(convert(model, standardize=False).get_layer("conv")) is type(conv)
    if kind:
        config = conv.get_config()
        assert {name: layer.get_config()[name] for name in config} == config
        # Each filter keeps its direction, but for its mean.
        axes = tuple(range(conv.kernel.shape.rank - (2 if "Depthwise" in kind.__name__ else 1)))
        old = conv.kernel - np.mean(conv.kernel, axes, keepdims=True)
        old /= np.sqrt(np.sum(np.square(old), axes, keepdims=True))
        np.testing.assert_allclose(layer.kernel, np.sqrt(2) * old, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.standardized_kernel(), layer.kernel, rtol=1e-4, atol=1e-5)
    elif not isinstance(conv, layers.SeparableConv2D):
        for weight, old in zip(layer.get_weights(), conv.get_weights(), strict=True):
            np.testing.assert_array_equal(weight, old)


@pytest.mark.parametrize("conv", [layers.SeparableConv1D(4, 3, depth_multiplier=2), layers.SeparableConv2D(4, 3)])
def test_separable_convolutions_keep_their_directions(conv, fresh):
    model = keras.Sequential([keras.Input((8, 9, 3)[-conv.rank - 1 :]), conv, _norm()])
    _randomize(model)
    copy, exact = (convert(model, standardize=standardize).get_layer(conv.name) for standardize in (True, False))
    depthwise, pointwise = conv.depthwise_kernel.numpy(), conv.pointwise_kernel.numpy()
    depthwise /= np.sqrt(np.sum(np.square(depthwise), axis=tuple(range(conv.rank)), keepdims=True))
    pointwise *= np.sqrt(2 / np.sum(np.square(pointwise), axis=tuple(range(conv.rank + 1)), keepdims=True))
    for weight, expected in zip(copy.get_weights(), [depthwise, pointwise, conv.bias], strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-5)
    for weight, expected in zip(exact.get_weights(), conv.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("spatial", [(9,), (5, 6, 7)])
def test_convolutions_of_other_ranks(spatial, fresh):
    rank = len(spatial)
    conv = getattr(layers, f"Conv{rank}D")(4, 3, name="conv")
    converted = convert(keras.Sequential([keras.Input((*spatial, 2)), conv, _norm()]))
    assert type(converted.get_layer("conv")) is getattr(tf_agc, f"StandardizedConv{rank}D")


def _read_twice(x):
    return layers.Concatenate()([_norm("norm")(x), x])


def _is_an_output(x):
    return [_norm("norm")(x), x]


def _through_relu(x):
    return _norm("norm")(layers.ReLU()(x))


@pytest.mark.parametrize("behind", [_read_twice, _is_an_output, _through_relu])
def test_convolutions_that_something_else_reads_stay(behind, fresh):
    inputs = keras.Input((8, 9, 3))
    assert _standardized(keras.Model(inputs, behind(_conv("conv")(inputs)))) == {"norm": []}


def test_convolutions_in_front_of_a_layer_that_stays(fresh):
    model = keras.Sequential(
        [keras.Input((1, 1, 3)), _conv("conv"), _norm("norm"), layers.UpSampling2D(4), _norm("last")]
    )
    with pytest.warns(UserWarning, match="norm: left alone"):
        converted = convert(model)
    assert type(converted.get_layer("conv")) is layers.Conv2D


def test_a_pre_activation_network(fresh):
    """The branch ends with a convolution, which gets a factor; a projected shortcut gets none."""
    x = inputs = keras.Input((8, 9, 3))
    for number, channels in enumerate((3, 5)):
        y = layers.ReLU()(_norm(f"norm{number}_1")(x))
        x = x if channels == 3 else _conv(f"projection{number}", channels)(y)
        y = layers.ReLU()(_norm(f"norm{number}_2")(_conv(f"conv{number}_1", channels)(y)))
        y = layers.Dropout(0.1)(_conv(f"conv{number}_2", channels)(y))
        x = layers.Add()([x, y])
    model = keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool")(_norm("last")(x)))
    assert _standardized(model) == {
        "norm0_1": [],
        "norm0_2": ["conv0_1"],
        "norm1_1": ["conv0_2"],
        "norm1_2": ["conv1_1"],
        "last": ["conv1_2", "projection1"],
    }
    converted = convert(model)
    gains = {layer.name: layer.gain for layer in converted.layers if hasattr(layer, "kernel_size")}
    assert {name for name, gain in gains.items() if gain is not None} == {"conv0_2", "conv1_2"}
    np.testing.assert_array_equal(gains["conv1_2"], np.full(5, 0.5))
    rows = {row.layer: row for row in tf_agc.calibrate(converted, _X)}
    assert {name for name, row in rows.items() if row.shortcut} == {"conv0_2", "conv1_2"}


def test_a_dense_block(fresh):
    """What is concatenated and pooled, and normalized afterwards."""
    x = inputs = keras.Input((8, 9, 3))
    for number in range(2):
        y = _conv(f"conv{number}")(layers.ReLU()(_norm(f"norm{number}")(x)))
        x = layers.Concatenate()([x, y])
    model = keras.Model(inputs, _norm("last")(layers.AveragePooling2D(2)(x)))
    assert _standardized(model) == {"norm0": [], "norm1": ["conv0"], "last": ["conv1"]}
    assert all(layer.gain is None for layer in convert(model).layers if hasattr(layer, "kernel_size"))


def test_frozen_convolutions_and_their_bias(fresh):
    conv = _conv("conv", trainable=False, bias_initializer="ones", kernel_regularizer="l2", dtype="float64")
    model = keras.Sequential([keras.Input((8, 9, 3)), conv, _norm("norm", center=False)])
    converted = convert(model)
    layer = converted.get_layer("conv")
    assert not layer.trainable and layer.kernel_regularizer is not None and layer.dtype == "float64"
    np.testing.assert_array_equal(layer.bias, np.ones(3))
    assert converted.get_layer("norm").bias is None  # as BatchNormalization had no beta
