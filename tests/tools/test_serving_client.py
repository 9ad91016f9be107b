"""tools/serving/client.py against servers in this process: the real gRPC service, and HTTP, answering with an exported
SavedModel. They are no TensorFlow Serving: how they refuse is taken from its sources.
"""

import contextlib
import errno
import http.server
import json
import pathlib
import re
import socket
import sys
import threading
from concurrent import futures

import grpc
import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

import tf_agc
from agc_testing import python
from serving import client

ROOT = pathlib.Path(__file__).resolve().parents[2]

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 6, 5, 4), dtype=np.uint8)
WEIGHTS = RNG.standard_normal((3, 1)).astype(np.float32)
MAPS = RNG.standard_normal((3, 6, 5, 4)).astype(np.float32)


# ---- A model, and servers of it ----


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    image, weight = keras.Input(IMAGES.shape[1:], name="image", dtype="uint8"), keras.Input((1,), name="weight")
    x = keras.layers.Conv2D(8, 3, use_bias=False)(keras.layers.Rescaling(1 / 255)(image))
    x = tf_agc.AutomaticGainControl("relu", gain_initializer="random_normal")(x)
    logits = keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x))
    return keras.Model({"image": image, "weight": weight}, {"logits": logits, "weighted": logits * weight})


@pytest.fixture(scope="module")
def loaded(model, tmp_path_factory):
    """The portable export as a program without tf_agc sees it, with more signatures for types and failures."""
    layer = tf_agc.AutomaticGainControl("elu")
    layer(MAPS)

    def signature(function, dtype, shape=(None, *MAPS.shape[1:])):
        return tf.function(function, input_signature=[tf.TensorSpec(shape, dtype, name="x")])

    signatures = {
        "single": signature(lambda x: layer(x), "float32"),
        "half": signature(lambda x: tf.cast(layer(tf.cast(x, tf.float32)), tf.float16), "float16"),
        "bfloat16": signature(lambda x: tf.cast(layer(x), tf.bfloat16), "float32"),
        "large": signature(lambda x: tf.tile(tf.reshape(x, [-1]), [3000]), "float32"),
        "text": signature(lambda x: tf.strings.as_string(x), "int32", [None]),
    }
    path = tmp_path_factory.mktemp("served") / "net"
    version = tf_agc.export_saved_model(model, path, signatures=signatures)
    return tf.saved_model.load(str(version))


class Refusal(Exception):
    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


def _specs(loaded, name, version, signature):
    if name != "net" or version not in (None, 1):
        where = f"Latest({name})" if version is None else f"Specific({name}, {version})"
        raise Refusal(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {where}")
    if signature not in loaded.signatures:
        raise Refusal(grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{signature}" not found.')
    return loaded.signatures[signature].structured_input_signature[1]


def _answer(loaded, signature, inputs):
    """Outputs by name. The session's own checks, as errors of the server."""
    specs = loaded.signatures[signature].structured_input_signature[1]
    if set(inputs) != set(specs):
        missing = ",".join(sorted(set(specs) - set(inputs)))
        message = f"input size does not match signature. Missing but required: {{{missing}}}."
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)
    for name, spec in specs.items():
        if inputs[name].dtype != spec.dtype.as_numpy_dtype or not spec.shape.is_compatible_with(inputs[name].shape):
            message = f"{name} must be {spec.dtype.name} {spec.shape}, got {inputs[name].dtype} {inputs[name].shape}"
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)
    outputs = loaded.signatures[signature](**{name: tf.constant(value) for name, value in inputs.items()})
    return {name: value.numpy() for name, value in outputs.items()}


class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, loaded):
        self.loaded = loaded

    def Predict(self, request, context):
        spec = request.model_spec
        version = spec.version.value if spec.HasField("version") else None
        try:
            _specs(self.loaded, spec.name, version, spec.signature_name)
            inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
            outputs = _answer(self.loaded, spec.signature_name, inputs)
        except Refusal as refusal:
            context.abort(refusal.code, str(refusal))
        answer = predict_pb2.PredictResponse()
        for name, value in outputs.items():
            answer.outputs[name].CopyFrom(tf.make_tensor_proto(value))
        return answer


