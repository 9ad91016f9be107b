"""The native op's results against the reference in float64: shapes, dtypes, special values."""

import ctypes
import platform

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

import tf_agc
from agc_testing import (
    ACTIVATIONS,
    ALPHA,
    ALPHA_ARGUMENT,
    DATA_FORMATS,
    DTYPES,
    EPSILON,
    OPTIONAL,
    SMALLEST_NORMAL,
    check,
    floating_point_control,
    make_case,
    parameter_dtype,
    python,
    run,
)
from tf_agc import native, reference

pytestmark = pytest.mark.usefixtures("native_required")

# Vector widths are 2 to 32 elements: around them, primes and 1.
_SIZES = st.one_of(st.sampled_from([1, 2, 3, 5, 7, 11, 13, 15, 17, 31]), st.integers(1, 40))
_CHANNELS = st.one_of(st.sampled_from([1, 3, 8, 16, 31, 64, 127, 257, 513]), st.integers(1, 513))


@st.composite
def _shapes(draw):
    channels = draw(_CHANNELS)
    budget = 60_000 // channels  # small enough for hundreds of examples
    sizes = []
    for _ in range(draw(st.integers(1, 3))):
        sizes.append(min(draw(_SIZES), max(1, budget)))
        budget //= sizes[-1]
    return min(draw(st.integers(1, 5)), max(1, budget)), *sizes, channels


@hypothesis.settings(max_examples=200)
@hypothesis.given(
    shape=_shapes(),
    dtype=st.sampled_from(DTYPES),
    data_format=st.sampled_from(DATA_FORMATS),
    activation=st.sampled_from(ACTIVATIONS),
    alpha=st.sampled_from([0.0, 0.1, 0.2, 1.0, 1.7]),
    seed=st.integers(0, 2**31),
    optional=st.sampled_from(sorted(OPTIONAL)),
)
def test_any_shape(shape, dtype, data_format, activation, alpha, seed, optional):
    alpha = alpha if activation in ("leaky_relu", "elu") else 0.0
    bias, shortcut = OPTIONAL[optional]
    case = make_case(shape, dtype, activation, data_format, alpha, seed, bias=bias, shortcut=shortcut)
    check(case, run(case, native.agc))


@pytest.mark.parametrize("optional", OPTIONAL)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_combination(dtype, data_format, activation, optional, mode):
    bias, shortcut = OPTIONAL[optional]
    case = make_case((3, 5, 7, 19), dtype, activation, data_format, bias=bias, shortcut=shortcut)
    check(case, run(case, native.agc, function=mode == "function"))


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 2, 1, 2, 5), (1, 2, 1, 3, 2, 2, 2, 5)])
def test_other_ranks(shape, data_format):
    case = make_case(shape, "float32", "relu", data_format, bias=True, shortcut=True)
    check(case, run(case, native.agc))


