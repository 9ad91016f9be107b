"""Puts the op into TensorFlow Serving's sources: `apply_overlay.py SERVING` changes two files of that tree, or none.

WORKSPACE gets this checkout as @tf_agc, and the server's list of custom ops gets @tf_agc//cc:ops_lib. Nothing else
changes: @org_tensorflow stays theirs. A tree that already has both is left as it is.
"""

import argparse
import ast
import contextlib
import json
import os
import pathlib
import re
import shutil
import sys

RELEASE = "2.20.0"
DEVELOPMENT = "0.0.0"  # what their sources between releases say

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
WORKSPACE = "WORKSPACE"
BUILD = "tensorflow_serving/model_servers/BUILD"
VERSION = "tensorflow_serving/model_servers/version.h"

OPS_LIST = "SUPPORTED_TENSORFLOW_OPS"
OPS_LIB = "@tf_agc//cc:ops_lib"


class OverlayError(Exception):
    """One sentence: which file, what was expected, what came."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("serving", type=pathlib.Path, help="directory of TensorFlow Serving's sources")
    parser.add_argument(
        "--release",
        default=RELEASE,
        help="the release that the sources must be; the overlay was written for %(default)s. Sources between releases "
        "are taken too, with a warning",
    )
    arguments = parser.parse_args()
    try:
        print(apply(arguments.serving, arguments.release))
    except (OSError, OverlayError) as error:
        sys.exit(f"error: {error}")


def apply(serving: pathlib.Path, release: str = RELEASE, checkout: pathlib.Path = CHECKOUT) -> str:
    """Returns what was done, in one line. Raises OverlayError, with nothing changed, on a tree of another shape."""
    found = _release(serving / VERSION)
    if found == DEVELOPMENT:
        print(
            f"warning: {serving} are sources between releases, whose TensorFlow may be another one than {release}'s: "
            "export with the same, and try what the server answers",
            file=sys.stderr,
        )
    elif found != release:
        raise OverlayError(f"{serving} must be the sources of TensorFlow Serving {release}, got {found}")
    workspace = _add_repository(serving / WORKSPACE, checkout)
    build = _add_ops(serving / BUILD)
    if workspace is None and build is None:
        return f"{serving} has the overlay already: nothing changed."
    if workspace is None or build is None:
        one, other = (WORKSPACE, BUILD) if workspace is None else (BUILD, WORKSPACE)
        raise OverlayError(f"{one} has the overlay and {other} has not: restore both in {serving}, then start again")
    _replace_both({serving / WORKSPACE: workspace, serving / BUILD: build})
    return f"Changed {WORKSPACE} and {BUILD} in {serving}: the server links {OPS_LIB} of {checkout}."


def _read(file: pathlib.Path) -> str:
    if not file.is_file():
        raise OverlayError(f"{file} is missing: this is not the source tree of TensorFlow Serving")
    return file.read_text(encoding="utf-8")


def _release(file: pathlib.Path) -> str:
    text = _read(file)
    parts = [
        re.findall(rf"^#define TF_MODELSERVER_{part}_VERSION (\d+)$", text, re.M)
        for part in ("MAJOR", "MINOR", "PATCH")
    ]
    suffix = re.findall(r'^#define TF_MODELSERVER_VERSION_SUFFIX "(.*)"$', text, re.M)
    if any(len(values) != 1 for values in (*parts, suffix)):
        raise OverlayError(f"{file} does not say one version")
    return ".".join(values[0] for values in parts) + suffix[0]


def _parse(file: pathlib.Path, text: str) -> ast.Module:
    # These files are Starlark, which as far as they go is Python.
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise OverlayError(f"{file} cannot be read, line {error.lineno}: {error.msg}") from error


def _add_repository(file: pathlib.Path, checkout: pathlib.Path) -> str | None:
    """The text of WORKSPACE with @tf_agc, or None where it has it."""
    text = _read(file)
    calls = [
        node.value
        for node in _parse(file, text).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    named: dict[object, list] = {}
    for call in calls:
        values = {
            keyword.arg: keyword.value.value for keyword in call.keywords if isinstance(keyword.value, ast.Constant)
        }
        named.setdefault(values.get("name"), []).append((ast.unparse(call.func), values.get("path"), call))
    (rule, _, first), *others = named.get("tf_serving", [(None, None, None)])
    if rule != "workspace" or others:
        raise OverlayError(f'{file} must begin with workspace(name = "tf_serving")')
    if "org_tensorflow" not in named:
        raise OverlayError(f"{file} must define the repository org_tensorflow")
    if "tf_agc" in named:
        (rule, path, _), *others = named["tf_agc"]
        if (rule, path) != ("local_repository", str(checkout)) or others:
            raise OverlayError(f"{file} has a repository tf_agc already, and it is not {checkout}: restore the file")
        return None
    path = json.dumps(str(checkout))
    repository = f'\n# Custom ops.\nlocal_repository(\n    name = "tf_agc",\n    path = {path},\n)\n'
    return _insert(text, first.end_lineno, repository)


def _add_ops(file: pathlib.Path) -> str | None:
    """The text of the server's BUILD file with our library among the ops, or None where it is."""
    text = _read(file)
    values = [
        node.value
        for node in _parse(file, text).body
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [OPS_LIST]
    ]
    if len(values) != 1:
        raise OverlayError(f"{file} must assign {OPS_LIST} once, got {len(values)} times")
    # In their file a sum: lists for old releases first, then the list itself.
    (value,) = values
    labels = value.right if isinstance(value, ast.BinOp) else value
    if not isinstance(labels, ast.List) or not labels.elts or labels.elts[0].lineno == labels.lineno:
        raise OverlayError(f"{file}: {OPS_LIST} must end with a list of labels, one a line, got {ast.unparse(labels)}")
    if any(isinstance(label, ast.Constant) and label.value == OPS_LIB for label in labels.elts):
        return None
    return _insert(text, labels.lineno, f'    "{OPS_LIB}",\n')


def _insert(text: str, line: int, addition: str) -> str:
    lines = text.splitlines(keepends=True)
    return "".join([*lines[:line], addition, *lines[line:]])


def _replace_both(contents: dict[pathlib.Path, str]) -> None:
    """Every new text is on the disk before the first file changes, and what changed goes back if another cannot."""
    before = {file: file.read_bytes() for file in contents}
    aside = {file: file.with_name(file.name + ".tf_agc") for file in contents}
    changed = []
    try:
        for file, text in contents.items():
            aside[file].write_text(text, encoding="utf-8")
            shutil.copymode(file, aside[file])
        for file in contents:
            os.replace(aside[file], file)
            changed.append(file)
    except BaseException:
        for file in changed:
            file.write_bytes(before[file])
        raise
    finally:
        for file in aside.values():
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