@contextlib.contextmanager
def _grpc_server(service):
    options = [("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
    server = grpc.server(futures.ThreadPoolExecutor(2), options=options)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


@contextlib.contextmanager
def _http_server(answer):
    """answer(path, body) -> (status, bytes)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            status, body = answer(self.path, self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _rest(loaded):
    """The documented REST interface on top of _answer."""

    def answer(path, body):
        name, version = re.fullmatch(r"/v1/models/([^/:]+)(?:/versions/(\d+))?:predict", path).groups()
        request = json.loads(body)
        signature = request["signature_name"]
        try:
            specs = _specs(loaded, name, version and int(version), signature)
            given = request.get("inputs")
            if given is None:
                given = {key: [sample[key] for sample in request["instances"]] for key in request["instances"][0]}
            try:
                inputs = {key: np.array(value, specs[key].dtype.as_numpy_dtype) for key, value in given.items()}
            except (KeyError, ValueError) as error:
                raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"JSON Value: {error}") from error
            outputs = _answer(loaded, signature, inputs)
        except Refusal as refusal:
            status = 404 if refusal.code == grpc.StatusCode.NOT_FOUND else 400
            return status, json.dumps({"error": str(refusal)}).encode()
        texts = {key: value.astype(str) if value.dtype == object else value for key, value in outputs.items()}
        lists = {key: value.tolist() for key, value in texts.items()}
        sole = len(lists) == 1
        if "inputs" in request:
            return 200, json.dumps({"outputs": next(iter(lists.values())) if sole else lists}).encode()
        samples = [dict(zip(lists, sample, strict=True)) for sample in zip(*lists.values(), strict=True)]
        samples = [next(iter(sample.values())) for sample in samples] if sole else samples
        return 200, json.dumps({"predictions": samples}).encode()

    return answer


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """gRPC would ask the proxy of whoever runs the tests for this machine's own ports."""
    for name in ("grpc_proxy", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def servers(loaded):
    with _grpc_server(Service(loaded)) as grpc_address, _http_server(_rest(loaded)) as rest_address:
        yield {"grpc": grpc_address, "rest": rest_address}


@pytest.fixture
def files(tmp_path):
    np.save(tmp_path / "image.npy", IMAGES)
    np.save(tmp_path / "weight.npy", WEIGHTS)
    np.save(tmp_path / "maps.npy", MAPS)
    np.save(tmp_path / "half.npy", MAPS.astype(np.float16))
    np.save(tmp_path / "bfloat16.npy", MAPS.astype(ml_dtypes.bfloat16))
    np.save(tmp_path / "two.npy", WEIGHTS[:2])
    np.save(tmp_path / "scalar.npy", np.float32(1))
    np.save(tmp_path / "none.npy", MAPS[:0])
    np.save(tmp_path / "int.npy", np.array([3, -4], np.int32))
    np.save(tmp_path / "strings.npy", np.array(["a"]))
    np.save(tmp_path / "objects.npy", np.array([{}]))
    np.savez(tmp_path / "archive.npz", MAPS)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "maps.npy").read_bytes()[:-1])
    header = (tmp_path / "maps.npy").read_bytes().replace(b"(3, 6, 5, 4)", b"(3, 6, 5, 4 ")
    (tmp_path / "header.npy").write_bytes(header)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "logits.npy").write_text("somebody's")
    return tmp_path


BOTH = ["--input", "image={dir}/image.npy", "--input", "weight={dir}/weight.npy"]
MAPS_TO_SINGLE = ["--signature", "single", "--input", "x={dir}/maps.npy"]


def _main(server, files, *arguments):
    """The program, here."""
    client.main(["--model", "net", "--server", server, *[argument.format(dir=files) for argument in arguments]])


def _outputs(directory):
    return {file.stem: np.load(file) for file in directory.iterdir()}


# ---- Answers ----


