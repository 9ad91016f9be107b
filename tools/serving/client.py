"""Asks a TensorFlow Serving server for predictions, over gRPC or REST: an example to copy.

Inputs come from .npy files. REST needs NumPy alone; gRPC the package tensorflow-serving-api, which imports TensorFlow.
Connections are not encrypted.
"""

import argparse
import http.client
import json
import os
import pathlib
import re
import sys
import urllib.parse
from typing import Any

import numpy as np

# What the server reads from JSON; gRPC has float16 besides. A .npy file holds no bfloat16.
REST_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float32", "float64"),
)
GRPC_DTYPES = (*REST_DTYPES, "float16")

PORTS = {"grpc": 8500, "rest": 8501}


class ClientError(Exception):
    """One sentence: what was expected, and what came."""


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    server = options.server or f"localhost:{PORTS[options.api]}"
    try:
        inputs = read_inputs(options.input)
        if options.output_dir is not None:
            _check_output_dir(options.output_dir)
        if options.api == "grpc":
            request = build_grpc_request(inputs, options.model, options.signature, options.version)
            outputs = predict_grpc(server, request, options.timeout)
        else:
            body = build_rest_request(inputs, options.signature, options.rows)
            answer = predict_rest(server, body, options.model, options.version, options.timeout)
            outputs = parse_rest_answer(answer, options.rows)
        if options.output_dir is not None:
            write_outputs(options.output_dir, outputs)
    except KeyboardInterrupt:
        sys.exit(130)
    except ClientError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    for name, value in outputs.items():
        print(f"{name}: {value.dtype} {list(value.shape)}")
        if options.output_dir is None:
            print(value)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="name of the model on the server")
    parser.add_argument(
        "--input", required=True, action="append", metavar="NAME=FILE.npy", help="once for every input of the signature"
    )
    parser.add_argument("--api", choices=PORTS, default="grpc", help="default: %(default)s")
    parser.add_argument(
        "--server", type=_server, metavar="HOST:PORT", help="default: localhost:8500 for gRPC, localhost:8501 for REST"
    )
    parser.add_argument("--signature", default="serving_default", help="default: %(default)s")
    parser.add_argument("--version", type=_positive(int), help="version of the model; default: the server's newest")
    parser.add_argument("--rows", action="store_true", help='REST: rows ("instances"), not columns ("inputs")')
    parser.add_argument(
        "--output_dir", type=pathlib.Path, help="new or empty directory, where outputs are written as NAME.npy"
    )
    parser.add_argument(
        "--timeout", type=_positive(float), default=10.0, help="seconds to wait for the server; default: %(default)s"
    )
    options = parser.parse_args(arguments)
    if options.rows and options.api != "rest":
        parser.error("--rows needs --api rest")
    return options


def _server(text: str) -> str:
    if not re.fullmatch(r"[^\s/@]+:\d{1,5}", text) or int(text.rpartition(":")[2]) >= 2**16:
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, got {text!r}")
    return text


def _positive(kind: type) -> Any:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < 2**31:
            raise argparse.ArgumentTypeError(f"must be a positive {kind.__name__}, got {text!r}")
        return value

    return convert


# ---- Files ----


def read_inputs(arguments: list[str]) -> dict[str, np.ndarray]:
    """Arrays by name, from arguments NAME=FILE.npy."""
    inputs: dict[str, np.ndarray] = {}
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if not (name and equals and file):
            raise ClientError(f"--input must be NAME=FILE.npy, got {argument!r}")
        if name in inputs:
            raise ClientError(f"--input {name!r} is given twice")
        try:
            with open(file, "rb") as stream:
                # Not np.load: that takes other kinds of files, too.
                inputs[name] = np.lib.format.read_array(stream, allow_pickle=False)
        except OSError as error:
            raise ClientError(f"--input {name!r}: {file} cannot be read: {error.strerror}") from error
        except Exception as error:  # of NumPy's parser, many kinds where the header is damaged
            raise ClientError(f"--input {name!r}: {file} is not a whole .npy file of numbers: {error}") from error
    return inputs


def _check_output_dir(directory: pathlib.Path) -> None:
    try:
        if directory.exists() and any(directory.iterdir()):
            raise ClientError(f"--output_dir must be a new or empty directory, got {directory}")
    except OSError as error:
        raise ClientError(f"--output_dir {directory} cannot be read: {error.strerror}") from error


