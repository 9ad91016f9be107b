"""The op under XLA: the same results, in every construct, with or without the library of the XLA kernels."""

import ctypes
import platform
import re
import shutil
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla as tfxla
from tensorflow.python.tools import saved_model_aot_compile, saved_model_utils

import tf_agc
from agc_testing import (
    ACTIVATIONS,
    DATA_FORMATS,
    DTYPES,
    OPTIONAL,
    Counters,
    assert_close,
    check,
    make_case,
    python,
    results_of,
    run,
    step_of,
)
from tf_agc import AutomaticGainControl, __main__, native, reference

_SHAPES = [(3, 7, 5), (2, 5, 3, 17), (1, 9, 11, 130), (4, 2, 3, 2, 33)]


@pytest.fixture(autouse=True)
def xla_required(native_required):
    """Fails, and does not skip: without the library these tests would prove nothing."""
    if not native.XLA_STATUS.available:
        pytest.fail(f"this test needs the library of the XLA kernels: {native.XLA_STATUS.reason}")


@pytest.fixture
def xla_counters():
    counters = Counters(xla=True)
    counters.reset()
    return counters


def _jit(function):
    return tf.function(function, jit_compile=True)


def _lower_for_gpu(function, *arguments, calls):
    """The program that XLA would compile for a GPU; `calls`: with our calls, if this was built with CUDA."""
    library = ctypes.CDLL(str(native.XLA_STATUS.library))
    before = library.TfAgcXlaUseGpuCalls(int(calls))
    try:
        return function.experimental_get_compiler_ir(*arguments)(stage="stablehlo_serialized", platform_name="GPU")
    finally:
        library.TfAgcXlaUseGpuCalls(before)


def _in_hlo(function, *arguments):
    """The results of a jitted function in XLA's own operations.

    They are the lowering for GPUs, which needs no GPU: the program is taken before XLA compiles it, and run on the CPU.
    """
    program = _lower_for_gpu(function, *arguments, calls=False)
    assert b"TfAgc." not in program  # no custom call
    outputs = function.get_concrete_function(*arguments).structured_outputs
    flat = tf.nest.flatten(outputs)
    results = tfxla.call_module(
        tf.nest.flatten(arguments),
        version=9,
        module=program,
        Tout=[output.dtype for output in flat],
        Sout=[output.shape for output in flat],
        platforms=["CPU"],
    )
    return tf.nest.pack_sequence_as(outputs, results)


def _assert_equal(got, want):
    assert vars(got).keys() == vars(want).keys()
    for name, value in vars(want).items():
        np.testing.assert_array_equal(getattr(got, name), value, err_msg=name)


def _assert_close(got, want):
    for name, value in vars(want).items():
        np.testing.assert_allclose(getattr(got, name), value, rtol=1e-4, atol=1e-4, err_msg=name)


def _steps(shapes, *arguments):
    """Cases of each shape with and without a bias and a shortcut, and one function of all their tensors."""
    cases = [
        make_case(shape, *arguments, seed=i, bias=bias, shortcut=shortcut)
        for i, shape in enumerate(shapes)
        for bias, shortcut in OPTIONAL.values()
    ]
    # One program for all takes less time than one for each.
    steps = [step_of(case, native.agc) for case in cases]
    function = _jit(lambda *inputs: [step(*tensors) for step, tensors in zip(steps, inputs, strict=True)])
    return cases, function


# ---- Results ----


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_combination(activation, dtype, data_format, xla_counters):
    cases, function = _steps(_SHAPES, dtype, activation, data_format)
    results = function(*[case.tensors for case in cases])
    assert xla_counters.read()["forward"] == xla_counters.read()["backward"] == len(cases)
    for case, result in zip(cases, results, strict=True):
        got = results_of(result)
        _assert_equal(got, run(case, native.agc))  # to the last bit: the same loops
        check(case, got)


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_combination_in_hlo(activation, dtype, data_format):
    cases, function = _steps([(2, 5, 3, 17)], dtype, activation, data_format)
    for case, result in zip(cases, _in_hlo(function, *[case.tensors for case in cases]), strict=True):
        check(case, results_of(result))