@pytest.mark.parametrize("arguments", [["--api", "grpc"], ["--api", "rest"], ["--api", "rest", "--rows"]], ids=" ".join)
def test_predictions_are_the_model_s(model, loaded, servers, files, capsys, arguments):
    _main(servers[arguments[1]], files, *arguments, *BOTH, "--output_dir", f"{files}/new/predictions")
    assert sorted(capsys.readouterr().out.splitlines()) == [
        f"{name}: {'float32' if 'grpc' in arguments else 'float64'} [3, 10]" for name in ("logits", "weighted")
    ]
    got = _outputs(files / "new" / "predictions")
    exported = loaded.signatures["serving_default"](image=tf.constant(IMAGES), weight=tf.constant(WEIGHTS))
    predicted = model.predict({"image": IMAGES, "weight": WEIGHTS}, verbose=0)
    assert set(got) == set(exported) == {"logits", "weighted"}
    for name, value in got.items():
        np.testing.assert_array_equal(value, exported[name])  # nothing is lost on the way, in JSON neither
        np.testing.assert_allclose(value, predicted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, name", [([], "output_0"), (["--api", "rest"], "outputs"), (["--api", "rest", "--rows"], "predictions")]
)
def test_a_sole_output_and_a_version(loaded, servers, files, capsys, arguments, name):
    # REST leaves out its name.
    server = servers["rest" if arguments else "grpc"]
    _main(server, files, *arguments, *MAPS_TO_SINGLE, "--version", "1", "--output_dir", "{dir}/new")
    got = _outputs(files / "new")
    assert set(got) == {name}
    np.testing.assert_array_equal(got[name], loaded.signatures["single"](x=tf.constant(MAPS))["output_0"])


def test_predictions_are_printed(servers, files, capsys):
    _main(servers["grpc"], files, "--signature", "text", "--input", "x={dir}/int.npy")
    assert capsys.readouterr().out == "output_0: object [2]\n[b'3' b'-4']\n"


def test_half_precision_over_grpc(loaded, servers, files):
    _main(servers["grpc"], files, "--signature", "half", "--input", "x={dir}/half.npy", "--output_dir", "{dir}/half")
    want = loaded.signatures["half"](x=tf.constant(MAPS.astype(np.float16)))["output_0"]
    got = _outputs(files / "half")["output_0"]
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, want)
    # A .npy file has no bfloat16: every value of it is a float32.
    arguments = ["--signature", "bfloat16", "--input", "x={dir}/maps.npy", "--output_dir", "{dir}/wide"]
    _main(servers["grpc"], files, *arguments)
    want = loaded.signatures["bfloat16"](x=tf.constant(MAPS))["output_0"]
    got = _outputs(files / "wide")["output_0"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, tf.cast(want, tf.float32))


def test_an_answer_of_more_than_4_megabytes(servers, files):
    # gRPC's own limit, unless a client lifts it.
    _main(servers["grpc"], files, "--signature", "large", "--input", "x={dir}/maps.npy", "--output_dir", "{dir}/large")
    assert _outputs(files / "large")["output_0"].nbytes > 2**22


def test_rest_needs_neither_tensorflow_nor_grpc(servers, files):
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['tensorflow', 'grpc', 'tensorflow_serving'])); "
        "sys.argv[0] = 'client.py'; from serving import client; client.main()"
    )
    arguments = ["--model", "net", "--api", "rest", "--server", servers["rest"], "--signature", "text"]
    done = python("-c", script, *arguments, "--input", f"x={files}/int.npy")
    assert done.stdout == "outputs: <U2 [2]\n['3' '-4']\n" and not done.stderr


# ---- Requests ----


@pytest.mark.parametrize("dtype", client.GRPC_DTYPES)
def test_a_grpc_request(dtype):
    value = np.arange(24).reshape(2, 3, 4).astype(dtype)
    request = client.build_grpc_request({"x": value, "y": value[:1]}, "net", "single", version=7)
    sent = predict_pb2.PredictRequest.FromString(request.SerializeToString())
    spec = sent.model_spec
    assert (spec.name, spec.signature_name, spec.version.value) == ("net", "single", 7)
    assert set(sent.inputs) == {"x", "y"}
    assert sent.inputs["x"].dtype == tf.as_dtype(dtype).as_datatype_enum
    np.testing.assert_array_equal(tf.make_ndarray(sent.inputs["x"]), value, strict=True)


def test_a_grpc_request_for_the_newest_version():
    spec = client.build_grpc_request({"x": MAPS}, "net").model_spec
    assert spec.signature_name == "serving_default" and not spec.HasField("version")


@pytest.mark.parametrize("dtype", client.REST_DTYPES)
def test_a_rest_request(dtype):
    value = np.array([[0, 1, 1], [1, 0, 100]]).astype(dtype)
    inputs = {"x": value, "y": value[:, 0]}
    assert json.loads(client.build_rest_request(inputs, "single")) == {
        "signature_name": "single",
        "inputs": {"x": value.tolist(), "y": value[:, 0].tolist()},
    }
    assert json.loads(client.build_rest_request(inputs, rows=True)) == {
        "signature_name": "serving_default",
        "instances": [{"x": value[i].tolist(), "y": value[i, 0].tolist()} for i in range(2)],
    }