def write_outputs(directory: pathlib.Path, outputs: dict[str, np.ndarray]) -> None:
    """Writes NAME.npy for every output, or none."""
    for name, value in outputs.items():
        if not re.fullmatch(r"[\w.\- ]+", name) or value.dtype.hasobject:
            raise ClientError(f"output {name!r} ({value.dtype}) fits no .npy file: run without --output_dir")
    written: list[pathlib.Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, value in outputs.items():
            with open(directory / f"{name}.npy", "xb") as stream:
                written.append(directory / f"{name}.npy")
                np.lib.format.write_array(stream, value, allow_pickle=False)
    except OSError as error:
        for file in written:
            file.unlink(missing_ok=True)
        raise ClientError(f"--output_dir {directory} cannot be written: {error.strerror}") from error


def _check_dtypes(inputs: dict[str, np.ndarray], api: str, dtypes: tuple[str, ...]) -> None:
    for name, value in inputs.items():
        if value.dtype.name not in dtypes:
            raise ClientError(
                f"input {name!r} must have a dtype that {api} takes ({', '.join(dtypes)}), got {value.dtype}"
            )


# ---- gRPC ----


def build_grpc_request(
    inputs: dict[str, np.ndarray], model: str, signature: str = "serving_default", version: int | None = None
) -> Any:
    """A PredictRequest. The server compares names, dtypes and shapes with the signature."""
    tf, predict_pb2, _ = _import_serving_api()
    _check_dtypes(inputs, "gRPC", GRPC_DTYPES)
    size = sum(value.nbytes for value in inputs.values())
    if size >= 2**31 - 2**20:
        raise ClientError(f"inputs must be smaller than 2 GiB in one request, got {size} bytes: send smaller batches")
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = signature
    if version is not None:
        request.model_spec.version.value = version
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return request


def predict_grpc(server: str, request: Any, timeout: float) -> dict[str, np.ndarray]:
    """The outputs by name. bfloat16, which no .npy file holds, becomes float32."""
    tf, _, prediction_service_pb2_grpc = _import_serving_api()
    import grpc

    # By default an answer of more than 4 MB is an error.
    with grpc.insecure_channel(server, options=[("grpc.max_receive_message_length", -1)]) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        try:
            answer = stub.Predict(request, timeout=timeout)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code == grpc.StatusCode.UNAVAILABLE:
                raise ClientError(f"{server} is unavailable (no gRPC server, or overloaded): {details}") from error
            if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ClientError(f"{server} did not answer within {timeout:g} s") from error
            if code == grpc.StatusCode.NOT_FOUND:
                raise ClientError(
                    f"{server} does not serve the model {request.model_spec.name!r}: {details}"
                ) from error
            raise ClientError(f"{server} refused the request ({code.name}): {details}") from error
    outputs = {}
    for name in sorted(answer.outputs):
        try:
            value = tf.make_ndarray(answer.outputs[name])
        except (KeyError, TypeError, ValueError) as error:
            raise ClientError(f"output {name!r} of the answer is malformed: {type(error).__name__}: {error}") from error
        outputs[name] = value.astype(np.float32) if value.dtype == tf.bfloat16.as_numpy_dtype else value
    if not outputs:
        raise ClientError("the answer is malformed: it has no outputs")
    return outputs


def _import_serving_api() -> tuple[Any, Any, Any]:
    # Here and not above: REST does without, and TensorFlow takes seconds to import.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its hints about this machine are not news here
    try:
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
    except ImportError as error:
        raise ClientError(f"gRPC needs the package tensorflow-serving-api, or take --api rest ({error})") from error
    return tf, predict_pb2, prediction_service_pb2_grpc


# ---- REST ----


def build_rest_request(inputs: dict[str, np.ndarray], signature: str = "serving_default", rows: bool = False) -> bytes:
    """The body of a request: {"inputs": {name: array}}, or with `rows` {"instances": [{name: sample}, ...]}.

    The server turns the numbers into the signature's dtypes. NaN and infinities are written as it reads them.
    """
    _check_dtypes(inputs, "REST", REST_DTYPES)
    for name, value in inputs.items():
        if value.size == 0:
            raise ClientError(
                f"input {name!r} must not be empty for REST, got shape {list(value.shape)}: JSON has no shapes"
            )
    lists = {name: value.tolist() for name, value in inputs.items()}
    if not rows:
        return json.dumps({"signature_name": signature, "inputs": lists}).encode()
    sizes = {name: value.shape[0] if value.ndim else "none" for name, value in inputs.items()}
    if "none" in sizes.values() or len(set(sizes.values())) > 1:
        got = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ClientError(f"--rows needs inputs of one batch size, got {got}")
    instances = [dict(zip(lists, samples, strict=True)) for samples in zip(*lists.values(), strict=True)]
    return json.dumps({"signature_name": signature, "instances": instances}).encode()


def predict_rest(server: str, body: bytes, model: str, version: int | None, timeout: float) -> bytes:
    """The body of the answer."""
    path = f"/v1/models/{urllib.parse.quote(model, safe='')}"
    path += f"/versions/{version}:predict" if version is not None else ":predict"
    connection = http.client.HTTPConnection(server, timeout=timeout)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        status, answer = response.status, response.read()
    except http.client.HTTPException as error:
        raise ClientError(
            f"{server} did not answer in HTTP ({type(error).__name__}): is this its REST port?"
        ) from error
    except TimeoutError as error:
        raise ClientError(f"{server} did not answer within {timeout:g} s") from error
    except (OSError, UnicodeError) as error:  # UnicodeError: no host can have this name
        reason = getattr(error, "strerror", None) or error
        raise ClientError(f"no REST server answers at {server}: {reason}") from error
    finally:
        connection.close()
    if status != http.HTTPStatus.OK:
        try:
            details = json.loads(answer)["error"]
        except (ValueError, KeyError, TypeError, RecursionError):
            details = answer[:200].decode(errors="replace")
        if status == http.HTTPStatus.NOT_FOUND:
            raise ClientError(f"{server} does not serve the model {model!r}: {details}")
        raise ClientError(f"{server} refused the request (HTTP {status}): {details}")
    return answer


def parse_rest_answer(answer: bytes, rows: bool = False) -> dict[str, np.ndarray]:
    """The outputs by name; of a sole one the server leaves out the name, and it is called as the whole.

    JSON has no dtypes: numbers become int64 or float64, which hold what the server wrote.
    """
    key = "predictions" if rows else "outputs"
    try:
        outputs = json.loads(answer)[key]
        if rows and isinstance(outputs[0], dict):
            outputs = {name: [sample[name] for sample in outputs] for name in outputs[0]}
        if not isinstance(outputs, dict):
            outputs = {key: outputs}
        arrays = {name: np.asarray(value) for name, value in outputs.items()}
        if not arrays or any(value.dtype.kind not in "biufU" for value in arrays.values()):
            raise ValueError("no numbers")
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        got = answer[:100].decode(errors="replace")
        raise ClientError(f"the answer is malformed: expected JSON with arrays in {key!r}, got {got!r}") from error
    return arrays


if __name__ == "__main__":
    main()
