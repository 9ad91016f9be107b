"""The Dockerfiles of tools/serving, as far as that goes without Docker: images, paths, users and shell parts.

The scripts that they copy run here; the server's configuration is read as protobufs.
"""

import http.server
import json
import os
import pathlib
import re
import socket
import subprocess
import threading

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2

from serving import apply_overlay, client

ROOT = pathlib.Path(__file__).resolve().parents[2]
SERVING = ROOT / "tools" / "serving"


def _instructions(name):
    """Instruction and argument, line by line; what Docker's parser does with comments and continued lines."""
    text = re.sub(r"^\s*#.*\n", "", (SERVING / name).read_text(), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def _arguments(name, instruction):
    return [argument for key, argument in _instructions(name) if key == instruction]


EACH = pytest.mark.parametrize("name, variant", [("Dockerfile", ""), ("Dockerfile.cuda", "-gpu")])


@EACH
def test_two_stages_from_pinned_images(name, variant):
    build, run = _arguments(name, "FROM")
    assert build == f"tensorflow/serving:{apply_overlay.RELEASE}-devel{variant} AS build"
    assert re.fullmatch(rf"ubuntu:22\.04@sha256:[0-9a-f]{{64}}|tensorflow/serving:{apply_overlay.RELEASE}-gpu", run)
    assert not [text for _, text in _instructions(name) if "latest" in text]
    copied = [argument for argument in _arguments(name, "COPY") if argument.startswith("--from=")]
    assert copied == ["--from=build /usr/local/bin/tensorflow_model_server /usr/local/bin/tensorflow_model_server"]


def test_both_build_the_same_sources():
    (commit,), (other,) = (
        [argument for argument in _arguments(name, "ARG") if argument.startswith("SERVING_COMMIT=")]
        for name in ("Dockerfile", "Dockerfile.cuda")
    )
    assert commit == other and re.fullmatch(r"SERVING_COMMIT=[0-9a-f]{40}", commit)


def _copied(name):
    """Paths of this repository that go into a stage."""
    arguments = [argument for argument in _arguments(name, "COPY") if not argument.startswith("--from=")]
    return [path for argument in arguments for path in argument.split()[:-1] if not path.startswith("--")]


@EACH
def test_what_is_copied_exists_and_reaches_docker(name, variant):
    ignored, *allowed = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert ignored == "*"  # the context is what is allowed, and no .venv or .git
    allowed = [line[1:] for line in allowed if line.startswith("!")]
    paths = _copied(name)
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path
        assert any(path == entry or path.startswith(f"{entry}/") for entry in allowed), path
    for entry in allowed:
        assert (ROOT / entry).exists(), entry


@EACH
def test_the_server_does_not_run_as_root(name, variant):
    instructions = _instructions(name)
    (user,) = _arguments(name, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    last_stage = instructions[max(i for i, (key, _) in enumerate(instructions) if key == "FROM") :]
    assert ("USER", user) in last_stage
    uid, gid = user.split(":")
    assert [
        run for run in _arguments(name, "RUN") if f"--uid {uid} --gid {gid}" in run and f"groupadd --gid {gid}" in run
    ]


@EACH
def test_ports_and_paths_are_the_stock_image_s(name, variant):
    assert _arguments(name, "EXPOSE") == ["8500 8501"]
    assert _arguments(name, "ENV") == ["MODEL_BASE_PATH=/models MODEL_NAME=model"]
    assert client.PORTS == {"grpc": 8500, "rest": 8501}
    scripts = [json.loads(_arguments(name, "ENTRYPOINT")[0])]
    scripts.append(json.loads(_arguments(name, "HEALTHCHECK")[0].partition("CMD ")[2]))
    copied = [argument for argument in _arguments(name, "COPY") if argument.endswith(" /usr/local/bin/")]
    assert scripts == [["/usr/local/bin/entrypoint.sh"], ["/usr/local/bin/healthcheck.sh"]]
    assert copied == ["--chmod=755 tools/serving/entrypoint.sh tools/serving/healthcheck.sh /usr/local/bin/"]


@pytest.mark.parametrize("source", ["Dockerfile", "Dockerfile.cuda", "entrypoint.sh", "healthcheck.sh"])
def test_the_shell_parts_are_well_formed(source):
    dockerfile = source.startswith("Dockerfile")
    parts = _arguments(source, "RUN") if dockerfile else [(SERVING / source).read_text()]
    assert parts
    for part in parts:
        shell = "sh" if dockerfile else "bash"
        done = subprocess.run([shell, "-n"], input=part, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and not done.stderr, f"{part}: {done.stderr}"


def test_the_entry_point_starts_the_server(tmp_path):
    server = tmp_path / "tensorflow_model_server"
    server.write_text('#!/bin/sh\necho $$ "$@"\n')
    server.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL_NAME": "digits", "MODEL_BASE_PATH": "/models"}
    arguments = ["--enable_batching", "--version label=two words"]
    process = subprocess.Popen(
        [SERVING / "entrypoint.sh", *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    # The same process: signals of `docker stop` reach the server.
    assert output == (
        f"{process.pid} --port=8500 --rest_api_port=8501 --model_name=digits --model_base_path=/models/digits "
        "--enable_batching --version label=two words\n"
    )


def _check_health(port):
    environment = {"PATH": os.environ["PATH"], "MODEL_NAME": "digits"}
    return subprocess.run(
        [SERVING / "healthcheck.sh", str(port)], env=environment, capture_output=True, text=True, timeout=60
    ).returncode


@pytest.mark.parametrize(
    "status, state, healthy", [(200, "AVAILABLE", True), (200, "LOADING", False), (404, "", False)]
)
def test_the_health_check(status, state, healthy):
    # As the server prints it: protobuf's JSON, with spaces.
    body = json.dumps({"model_version_status": [{"version": "1", "state": state}]}, indent=1).encode()
    paths = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        code = _check_health(server.server_port)
        thread.join()
    assert (code == 0) == healthy and paths == ["/v1/models/digits"]


def test_the_health_check_without_a_server():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        assert _check_health(held.getsockname()[1]) != 0


# ---- Configuration ----


@pytest.fixture(scope="module")
def configuration():
    """BatchingParameters and MonitoringConfig: the package tensorflow-serving-api does not have them, so they are made
    from the fields of their .proto files in release 2.20.0 (session_bundle_config.proto, monitoring_config.proto).
    """
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="serving.proto", package="tensorflow.serving", syntax="proto3")
    file.dependency.append(wrappers_pb2.DESCRIPTOR.name)

    def add(message, name, number, kind, label=field.LABEL_OPTIONAL):
        named = isinstance(kind, str)
        message.field.add(
            name=name,
            number=number,
            label=label,
            type=field.TYPE_MESSAGE if named else kind,
            type_name=kind if named else None,
        )

    batching = file.message_type.add(name="BatchingParameters")
    for number, name in enumerate(
        ["max_batch_size", "batch_timeout_micros", "max_enqueued_batches", "num_batch_threads"], 1
    ):
        add(batching, name, number, ".google.protobuf.Int64Value")
    add(batching, "thread_pool_name", 5, ".google.protobuf.StringValue")
    add(batching, "allowed_batch_sizes", 6, field.TYPE_INT64, field.LABEL_REPEATED)
    add(batching, "pad_variable_length_inputs", 7, field.TYPE_BOOL)
    add(batching, "enable_large_batch_splitting", 8, ".google.protobuf.BoolValue")
    add(batching, "max_execution_batch_size", 9, ".google.protobuf.Int64Value")
    prometheus = file.message_type.add(name="PrometheusConfig")
    add(prometheus, "enable", 1, field.TYPE_BOOL)
    add(prometheus, "path", 2, field.TYPE_STRING)
    monitoring = file.message_type.add(name="MonitoringConfig")
    add(monitoring, "prometheus_config", 1, ".tensorflow.serving.PrometheusConfig")

    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)

    def parse(name, text):
        kind = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tensorflow.serving.{name}"))
        return text_format.Parse(text, kind())

    return parse


def test_the_batching_parameters(configuration):
    parameters = configuration("BatchingParameters", (SERVING / "batching_parameters.txt").read_text())
    sizes = list(parameters.allowed_batch_sizes)
    # What the server demands.
    assert sizes == sorted(set(sizes)) and sizes[0] >= 1 and sizes[-1] == parameters.max_batch_size.value
    assert parameters.num_batch_threads.value >= 1 and parameters.max_enqueued_batches.value >= 1
    assert parameters.batch_timeout_micros.value >= 0
    assert not parameters.pad_variable_length_inputs  # padded maps have another mean: their answers would change


def test_the_monitoring_config(configuration):
    prometheus = configuration("MonitoringConfig", (SERVING / "monitoring.config").read_text()).prometheus_config
    assert prometheus.enable and prometheus.path == "/monitoring/prometheus/metrics"


def test_a_misspelt_field_is_noticed(configuration):
    with pytest.raises(text_format.ParseError, match='no field named "max_batchsize"'):
        configuration("BatchingParameters", "max_batchsize { value: 1 }")
