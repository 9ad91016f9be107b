"""What a stock server of TensorFlow 2.20 knows of the ops in portable exports, and what of a SavedModel it does not.

server_ops.txt has the facts. That release wrote them down itself, from its own registry, and any release compares with
them:

    tools/bazel.sh --tensorflow 2.20 version    # makes .cache/venv-2.20, if it is not there
    .cache/venv-2.20/bin/python tools serving.server_ops [OP ...]

writes the ops in it anew, and those that are named besides.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import op_def_pb2, types_pb2

# Private, and without a public counterpart: all registered ops.
from tensorflow.python.client import pywrap_tf_session

RELEASE = "2.20."  # the oldest that README.md and docs/serving.md promise
FACTS = pathlib.Path(__file__).with_suffix(".txt")

_HEADING = """\
# Ops in portable exports, as TensorFlow {release} registers them: attributes, in brackets those with a default, and the
# values that they may have. The first row is the release's versions of GraphDef. Written by server_ops.py.
"""
_VERSIONS = "GraphDef"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="*", help="an op that a portable export may have from now on")
    wanted = {*read(), *parser.parse_args().op} - {_VERSIONS}
    if not tf.__version__.startswith(RELEASE):
        sys.exit(f"server_ops must run with TensorFlow {RELEASE}*, got {tf.__version__}.")
    registered = {op.name: op for op in _registered()}
    if unknown := sorted(wanted - registered.keys()):
        sys.exit(f"TensorFlow {tf.__version__} has no ops {', '.join(unknown)}: no portable export may have them.")
    rows = [_row(registered[name]) for name in sorted(wanted)]
    version = tf.version
    rows.insert(
        0, f"{_VERSIONS} producer:{version.GRAPH_DEF_VERSION} min_producer:{version.GRAPH_DEF_VERSION_MIN_PRODUCER}"
    )
    FACTS.write_text(_HEADING.format(release=tf.__version__) + "\n".join(rows) + "\n", encoding="utf-8")


def read() -> dict[str, dict[str, tuple[set[str], bool]]]:
    """The facts: the attributes of each op, which values they may have (none: any), whether they must be there."""
    facts: dict[str, dict[str, tuple[set[str], bool]]] = {}
    for line in FACTS.read_text(encoding="utf-8").splitlines() if FACTS.exists() else ():
        if not line.startswith("#"):
            name, *attributes = line.split(" ")
            facts[name] = {}
            for attribute in attributes:
                key, _, values = attribute.strip("[]").partition(":")
                facts[name][key] = set(filter(None, values.split("|"))), not attribute.startswith("[")
    return facts


def unknown(saved_model: Any) -> list[str]:
    """What the release would refuse in a SavedModel (the protocol buffer), a sentence each."""
    return sorted(set(_unknown(saved_model, read())))


def _unknown(saved_model: Any, facts: Mapping[str, Mapping[str, tuple[set[str], bool]]]) -> Iterator[str]:
    graph_def = saved_model.meta_graphs[0].graph_def
    (producer,), _ = facts[_VERSIONS]["producer"]
    (min_producer,), _ = facts[_VERSIONS]["min_producer"]
    if not graph_def.versions.min_consumer <= int(producer):
        yield f"the graph needs a consumer of version {graph_def.versions.min_consumer}, the release is {producer}"
    if not graph_def.versions.producer >= int(min_producer):
        yield f"the graph's producer is {graph_def.versions.producer}, the release reads those from {min_producer}"
    functions = graph_def.library.function
    own = {function.signature.name for function in functions}
    for node in (*graph_def.node, *(node for function in functions for node in function.node_def)):
        if node.op in facts:
            yield from _unknown_attributes(node, facts[node.op])
        elif node.op not in own:
            yield f"the op {node.op} is not in {FACTS.name}: {pathlib.Path(__file__).name} says how it comes there"


def _unknown_attributes(node: Any, attributes: Mapping[str, tuple[set[str], bool]]) -> Iterator[str]:
    # A consumer takes every attribute with an underscore in front, and needs none of them.
    for name in sorted(node.attr.keys() - attributes.keys()):
        if not name.startswith("_"):
            yield f"the op {node.op} has no attribute {name}"
    for name, (allowed, required) in attributes.items():
        if name not in node.attr:
            if required:
                yield f"the op {node.op} must have the attribute {name}"
        elif allowed and (values := set(_values(node.attr[name]))) - allowed:
            listed = ", ".join(sorted(allowed))
            yield f"the attribute {name} of the op {node.op} must be one of {listed}, got {', '.join(sorted(values))}"


def _values(attribute: Any) -> Iterator[str]:
    """Types and strings of an attribute, which alone have lists of what is allowed."""
    kind = attribute.WhichOneof("value")
    for value in [attribute.type] if kind == "type" else attribute.list.type:
        yield types_pb2.DataType.Name(value)
    for value in [attribute.s] if kind == "s" else attribute.list.s:
        yield value.decode()


def _registered() -> Any:
    return op_def_pb2.OpList.FromString(pywrap_tf_session.TF_GetBuffer(pywrap_tf_session.TF_GetAllOpList())).op


def _row(op: Any) -> str:
    words = [op.name]
    for attribute in op.attr:
        allowed = "|".join(sorted(_values(attribute.allowed_values)))
        word = attribute.name + (f":{allowed}" if allowed else "")
        words.append(f"[{word}]" if attribute.HasField("default_value") else word)
    return " ".join(words)


if __name__ == "__main__":
    main()