def test_rest_numbers_are_exact():
    value = np.array([0.1, 1 / 3, np.finfo(np.float32).max, np.inf, -np.inf, np.nan, 2**-149], np.float32)
    text = client.build_rest_request({"x": value}).decode()
    assert "Infinity, -Infinity, NaN" in text  # the server's spelling
    np.testing.assert_array_equal(np.array(json.loads(text)["inputs"]["x"], np.float32), value)
    integers = np.array([2**63 - 1, -(2**63)])
    np.testing.assert_array_equal(json.loads(client.build_rest_request({"x": integers}))["inputs"]["x"], integers)


# ---- Bad input ----


def _error(capsys, server, files, *arguments):
    """The one line of a failure; nothing else is printed."""
    with pytest.raises(SystemExit) as caught:
        _main(server, files, *arguments)
    captured = capsys.readouterr()
    assert not captured.out and not captured.err
    message = caught.value.code
    assert isinstance(message, str) and "\n" not in message  # Python prints it, and exits with 1
    return message


_BY_DTYPE = ", ".join(client.REST_DTYPES)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--input", "x"], "--input must be NAME=FILE.npy, got 'x'"),
        (["--input", "=x.npy"], "--input must be NAME=FILE.npy, got '=x.npy'"),
        ([*BOTH, *BOTH], "--input 'image' is given twice"),
        (["--input", "x={dir}/no.npy"], "--input 'x': {dir}/no.npy cannot be read: No such file or directory"),
        (["--input", "x={dir}"], "--input 'x': {dir} cannot be read: Is a directory"),
        (["--input", "x={dir}/archive.npz"], "--input 'x': {dir}/archive.npz is not a whole .npy file of numbers: ..."),
        (["--input", "x={dir}/cut.npy"], "--input 'x': {dir}/cut.npy is not a whole .npy file of numbers: ..."),
        (["--input", "x={dir}/header.npy"], "--input 'x': {dir}/header.npy is not a whole .npy file of numbers: ..."),
        (["--input", "x={dir}/objects.npy"], "--input 'x': {dir}/objects.npy is not a whole .npy file of numbers: ..."),
        (
            ["--input", "x={dir}/strings.npy"],
            f"input 'x' must have a dtype that gRPC takes ({_BY_DTYPE}, float16), got <U1",
        ),
        (
            ["--input", "x={dir}/bfloat16.npy"],
            f"input 'x' must have a dtype that gRPC takes ({_BY_DTYPE}, float16), got |V2",
        ),
        (
            ["--api", "rest", "--input", "x={dir}/half.npy"],
            f"input 'x' must have a dtype that REST takes ({_BY_DTYPE}), got float16",
        ),
        (
            ["--api", "rest", "--input", "x={dir}/none.npy"],
            "input 'x' must not be empty for REST, got shape [0, 6, 5, 4]: JSON has no shapes",
        ),
        (
            ["--api", "rest", "--rows", "--input", "image={dir}/image.npy", "--input", "weight={dir}/two.npy"],
            "--rows needs inputs of one batch size, got image 3, weight 2",
        ),
        (
            ["--api", "rest", "--rows", "--input", "x={dir}/scalar.npy"],
            "--rows needs inputs of one batch size, got x none",
        ),
        ([*BOTH, "--output_dir", "{dir}/taken"], "--output_dir must be a new or empty directory, got {dir}/taken"),
        ([*BOTH, "--output_dir", "{dir}/int.npy"], "--output_dir {dir}/int.npy cannot be read: Not a directory"),
    ],
)
def test_what_is_refused_before_it_is_sent(files, capsys, arguments, message):
    got = _error(capsys, "127.0.0.1:1", files, *arguments)
    message = "error: " + message.format(dir=files)
    assert got.startswith(message[:-3]) and len(got) > len(message) if message.endswith("...") else got == message
    assert (files / "taken" / "logits.npy").read_text() == "somebody's"