def test_a_gpu_gets_calls_where_cuda_was_built_in():
    # It is not run: that takes a GPU.
    case = make_case((2, 5, 3, 17))
    program = _lower_for_gpu(_jit(step_of(case, native.agc)), *case.tensors, calls=True)
    built_in = native.cuda_build() != ""
    assert (b"TfAgc.Forward" in program) == (b"TfAgc.Backward" in program) == built_in


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("activation", ["leaky_relu", "elu"])
def test_alpha_of_0_is_relu(activation, data_format):
    cases, function = _steps([(2, 5, 3)], "float32", activation, data_format, 0.0)
    tensors = [case.tensors for case in cases]
    for case, call, hlo in zip(cases, function(*tensors), _in_hlo(function, *tensors), strict=True):
        _assert_equal(results_of(call), run(case, native.agc))
        check(case, results_of(hlo))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_that_are_not_finite_and_a_gain_of_0(activation):
    case = make_case((6, 5, 4), activation=activation)
    x, gain, mean_scale, dy, dmean = (tensor.numpy() for tensor in case.tensors)
    x[0, 1, 0], x[1, 2, 1], x[2, 3, 2] = np.nan, np.inf, -np.inf
    dy[3, :, 0], dy[4, :, 1], dy[5, 0, 2] = np.inf, -np.inf, np.nan
    x[3, 0, 3] = -1e4  # elu reaches -alpha
    gain[3] = 0
    tensors = [tf.constant(value) for value in (x, gain, mean_scale, dy, dmean)]
    step = step_of(case, native.agc)
    want = results_of(step(*tensors))
    _assert_equal(results_of(_jit(step)(*tensors)), want)
    _assert_close(results_of(_in_hlo(_jit(step), *tensors)), want)


@pytest.mark.parametrize("activation", ["relu", "relu6", "elu"])
def test_an_infinite_shortcut_at_a_dead_place(activation):
    case = make_case((2, 7, 3), activation=activation, bias=True, shortcut=True)
    shortcut = case.shortcut.numpy()
    shortcut[0, 2, 0] = shortcut[1, 3, 1] = -np.inf
    if activation == "relu6":
        shortcut[0, 4, 2] = np.inf
    case.shortcut = tf.constant(shortcut)
    case.bias = tf.constant(np.array([case.bias[0], -np.inf, case.bias[2]], np.float32))
    step = _jit(step_of(case, native.agc))
    want = run(case, reference.agc)
    for got in (step(*case.tensors), _in_hlo(step, *case.tensors)):
        got = results_of(got)
        assert all(np.isfinite(value).all() for value in vars(got).values())
        _assert_close(got, want)


def test_second_order():
    x = tf.random.stateless_normal([2, 4, 3], [0, 1])

    def function(agc):
        def curvature(x, gain):
            with tf.GradientTape() as outer:
                outer.watch(gain)
                with tf.GradientTape() as inner:
                    inner.watch([x, gain])
                    y, mean = agc(x, gain, tf.ones([3]), "elu", 1.0, "channels_last")
                    loss = tf.reduce_sum(y**3) + tf.reduce_sum(mean**2)
                dx, dgain = inner.gradient(loss, [x, gain])
                value = tf.reduce_sum(dx**2) + tf.reduce_sum(dgain**2)
            return outer.gradient(value, gain)

        return curvature

    gain = tf.constant([0.5, 1.0, 2.0])
    want = function(reference.agc)(x, gain)
    np.testing.assert_allclose(_jit(function(native.agc))(x, gain), want, rtol=1e-4)


def test_empty_batch():
    @_jit
    def function(x, gain, bias, shortcut):
        with tf.GradientTape() as tape:
            tape.watch([x, gain, bias, shortcut])
            y = tf_agc.agc(x, gain, 1.0, bias, shortcut, activation="relu")
        return y, *tape.gradient(y, [x, gain, bias, shortcut])

    maps = tf.zeros([0, 5, 5, 3])
    y, dx, dgain, dbias, dshortcut = function(maps, tf.ones([3]), tf.ones([3]), maps)
    assert y.shape == dx.shape == dshortcut.shape == [0, 5, 5, 3]
    np.testing.assert_array_equal([dgain, dbias], np.zeros([2, 3]))