@pytest.mark.parametrize("optional", ["neither", "both"])
@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("shape", [(1, 160, 163, 24), (9, 40, 41, 96), (2, 7, 7, 2051)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sizes_that_are_cut_into_tasks(shape, dtype, data_format, optional):
    # Larger than a core's cache, fewer samples than threads, channels beyond one block.
    bias, shortcut = OPTIONAL[optional]
    case = make_case(shape, dtype, "relu", data_format, bias=bias, shortcut=shortcut)
    check(case, run(case, native.agc))


@pytest.mark.parametrize("data_format", DATA_FORMATS)
def test_a_million_positions_of_mean_1000(data_format):
    rng = np.random.default_rng(0)
    shape = (1, 1000, 1000, 3) if data_format == "channels_last" else (1, 3, 1000, 1000)
    x = tf.cast(1000 + rng.standard_normal(shape), tf.float32)
    ones = tf.ones([3])

    def error(agc):
        y, mean = agc(x, ones, ones, "linear", 0.0, data_format)
        return np.abs(y - want).max(), np.abs(mean - want_mean).max()

    x64, ones64 = tf.cast(x, tf.float64), tf.cast(ones, tf.float64)
    want, want_mean = reference.agc(x64, ones64, ones64, "linear", 0.0, data_format)
    want, want_mean = want.numpy(), want_mean.numpy()
    y_error, mean_error = error(native.agc)
    assert mean_error <= 4 * 2.0**-23 * 1000  # a few epsilons of the mean
    # And not above the stock ops' own, or one rounding of x - mean where they happen to be exact.
    assert y_error <= max(error(reference.agc)[0], 2.0**-24 * 1024)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_map(dtype, activation):
    x = np.random.default_rng(0).standard_normal((3, 4, 5, 33)).astype(np.float32)
    x[0, 1, 2, 3], x[1, 0, 0, 8], x[2, 3, 4, 32] = np.nan, np.inf, -np.inf
    x = tf.cast(x, dtype)
    parameters = tf.cast(np.linspace(0.5, 2, 33), parameter_dtype(dtype))
    attributes = activation, ALPHA[activation], "channels_last"
    y, mean = native.agc(x, parameters, parameters, *attributes)
    want, want_mean = reference.agc(x, parameters, parameters, *attributes)
    np.testing.assert_array_equal(np.isnan(mean), np.isnan(want_mean))
    np.testing.assert_array_equal(np.isinf(mean), np.isinf(want_mean))
    for same in (tf.math.is_nan, tf.math.is_inf):
        np.testing.assert_array_equal(same(y), same(want))
    clean = ~np.isnan(want_mean) & ~np.isinf(want_mean)
    assert clean.sum() == 3 * 33 - 3
    assert np.isfinite(tf.transpose(y, [0, 3, 1, 2]).numpy()[clean].astype(np.float64)).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinite_and_overflowing_values_without_a_mean(activation):
    # mean_scale 0 and a finite mean: only the product with the gain leaves the finite numbers.
    x = tf.constant([[[3e38, -3e38, 1.0], [1.0, 2.0, -2.0]]])
    parameters = tf.constant([10.0, 10.0, -1.0]), tf.zeros([3])
    attributes = activation, ALPHA[activation], "channels_last"
    got, _ = native.agc(x, *parameters, *attributes)
    want, _ = reference.agc(x, *parameters, *attributes)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shortcut_that_is_not_finite_stays_in_its_place(dtype, activation):
    case = make_case((3, 4, 5, 33), dtype, activation, bias=True, shortcut=True)
    shortcut = case.shortcut.numpy().astype(np.float32)
    shortcut[0, 1, 2, 3], shortcut[1, 0, 0, 8], shortcut[2, 3, 4, 32] = np.nan, np.inf, -np.inf
    case.shortcut = tf.cast(shortcut, dtype)
    (got, mean), (want, want_mean) = (case.call(agc, case.inputs.values()) for agc in (native.agc, reference.agc))
    for same in (tf.math.is_nan, tf.math.is_inf):
        np.testing.assert_array_equal(same(got), same(want))
    np.testing.assert_allclose(mean, want_mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_absent_inputs_add_nothing(dtype):
    # Not even a 0, which would make 0 of -0.
    x, one = tf.cast(tf.fill([1, 2, 17], -0.0), dtype), tf.ones([17], parameter_dtype(dtype))
    y, _ = native.agc(x, one, 0 * one, "linear", 0.0, "channels_last")
    assert np.signbit(tf.cast(y, tf.float32)).all()
    for optional in ({"bias": 0 * one}, {"shortcut": tf.zeros_like(x)}):
        y, _ = native.agc(x, one, 0 * one, "linear", 0.0, "channels_last", **optional)
        assert not np.signbit(tf.cast(y, tf.float32)).any()


def test_half_overflows_to_infinity():
    x = tf.constant([[[60000.0], [-60000.0], [0.0]]], tf.float16)
    y, mean = native.agc(x, tf.constant([2.0]), tf.constant([1.0]), "linear", 0.0, "channels_last")
    np.testing.assert_array_equal(tf.cast(y, tf.float32)[0, :, 0], [np.inf, -np.inf, 0])
    assert mean.numpy() == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_denormals_are_kept_or_flushed(dtype, activation):
    # TensorFlow sets flush-to-zero in some of its threads: both are right, anything else is not.
    tiny = np.finfo(dtype).smallest_subnormal * 2**10
    x = np.array([tiny, -tiny, 3 * tiny, -3 * tiny], dtype)
    one = tf.ones([1], dtype)
    attributes = activation, ALPHA[activation], "channels_last"
    y, _ = native.agc(tf.constant(x[None, :, None]), one, one, *attributes)
    y = y.numpy()[0, :, 0]
    slope = {"linear": 1, "elu": 1}.get(activation, ALPHA[activation])
    want = np.where(x > 0, x, slope * x)
    kept = y != 0
    np.testing.assert_allclose(y[kept], want[kept], rtol=0.01)


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_are_kept_in_every_thread(dtype, data_format, mode):
    # Work for the whole pool, whose threads flush where the kernel lets them. All of it made and read in NumPy: even
    # TensorFlow's cast and product flush.
    smallest = SMALLEST_NORMAL[dtype] * EPSILON[dtype]
    shape = (16, 33, 31, 16) if data_format == "channels_last" else (16, 16, 33, 31)
    denormal = np.random.default_rng(0).integers(1, int(1 / EPSILON[dtype]), shape) * smallest
    x = denormal.astype(tf.as_dtype(dtype).as_numpy_dtype)
    one, zero = np.ones(16, parameter_dtype(dtype)), np.zeros(16, parameter_dtype(dtype))
    agc = tf.function(native.agc) if mode == "function" else native.agc
    control = floating_point_control()
    y, mean = agc(tf.constant(x), tf.constant(one), tf.constant(zero), "linear", 0.0, data_format)
    assert floating_point_control() == control
    np.testing.assert_array_equal(y, x)
    want = denormal.mean((1, 2) if data_format == "channels_last" else (2, 3))
    np.testing.assert_allclose(mean, want, rtol=1e-5)
    np.testing.assert_array_equal(x * x.dtype.type(1), denormal)  # and NumPy goes on to keep them


_CONTROL = """
from agc_testing import floating_point_control
import keras, numpy, tensorflow
before = floating_point_control()
import tf_agc
assert tf_agc.native.STATUS.available and tf_agc.native.XLA_STATUS.available
print(floating_point_control() == before, numpy.float32(1e-45) * numpy.float32(1) == numpy.float32(1e-45))
"""


def test_loading_leaves_the_floating_point_control_alone():
    # A library that was linked with -ffast-math has the whole process flush denormals.
    assert python("-c", _CONTROL).stdout.split() == ["True", "True"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="sets bits of MXCSR, which only x86-64 has")
def test_a_caller_that_flushes_denormals_goes_on_to():
    libm = ctypes.CDLL("libm.so.6")
    environment = (ctypes.c_uint32 * 8)()
    x = tf.fill([1, 4, 1], 1e-40)
    ones = tf.ones([1])
    before = floating_point_control()
    libm.fegetenv(environment)
    try:
        environment[7] |= 0x8040  # flush to zero, denormals are zero
        libm.fesetenv(environment)
        flushing = floating_point_control()
        y, _ = native.agc(x, ones, 0 * ones, "linear", 0.0, "channels_last")
        after = floating_point_control()
    finally:
        environment[7] &= ~0x8040
        libm.fesetenv(environment)
    assert after == flushing != before == floating_point_control()
    np.testing.assert_array_equal(y, x)


def _denormal_gain_case(activation):
    """Large maps and denormal gains, whose products are ordinary numbers; NumPy arrays: TensorFlow's cast flushes."""
    rng = np.random.default_rng(0)
    x = (1e36 * rng.standard_normal((2, 33, 31, 9))).astype(np.float32)
    gain, mean_scale = (1e-39 * rng.uniform(1, 3, 9)).astype(np.float32), rng.uniform(-0.5, 1.5, 9).astype(np.float32)
    dy = rng.standard_normal(x.shape).astype(np.float32)

    def results(agc, dtype, function):
        def step(x, gain, mean_scale, dy):
            with tf.GradientTape() as tape:
                tape.watch([x, gain, mean_scale])
                y, _ = agc(x, gain, mean_scale, activation, ALPHA[activation], "channels_last")
            return y, *tape.gradient(y, [x, gain, mean_scale], output_gradients=dy)

        assert (gain < SMALLEST_NORMAL["float32"]).all()
        tensors = [tf.constant(value.astype(dtype)) for value in (x, gain, mean_scale, dy)]
        return [value.numpy() for value in (tf.function(step) if function else step)(*tensors)]

    return results


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_denormal_gain_of_large_maps(activation, mode):
    results = _denormal_gain_case(activation)
    got, want = results(native.agc, np.float32, mode == "function"), results(reference.agc, np.float64, False)
    # A gain that was flushed would make them 0. In float64 all these are ordinary numbers.
    assert np.abs(want[0]).max() > 1e-4 and np.abs(want[1]).max() > 1e-39
    for one, other in zip(got[:2], want[:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parameter_gradients_of_a_denormal_gain(activation, mode):
    results = _denormal_gain_case(activation)
    got, want = results(native.agc, np.float32, mode == "function"), results(reference.agc, np.float64, False)
    for one, other in zip(got[2:], want[2:], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-3 * np.abs(other).max())


@pytest.mark.parametrize("activation", ["leaky_relu", "elu"])
def test_a_denormal_alpha_is_0(activation, mode):
    x, ones, zeros = tf.fill([1, 5, 2], -3e38), tf.ones([2]), tf.zeros([2])
    for agc in (
        lambda x: tf_agc.agc(x, ones, zeros, activation=activation, **{ALPHA_ARGUMENT[activation]: 1e-40}),
        lambda x: native.agc(x, ones, zeros, activation, 1e-40, "channels_last")[0],
    ):
        y = tf.function(agc)(x) if mode == "function" else agc(x)
        np.testing.assert_array_equal(y, np.zeros(x.shape))


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("shape", [(2, 7, 5, 9), (1, 160, 163, 24)])
def test_sums_of_the_largest_halves_are_finite(shape, data_format):
    # Two of them are more than half can hold; backward adds as many.
    case = make_case(shape, "float16", "linear", data_format)
    largest = 65504.0
    case.x, case.dy = tf.fill(case.x.shape, tf.cast(largest, "float16")), case.dy * 10000
    results = run(case, native.agc)
    np.testing.assert_array_equal(results.mean, np.full(results.mean.shape, largest))
    case.gain = tf.ones_like(case.gain)
    results = run(case, native.agc)
    assert all(np.isfinite(value).all() for value in (results.dgain, results.dmean_scale, results.dx))
    case.mean_scale = tf.ones_like(case.mean_scale)
    np.testing.assert_array_equal(run(case, native.agc).y, np.zeros(case.x.shape))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gain", [0.0, -0.0, 1e-45, -1e-45, 1e-38])
def test_gain_0_and_denormal_gain(gain, activation):
    case = make_case((2, 5, 3, 9), "float32", activation)
    case.gain = tf.fill([9], gain)
    results = run(case, native.agc)
    assert all(np.isfinite(value).all() for value in vars(results).values())
    if activation == "linear":  # keeps x: exact
        want = run(case, reference.agc)
        np.testing.assert_allclose(results.dgain, want.dgain, rtol=1e-4, atol=1e-4)
    elif gain == 0:  # y is 0 everywhere: relu's own answer, the documented one of the others
        np.testing.assert_array_equal(results.dgain, np.zeros(9))
    if gain == 0:
        np.testing.assert_array_equal(results.y, np.zeros(results.y.shape))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gain_0_between_a_bias_and_a_shortcut(activation):
    # Activations have lost u there, and say 0; everything else is as ever.
    case = make_case((2, 5, 3, 9), "float32", activation, bias=True, shortcut=True)
    case.gain = tf.zeros_like(case.gain)
    results, want = run(case, native.agc), run(case, reference.agc)
    if activation != "linear":
        np.testing.assert_array_equal(results.dgain, np.zeros(9))
        results.dgain = want.dgain
    for name, value in vars(results).items():
        np.testing.assert_allclose(value, getattr(want, name), rtol=1e-5, atol=1e-5, err_msg=name)


def test_elu_at_its_bottom():
    # y = -alpha exactly: z is lost there and act' is 0.
    x = tf.constant([[[-1000.0], [1000.0], [-1000.0]]])
    with tf.GradientTape() as tape:
        gain, zero = tf.constant([1.0]), tf.constant([0.0])
        tape.watch([x, gain, zero])
        y, _ = native.agc(x, gain, zero, "elu", 0.7, "channels_last")
    dx, dgain, dmean_scale = tape.gradient(y, [x, gain, zero])
    np.testing.assert_array_equal(y[0, :, 0], np.float32([-0.7, 1000, -0.7]))
    np.testing.assert_array_equal(dx[0, :, 0], [0, 1, 0])
    assert dgain.numpy() == 1000 and np.isfinite(dmean_scale)


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(dtype, activation, data_format, mode):
    case = make_case((0, 5, 4, 3), dtype, activation, data_format, bias=True, shortcut=True)
    results = run(case, native.agc, function=mode == "function")
    assert results.y.shape == results.dx.shape == results.dshortcut.shape == case.x.shape
    assert results.mean.shape == (0, 3)
    np.testing.assert_array_equal([results.dgain, results.dmean_scale, results.dbias], np.zeros((3, 3)))


def test_empty_batch_of_empty_maps():
    zero = tf.zeros([3])
    y, mean = native.agc(tf.zeros([0, 0, 5, 3]), zero, zero, "relu", 0.0, "channels_last")
    assert y.shape == (0, 0, 5, 3) and mean.shape == (0, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("data_format", DATA_FORMATS)
def test_maps_of_one_position(data_format, dtype):
    case = make_case((4, 1, 1, 21), dtype, "leaky_relu", data_format, bias=True, shortcut=True)
    check(case, run(case, native.agc))
    case.bias = case.shortcut = None
    case.mean_scale = tf.ones_like(case.mean_scale)
    np.testing.assert_array_equal(run(case, native.agc).y, np.zeros(case.x.shape))


def test_unaligned_views():
    # Slices of a batch start wherever a sample starts: 3 * 5 * 7 floats are no multiple of 16 bytes.
    case = make_case((5, 3, 5, 7), "float32", "relu", bias=True, shortcut=True)
    whole, _ = case.call(native.agc, case.inputs.values())
    for x, shortcut, want in zip(*(tf.split(maps, 5) for maps in (case.x, case.shortcut, whole)), strict=True):
        got, _ = case.call(native.agc, [x, case.gain, case.mean_scale, case.bias, shortcut])
        np.testing.assert_array_equal(got, want)