def test_an_input_that_no_request_holds():
    large = np.broadcast_to(np.float32(0), (2**29,))
    with pytest.raises(
        client.ClientError, match="inputs must be smaller than 2 GiB in one request, got 2147483648 byt"
    ):
        client.build_grpc_request({"x": large}, "net")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--server", "localhost"], "argument --server: must be HOST:PORT, got 'localhost'"),
        (["--server", "http://localhost:8501"], "argument --server: must be HOST:PORT, got 'http://localhost:8501'"),
        (["--server", "localhost:65536"], "argument --server: must be HOST:PORT, got 'localhost:65536'"),
        (["--timeout", "0"], "argument --timeout: must be a positive float, got '0'"),
        (["--timeout", "nan"], "argument --timeout: must be a positive float, got 'nan'"),
        (["--version", "new"], "argument --version: must be a positive int, got 'new'"),
        (["--rows"], "--rows needs --api rest"),
    ],
)
def test_wrong_options(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        client.main(["--model", "net", "--input", "x=x.npy", *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")


GRPC_AND_REST = pytest.mark.parametrize("api", ["grpc", "rest"])


@GRPC_AND_REST
@pytest.mark.parametrize(
    "arguments, codes, message",
    [
        (["--signature", "no"], ("FAILED_PRECONDITION", 400), 'Serving signature key "no" not found.'),
        (
            ["--input", "image={dir}/image.npy"],
            ("INVALID_ARGUMENT", 400),
            "input size does not match signature. Missing but required: {weight}.",
        ),
        (
            ["--input", "image={dir}/image.npy", "--input", "weight={dir}/maps.npy"],
            ("INVALID_ARGUMENT", 400),
            "weight must be float32 (None, 1), got float32 (3, 6, 5, 4)",
        ),
    ],
)
def test_the_server_s_refusal_is_passed_on(servers, files, capsys, api, arguments, codes, message):
    arguments = arguments if "--input" in arguments else [*arguments, *BOTH]
    code = codes[0] if api == "grpc" else f"HTTP {codes[1]}"
    got = _error(capsys, servers[api], files, "--api", api, *arguments, "--output_dir", "{dir}/new")
    assert got == f"error: {servers[api]} refused the request ({code}): {message}"
    assert not (files / "new").exists()


def test_a_wrong_dtype(servers, files, capsys):
    arguments = ["--input", "image={dir}/maps.npy", "--input", "weight={dir}/weight.npy"]
    got = _error(capsys, servers["grpc"], files, *arguments)
    assert got == (
        f"error: {servers['grpc']} refused the request (INVALID_ARGUMENT): "
        "image must be uint8 (None, 6, 5, 4), got float32 (3, 6, 5, 4)"
    )


@GRPC_AND_REST
@pytest.mark.parametrize("version, where", [([], "Latest(other)"), (["--version", "9"], "Specific(other, 9)")])
def test_a_model_that_is_not_served(servers, files, capsys, api, version, where):
    got = _error(capsys, servers[api], files, "--api", api, *BOTH, *version, "--model", "other")
    message = f"{servers[api]} does not serve the model 'other': Servable not found for request: {where}"
    assert got == f"error: {message}"


@pytest.fixture
def silent():
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def closed():
    """A port that is held, so that nobody else listens there, and takes no connections."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


def test_no_server(closed, files, capsys):
    got = _error(capsys, closed, files, *BOTH)
    assert got.startswith(f"error: {closed} is unavailable (no gRPC server, or overloaded): ")
    got = _error(capsys, closed, files, "--api", "rest", *BOTH)
    assert got == f"error: no REST server answers at {closed}: Connection refused"


def test_a_host_that_does_not_exist(files, capsys, monkeypatch):
    def unknown(*arguments):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    got = _error(capsys, "host.invalid:8501", files, "--api", "rest", *BOTH)
    assert got == "error: no REST server answers at host.invalid:8501: Name or service not known"


def test_a_host_that_cannot_exist(files, capsys):
    got = _error(capsys, "two..dots:8501", files, "--api", "rest", *BOTH)
    assert got.startswith("error: no REST server answers at two..dots:8501: ")


@GRPC_AND_REST
def test_a_server_that_does_not_answer(silent, files, capsys, api):
    got = _error(capsys, silent, files, "--api", api, *BOTH, "--timeout", "0.2")
    assert got == f"error: {silent} did not answer within 0.2 s"


def test_the_wrong_port(servers, files, capsys):
    got = _error(capsys, servers["grpc"], files, "--api", "rest", *BOTH)
    assert re.fullmatch(rf"error: {servers['grpc']} did not answer in HTTP \(\w+\): is this its REST port\?", got)
    got = _error(capsys, servers["rest"], files, *BOTH)
    assert got.startswith(f"error: {servers['rest']} is unavailable (no gRPC server, or overloaded): ")


@pytest.mark.parametrize(
    "status, body, message",
    [
        (200, b"<html>", "the answer is malformed: expected JSON with arrays in 'outputs', got '<html>'"),
        (200, b"", "the answer is malformed: expected JSON with arrays in 'outputs', got ''"),
        (200, b"\xff", "the answer is malformed: expected JSON with arrays in 'outputs', got '\ufffd'"),
        (200, b"[1]", "the answer is malformed: expected JSON with arrays in 'outputs', got '[1]'"),
        (200, b'{"a": 1}', "the answer is malformed: expected JSON with arrays in 'outputs', got '{\"a\": 1}'"),
        (
            200,
            b'{"outputs": [[1], [2, 3]]}',
            "the answer is malformed: expected JSON with arrays in 'outputs', got '{\"outputs\": [[1], [2, 3]]}'",
        ),
        (
            200,
            b'{"outputs": null}',
            "the answer is malformed: expected JSON with arrays in 'outputs', got '{\"outputs\": null}'",
        ),
        (
            200,
            b'{"outputs": {}}',
            "the answer is malformed: expected JSON with arrays in 'outputs', got '{\"outputs\": {}}'",
        ),
        (502, b"<b>Bad\ngateway</b>", "{server} refused the request (HTTP 502): <b>Bad gateway</b>"),
        (404, b"nothing here", "{server} does not serve the model 'net': nothing here"),
    ],
)
def test_a_malformed_rest_answer(files, capsys, status, body, message):
    with _http_server(lambda *_: (status, body)) as server:
        got = _error(capsys, server, files, "--api", "rest", *BOTH, "--output_dir", "{dir}/new")
    assert got == "error: " + message.replace("{server}", server)
    assert not (files / "new").exists()


def test_an_answer_that_is_nested_too_deeply():
    with pytest.raises(client.ClientError, match="the answer is malformed: expected JSON with arrays in 'outputs'"):
        client.parse_rest_answer(b'{"outputs": ' + b"[" * 10**6)


@pytest.mark.parametrize("body", [b'{"predictions": []}', b'{"predictions": [{"a": 1}, {"b": 1}]}'])
def test_a_malformed_answer_in_rows(body):
    with pytest.raises(client.ClientError, match="the answer is malformed: expected JSON with arrays in 'predictions'"):
        client.parse_rest_answer(body, rows=True)


@pytest.mark.parametrize(
    "output, message",
    [
        (None, "the answer is malformed: it has no outputs"),
        (tf.make_tensor_proto(1.0, shape=[3]), None),  # the format's own way to say [1, 1, 1]
        (TensorProto(dtype="DT_FLOAT", tensor_content=b"123"), "output 'y' of the answer is malformed: "),
        (TensorProto(dtype="DT_RESOURCE"), "output 'y' of the answer is malformed: "),
    ],
)
def test_a_malformed_grpc_answer(files, capsys, output, message):
    class Malformed(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            return predict_pb2.PredictResponse(outputs={} if output is None else {"y": output})

    with _grpc_server(Malformed()) as server:
        if message is None:
            _main(server, files, *BOTH)
            assert capsys.readouterr().out == "y: float32 [3]\n[1. 1. 1.]\n"
        else:
            assert _error(capsys, server, files, *BOTH).startswith(f"error: {message}")


def test_grpc_without_the_package(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    got = _error(capsys, "127.0.0.1:1", files, *BOTH)
    assert got.startswith("error: gRPC needs the package tensorflow-serving-api, or take --api rest (")


def test_outputs_that_no_file_holds(servers, files, capsys):
    arguments = ["--signature", "text", "--input", "x={dir}/int.npy", "--output_dir", "{dir}/new"]
    got = _error(capsys, servers["grpc"], files, *arguments)
    assert got == "error: output 'output_0' (object) fits no .npy file: run without --output_dir"
    with pytest.raises(client.ClientError, match=r"output '\.\./y' \(float32\) fits no .npy file"):
        client.write_outputs(files / "new", {"../y": MAPS})
    assert not (files / "new").exists()


def test_a_disk_that_is_full_for_the_outputs(tmp_path, monkeypatch):
    write = np.lib.format.write_array

    def full(stream, value, **keywords):
        if stream.name.endswith("b.npy"):
            stream.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(stream, value, **keywords)

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(client.ClientError, match=f"--output_dir {tmp_path} cannot be written: No space left on device"):
        client.write_outputs(tmp_path, {"a": MAPS, "b": MAPS})
    assert not any(tmp_path.iterdir())