@pytest.mark.parametrize("keep", [[True, False, True, True], [False] * 4, [True] * 4])
def test_dynamic_size(keep, xla_counters):
    # XLA knows no more than how many samples there can be.
    def function(x, keep, gain, bias):
        with tf.GradientTape() as tape:
            tape.watch([x, gain, bias])
            kept = tf.boolean_mask(x, keep)
            y = tf_agc.agc(kept, gain, 1.0, bias, tf.sin(kept), activation="relu")
            loss = tf.reduce_sum(y**2)
        return loss, *tape.gradient(loss, [x, gain, bias])

    arguments = tf.random.stateless_normal([4, 5, 3], [0, 1]), tf.constant(keep), tf.ones([3]), tf.constant([0.5] * 3)
    for got, want in zip(_jit(function)(*arguments), function(*arguments), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert xla_counters.read()["forward"] == 0


def test_dynamic_spatial_size():
    def function(x, keep):
        return tf.reduce_sum(tf_agc.agc(tf.boolean_mask(x, keep, axis=1), 1.0, 0.5, activation="relu"), axis=1)

    arguments = tf.random.stateless_normal([4, 5, 3], [0, 1]), tf.constant([True, True, False, True, False])
    np.testing.assert_allclose(_jit(function)(*arguments), function(*arguments), rtol=1e-5)


# ---- In every construct ----

_PARAMETERS = tf.constant([0.5, 1.0, 2.0]), tf.constant([1.0, 0.9, 0.0])


def _agc(x):
    return tf_agc.agc(x, *_PARAMETERS, activation="relu")


def _maps(*shape, seed=0):
    return tf.random.stateless_normal(shape, [seed, 1])


def test_functions_of_several_shapes(xla_counters):
    first, second = _jit(_agc), _jit(lambda x: _agc(x) + 1.0)
    for shape in [(2, 4, 3), (5, 4, 3), (2, 6, 7, 3)]:
        x = _maps(*shape)
        np.testing.assert_array_equal(first(x), _agc(x))
        np.testing.assert_array_equal(second(x), _agc(x) + 1.0)
    assert xla_counters.read()["forward"] == 6


def test_sizes_unknown_when_traced():
    function = tf.function(_agc, jit_compile=True, input_signature=[tf.TensorSpec([None, None, None, 3])])
    for shape in [(2, 4, 5, 3), (1, 7, 2, 3)]:
        np.testing.assert_array_equal(function(_maps(*shape)), _agc(_maps(*shape)))


def test_traced_outside_and_reused_inside(xla_counters):
    inner = tf.function(_agc)
    x = _maps(2, 4, 3)
    want = inner(x)
    assert xla_counters.read()["forward"] == 0
    np.testing.assert_array_equal(_jit(lambda x: inner(x))(x), want)
    assert xla_counters.read()["forward"] == 1


def test_while_loop(xla_counters):
    def function(x):
        _, x = tf.while_loop(lambda i, _: i < 3, lambda i, x: (i + 1, _agc(x)), (0, x))
        return x

    x = _maps(2, 4, 3)
    np.testing.assert_allclose(_jit(function)(x), function(x), rtol=1e-6)
    assert xla_counters.read()["forward"] == 3


def test_gradient_of_a_while_loop():
    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            _, y = tf.while_loop(lambda i, _: i < 3, lambda i, x: (i + 1, _agc(x)), (0, x), maximum_iterations=3)
            loss = tf.reduce_sum(y**2)
        return tape.gradient(loss, x)

    x = _maps(2, 4, 3)
    np.testing.assert_allclose(_jit(function)(x), function(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("condition", [True, False])
def test_cond(condition):
    def function(x, condition):
        return tf.cond(condition, lambda: _agc(x), lambda: tf_agc.agc(x, 2.0, 1.0, activation="elu"))

    arguments = _maps(2, 4, 3), tf.constant(condition)
    np.testing.assert_array_equal(_jit(function)(*arguments), function(*arguments))


def test_gradient_accumulation(fresh_keras):
    model = keras.Sequential([keras.Input((6, 5)), keras.layers.Conv1D(4, 3), AutomaticGainControl("leaky_relu")])
    x = _maps(8, 6, 5)

    def gradients(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    @_jit
    def accumulated(x):
        sums = [tf.zeros_like(variable) for variable in model.trainable_variables]
        for part in tf.split(x, 4):
            sums = [total + gradient for total, gradient in zip(sums, gradients(part), strict=True)]
        return sums

    for got, want in zip(accumulated(x), gradients(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_fit(fresh_keras, xla_counters):
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((32, 8, 8, 3)).astype(np.float32), rng.integers(0, 4, 32)
    losses = []
    for jit in (False, True):
        keras.utils.set_random_seed(0)
        layers = [keras.Input((8, 8, 3))]
        for activation in ("relu", "elu", None):
            layers += [keras.layers.Conv2D(6, 3, padding="same", use_bias=False), AutomaticGainControl(activation)]
        model = keras.Sequential([*layers, keras.layers.GlobalMaxPooling2D(), keras.layers.Dense(4)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.05), loss, jit_compile=jit)
        assert model.jit_compile == jit
        losses.append(model.fit(x, labels, batch_size=8, epochs=4, shuffle=False, verbose=0).history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert losses[0][-1] < losses[0][0]
    assert xla_counters.read()["forward"] == xla_counters.read()["backward"] == 3 * 16


def test_a_jitted_function_of_a_saved_model(tmp_path, xla_counters):
    module = tf.Module()
    module.run = tf.function(_agc, jit_compile=True, input_signature=[tf.TensorSpec([None, 4, 3])])
    tf.saved_model.save(module, str(tmp_path))
    x = _maps(2, 4, 3)
    np.testing.assert_array_equal(tf.saved_model.load(str(tmp_path)).run(x), _agc(x))
    assert xla_counters.read()["forward"] == 1


def test_ahead_of_time(tmp_path):
    # The program that links the result has no custom calls.
    module = tf.Module()
    module.run = tf.function(lambda x: {"y": _agc(x)}, input_signature=[tf.TensorSpec([2, 4, 3])])
    tf.saved_model.save(module, str(tmp_path / "model"), signatures=module.run)
    saved_model_aot_compile.aot_compile_cpu_meta_graph_def(
        checkpoint_path=str(tmp_path / "model" / "variables" / "variables"),
        meta_graph_def=saved_model_utils.get_meta_graph_def(str(tmp_path / "model"), "serve"),
        output_prefix=str(tmp_path / "compiled"),
        signature_def_key="serving_default",
        cpp_class="Agc",
        target_triple=f"{platform.machine()}-pc-linux",
        target_cpu="",
    )
    assert (tmp_path / "compiled.h").exists()
    for file in tmp_path.glob("compiled*.o"):
        assert b"TfAgc." not in file.read_bytes()


def test_many_callers_at_once():
    # As many callers as XLA's pool has threads and more, each with work for all of it.
    x = _maps(8, 64, 64, 3)
    function, want = _jit(_agc), _agc(x)
    function(x)
    results = []
    threads = [threading.Thread(target=lambda: results.extend(function(x) for _ in range(5))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40
    for result in results:
        np.testing.assert_array_equal(result, want)


# ---- In place ----


def _counted(counters):
    return {name: count for name, count in counters.read().items() if count}


def _copies(function, *arguments, shape):
    """The copies of maps that a program makes, but for those that are part of computing them."""
    program = function.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")
    _, _, steps = program.partition("ENTRY")
    return re.findall(rf"= {re.escape(shape)}\S* copy\(", steps)


@pytest.mark.parametrize("use_bias", [True, False])
def test_training_step_in_place(fresh_keras, xla_counters, use_bias):
    layers = [keras.Input((8, 8, 3))]
    for _ in range(3):
        layers += [keras.layers.Conv2D(5, 3, padding="same", use_bias=False)]
        layers += [AutomaticGainControl("relu", use_bias=use_bias)]
    model = keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D()])

    @_jit
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    x = _maps(4, 8, 8, 3)
    step(x)
    assert _counted(xla_counters) == {"forward": 3, "forward_in_place": 3, "backward": 3, "dx_over_dy": 3}
    # In place, and not because XLA copied the input before.
    assert _copies(step, x, shape="f32[4,8,8,5]") == []


def _convolution(x, kernel):
    return tf.nn.conv2d(x, kernel, strides=1, padding="SAME")


def _kernels(count, channels=5):
    return list(tf.random.stateless_normal([count, 3, 3, channels, channels], [0, 2]) / (3 * channels) ** 0.5)


def test_residual_training_step_in_place(xla_counters):
    # The second block's shortcut is what the first block's junction returned, and so on through the gradients.
    def step(x, bias, kernels):
        with tf.GradientTape() as tape:
            tape.watch([bias, kernels])
            stem, *kernels_of_blocks = kernels
            maps = tf_agc.agc(_convolution(x, stem), 1.0, 1.0, activation="relu")
            for first, second in zip(kernels_of_blocks[::2], kernels_of_blocks[1::2], strict=True):
                branch = tf_agc.agc(_convolution(maps, first), 1.0, 1.0, bias, activation="relu")
                maps = tf_agc.agc(_convolution(branch, second), 1.0, 0.5, bias, maps, activation="relu")
            loss = tf.reduce_mean(maps**2)
        return tape.gradient(loss, [bias, kernels])

    arguments = _maps(4, 8, 8, 5), tf.constant([0.1, 0.2, 0.3, 0.4, 0.5]), _kernels(5)
    got = _jit(step)(*arguments)
    assert _counted(xla_counters) == {
        "forward": 5,
        "forward_in_place": 5,
        "backward": 5,
        "dx_over_dy": 3,
        "dshortcut_over_dy": 2,
    }
    assert _copies(_jit(step), *arguments, shape="f32[4,8,8,5]") == []
    assert_close(got, step(*arguments), 1e-5)


def test_a_linear_junction_writes_to_new_memory(xla_counters):
    # In training x and the shortcut are both still needed: XLA would copy what y was written over.
    @_jit
    def function(x, kernels):
        maps, shortcut = [_convolution(x, kernel) for kernel in kernels]
        return tf_agc.agc(maps, 1.0, 1.0, shortcut=shortcut), maps, shortcut

    arguments = _maps(4, 8, 8, 5), _kernels(2)
    y, maps, shortcut = function(*arguments)
    np.testing.assert_allclose(y, tf_agc.agc(maps, 1.0, 1.0, shortcut=shortcut), rtol=1e-6)
    assert _counted(xla_counters) == {"forward": 1}
    assert _copies(function, *arguments, shape="f32[4,8,8,5]") == []


def test_a_step_of_linear_junctions_copies_no_map():
    def step(x, gain, kernels):
        with tf.GradientTape() as tape:
            tape.watch([gain, kernels])
            maps = x
            for kernel in kernels:
                maps = tf_agc.agc(_convolution(maps, kernel), gain, 1.0, shortcut=maps)
            loss = tf.reduce_sum(maps**2)
        return tape.gradient(loss, [gain, *kernels])

    arguments = _maps(4, 8, 8, 5), tf.constant([1.0, 2.0, 3.0, 2.0, 1.0]), _kernels(3)
    for got, want in zip(_jit(step)(*arguments), step(*arguments), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    assert _copies(_jit(step), *arguments, shape="f32[4,8,8,5]") == []


def test_what_is_still_needed_is_not_overwritten(xla_counters):
    def function(x):
        doubled = 2 * x
        return _agc(doubled), doubled, _agc(x)

    x = _maps(2, 4, 3)
    before = x.numpy()
    for got, want in zip(_jit(function)(x), function(x), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(x, before)
    variable = tf.Variable(before)
    np.testing.assert_array_equal(_jit(lambda: _agc(variable))(), _agc(x))
    np.testing.assert_array_equal(variable, before)


def test_linear_input_is_kept():
    case = make_case((2, 6, 5, 8), "float32", "linear")

    def function(x, parameters):
        with tf.GradientTape() as tape:
            tape.watch([x, *parameters])
            y, _ = native.agc(x + 1.0, *parameters, *case.attributes)
        return tape.gradient(y, [x, *parameters], output_gradients=case.dy)

    def of_x_alone(x, parameters):  # dy takes the place of x, which nothing then keeps
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _ = native.agc(x + 1.0, *parameters, *case.attributes)
        return [tape.gradient(y, x, output_gradients=case.dy)]

    arguments = case.x, (case.gain, case.mean_scale)
    for gradient in (function, of_x_alone):
        for got, want in zip(_jit(gradient)(*arguments), gradient(*arguments), strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_tensor_as_two_operands(activation):
    # What is written over one of them is read as the other.
    case = make_case((2, 6, 5, 8), activation=activation, bias=True)

    def function(x, bias):
        with tf.GradientTape() as tape:
            tape.watch([x, bias])
            maps = x + 1.0
            y, _ = native.agc(maps, case.gain, case.mean_scale, *case.attributes, bias=bias, shortcut=maps)
        return y, *tape.gradient(y, [x, bias], output_gradients=y)  # dy is kept

    for got, want in zip(_jit(function)(case.x, case.bias), function(case.x, case.bias), strict=True):
        np.testing.assert_array_equal(got, want)


# ---- Errors ----


@pytest.mark.parametrize(
    "shapes, activation, alpha, message",
    [
        ({"gain": (5,)}, "relu", 0.0, "gain must have shape [C] = [6], got [5]"),
        ({"mean_scale": (1, 6)}, "relu", 0.0, "mean_scale must have shape [C] = [6], got [1,6]"),
        ({"bias": (4, 5, 6)}, "relu", 0.0, "bias must have shape [C] = [6], got [4,5,6]"),
        ({"shortcut": (4, 5, 1)}, "relu", 0.0, "shortcut must have the shape of x [4,5,6], got [4,5,1]"),
        ({"bias": (6,), "shortcut": (6,)}, "relu", 0.0, "shortcut must have the shape of x [4,5,6], got [6]"),
        ({"x": (4, 6)}, "relu", 0.0, "x must have rank 3 to 8 (batch, 1 to 6 spatial axes, channels)"),
        ({"x": (4, 0, 6)}, "relu", 0.0, "x has no positions (a spatial size is 0) but a batch of 4"),
        ({}, "elu", -1.0, "alpha must be finite and >= 0, got -1"),
    ],
)
def test_errors_name_the_argument(shapes, activation, alpha, message):
    shapes = {"x": (4, 5, 6), "gain": (6,), "mean_scale": (6,), **shapes}
    function = tf.function(
        lambda inputs: native.agc(**inputs, activation=activation, alpha=alpha, data_format="channels_last")[0],
        jit_compile=True,
        input_signature=[{name: tf.TensorSpec(None) for name in shapes}],
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)):
        function({name: tf.ones(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    "argument, shape, message",
    [
        (0, (2, 4, 5), "dy must have the shape of kept [2,4,3], got [2,4,5]"),
        (1, (3, 2), "dmean must have shape [N, C] = [2,3], got [3,2]"),
        (3, (2,), "mean must have shape [N, C] = [2,3], got [2]"),
        (4, (2,), "gain must have shape [C] = [3], got [2]"),
        (5, (4,), "mean_scale must have shape [C] = [3], got [4]"),
        (6, (3, 1), "bias must have shape [C] = [3], got [3,1]"),
        (7, (2, 4, 1), "shortcut must have the shape of kept [2,4,3], got [2,4,1]"),
    ],
)
def test_errors_of_the_gradient_name_the_argument(argument, shape, message):
    attributes = {"activation": "relu", "alpha": 0.0, "data_format": "N...C"}
    function = tf.function(
        lambda *inputs: native._ops.tf_agc_agc_grad(*inputs[:6], [inputs[6]], [inputs[7]], **attributes),
        jit_compile=True,
        input_signature=[tf.TensorSpec(None)] * 8,
    )
    inputs = [tf.ones(shape) for shape in [(2, 4, 3), (2, 3), (2, 4, 3), (2, 3), (3,), (3,), (3,), (2, 4, 3)]]
    inputs[argument] = tf.ones(shape)
    with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)):
        function(*inputs)


# ---- Loading ----

_LOADED = """
import ctypes
import shutil
import sys
import tensorflow as tf

def compiled(function):
    return tf.function(function, jit_compile=True)

if "started" in sys.argv:
    compiled(lambda x: x + 1.0)(tf.zeros([]))  # XLA reads its registry
import tf_agc
from tf_agc import native

def gradient(x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf_agc.agc(x, 2.0, 1.0, activation="relu")
    return y, tape.gradient(y, x)

def show():
    for dtype in (tf.float32, tf.float64, tf.float16, tf.bfloat16):
        x = tf.cast([[[1.0], [3.0]]], dtype)
        y, dx = compiled(gradient)(x)
        print(tf.cast(y, tf.float32).numpy().ravel(), tf.cast(dx, tf.float32).numpy().ravel())
    values = (ctypes.c_int64 * 4)()
    ctypes.CDLL(str(native.XLA_STATUS.library)).TfAgcXlaCounters(values, 4)
    print(list(values)[::2])

if "started" in sys.argv:
    show()
tf.load_library(str(native.XLA_STATUS.library))
copy = sys.argv[1] + "/copy.so"
shutil.copy(native.XLA_STATUS.library, copy)
tf.load_library(copy)
show()
"""
_SHOWN = ["[0. 2.] [-1.  1.]"] * 4


def test_xla_had_started_before_the_import(tmp_path):
    # And loading the library again does no harm.
    lines = python("-c", _LOADED, tmp_path, "started").stdout.splitlines()
    assert lines == [*_SHOWN, "[4, 4]", *_SHOWN, "[8, 8]"]


def test_loading_twice_is_harmless(tmp_path):
    assert python("-c", _LOADED, tmp_path).stdout.splitlines() == [*_SHOWN, "[4, 4]"]


def test_available():
    status = native.XLA_STATUS
    assert status.available and status.library.name == "libtf_agc_xla.so"
    assert status.reason == f"built for TensorFlow {tf.__version__}"
    assert AutomaticGainControl().supports_jit


def test_main(capsys):
    __main__.main()
    assert f"XLA kernels:     loaded (built for TensorFlow {tf.__version__})" in capsys.readouterr().out


_WITHOUT = """
import warnings
import keras
import numpy as np
import tensorflow as tf
import tf_agc
from tf_agc import native, __main__

print(native.STATUS.available, native.XLA_STATUS.available, native.XLA_STATUS.reason)
x = tf.constant([[[1.0], [3.0]]])
function = tf.function(lambda x: tf_agc.agc(x, 2.0, 1.0, activation="relu"), jit_compile=True)
print(function(x).numpy().ravel(), tf_agc.agc(x, 2.0, 1.0, activation="relu").numpy().ravel())

model = keras.Sequential([keras.Input((2, 1)), tf_agc.AutomaticGainControl()])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model.compile("sgd", "mse", jit_compile=True)
print(model.layers[0].supports_jit, model.jit_compile, "doesn't support `jit_compile=True`" in str(caught[-1].message))
model.fit(x, x, verbose=0)
__main__.main()
"""


@pytest.mark.parametrize("library, reason", [(None, "there is no native library at"), (b"broken", "cannot be loaded")])
def test_without_the_library(tmp_path, library, reason):
    package = tmp_path / "tf_agc"
    shutil.copytree(native.STATUS.library.parents[1], package, ignore=shutil.ignore_patterns("*_xla.so", "__pycache__"))
    if library:
        (package / "native_library" / "libtf_agc_xla.so").write_bytes(library)
    status, results, keras_says, *rows = python("-c", _WITHOUT, path=tmp_path).stdout.splitlines()
    assert status.startswith("True False ") and reason in status
    assert results == "[0. 2.] [0. 2.]"
    assert keras_says == "False False True"
    assert any(row.startswith("implementation:  native ") for row in rows)
    assert any(row.startswith("XLA kernels:     not loaded (") and reason in row for row in rows)
