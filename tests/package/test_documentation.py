"""The pages for people stay true: their Python runs, their links and paths lead somewhere, messages that they quote are
printed, and the API reference can be made. They stay narrow enough to read. What the pages should say is not tested.
"""

import importlib.util
import pathlib
import re
import shutil
import subprocess

import keras
import pytest
import tensorflow as tf
from markdown_it import MarkdownIt

import tf_agc
from agc_testing import python
from tf_agc import native

ROOT = pathlib.Path(__file__).resolve().parents[2]
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def tokens_of(page):
    """All tokens, those inside of paragraphs and headings included."""
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        yield token
        yield from token.children or ()


def fences(page):
    return [token for token in tokens_of(page) if token.type == "fence"]


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.fixture
def keras_state(fresh_keras, monkeypatch, tmp_path):
    """What a block changes for good: Keras's configuration, the current directory, files in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    policy, floatx, data_format = (
        keras.config.dtype_policy(),
        keras.config.floatx(),
        keras.config.image_data_format(),
    )
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_image_data_format(data_format)
    keras.config.set_dtype_policy(policy)
    tf.config.run_functions_eagerly(False)


@pytest.mark.parametrize("page", [page for page in PAGES if "```python\n" in page.read_text("utf-8")], ids=name_of)
def test_python_runs(page, keras_state, native_required):
    """All blocks of a page, one after the other, as a reader would type them in."""
    namespace = {"__name__": "__main__"}
    for fence in fences(page):
        if fence.info == "python":
            # The empty lines give a traceback the page's line numbers, and AutoGraph the source of a function.
            source = "\n" * (fence.map[0] + 1) + fence.content
            exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_languages(page):
    """A block whose language is spelt otherwise would not be run, and nobody would see."""
    for fence in fences(page):
        language = fence.info.partition(" ")[0]
        assert language and (language == "python" or not language.startswith("py")), (
            f"{name_of(page)}:{fence.map[0] + 1}: a block must say its language, python for Python, got {fence.info!r}"
        )


def anchors_of(page):
    """The anchors that GitHub gives to a page's headings."""
    anchors, tokens = [], list(tokens_of(page))
    for opening, inline in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children)
            anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            repeated = sum(re.fullmatch(re.escape(anchor) + r"(-\d+)?", other) is not None for other in anchors)
            anchors.append(f"{anchor}-{repeated}" if repeated else anchor)
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    links = [token.attrs[key] for token in tokens_of(page) for key in ("href", "src") if key in token.attrs]
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}: there is no such file"
        assert not anchor or anchor in anchors_of(target), f"{name_of(page)} links to {link}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths(page):
    """Files that a page names in code, such as `tools/setup.sh`, and the scripts and modules in its commands."""
    code = [token.content for token in tokens_of(page) if token.type == "code_inline"]
    commands = [token.content for token in fences(page) if token.info == "bash"]
    paths = [text for text in code if re.fullmatch(r"(\./)?(bazel|cc|docs|tests|tf_agc|tools)/[\w./-]+", text)]
    paths += [path for text in commands for path in re.findall(r"(?<!\S)(?:\./)?tools/[\w./-]+", text)]
    modules = [name for text in (*code, *commands) for name in re.findall(r"python tools ([\w.]+)", text)]
    paths += [f"tools/{name.replace('.', '/')}.py" for name in modules]
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing, f"{name_of(page)} names {missing}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_is_narrow(page):
    """Lines of at most 120 characters, as in the sources, and tables that fit a screen."""
    text = page.read_text(encoding="utf-8")
    long = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 120]
    assert not long, f"{name_of(page)} has more than 120 characters in lines {long}"
    assert not re.search(r"^\|([-: ]+\|){8}", text, re.MULTILINE), f"{name_of(page)} has a table of more than 7 columns"


def test_picture_of_the_layer_is_what_its_script_draws(tmp_path):
    python(ROOT / "tools" / "draw_layer.py", "--output", tmp_path / "layer.svg")
    assert (tmp_path / "layer.svg").read_bytes() == (ROOT / "docs" / "layer.svg").read_bytes()


def test_architecture_knows_where_things_are():
    """Its table of places: each name to look for is in the file, or in a file of the folder, that stands beside it."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+ \| `([\w/.]+)` \| `(.+)` \|$", page, re.MULTILINE)
    assert rows
    for path, name in rows:
        files = [ROOT / path] if (ROOT / path).is_file() else (ROOT / path).iterdir()
        texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
        assert any(name in text for text in texts), f"{path} has no {name}"


def test_architecture_lists_every_folder():
    """Each folder with sources has a row of its own: what lives there, and what must not."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    sources = [file for top in ("cc", "tests", "tf_agc", "tools") for file in (ROOT / top).rglob("*.*")]
    folders = {
        str(file.parent.relative_to(ROOT)) for file in sources if file.suffix in (".cc", ".cu", ".h", ".py", ".sh")
    }
    missing = folders - set(re.findall(r"^\| `([\w/]+)` \|", page, re.MULTILINE))
    assert folders and not missing, f"docs/architecture.md has no row for {sorted(missing)}"


# ---- Messages. A block of docs/troubleshooting.md whose language is "text" quotes one; the word behind it says who
# prints it. "..." stands for what differs from case to case.


def messages_of(printer):
    blocks = fences(TROUBLESHOOTING)
    return [" ".join(fence.content.split()) for fence in blocks if fence.info == f"text {printer}"]


def pattern_of(message):
    return re.compile(".{1,200}?".join(re.escape(part) for part in message.split("...")), re.DOTALL)


@pytest.mark.parametrize("message", messages_of("tf_agc"))
def test_our_messages_are_ours(message):
    """A message stands in one source file, cut into the literals of a concatenation or not."""
    files = [*(ROOT / "tf_agc").glob("*.py"), *(ROOT / "tools").glob("*.sh"), *(ROOT / "cc").rglob("*.[ch]*")]
    for file in files:
        text = re.sub(r'"\s*\n\s*[rf]?"', "", file.read_text(encoding="utf-8"))
        if pattern_of(message).search(text):
            return
    pytest.fail(f"no source file has the message {message!r}")


PROVOKE = """
import pathlib, sys, warnings
import keras
import tensorflow as tf

directory = pathlib.Path(sys.argv[1])

def provoke(function, *arguments, **keywords):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            function(*arguments, **keywords)
        except Exception as error:
            print(" ".join(str(error).split()))
    for warning in caught:
        print(" ".join(str(warning.message).split()))

provoke(tf.saved_model.load, directory / "exported")
provoke(keras.models.load_model, directory / "model.keras")
provoke(tf.load_op_library, str(directory / "undefined.so"))

import tf_agc  # a copy without the library for XLA

x = tf.ones([1, 2, 2, 3])
traced_before = tf.function(lambda: tf_agc.agc(x, 1.0, 1.0))
traced_before()
provoke(tf.function(traced_before, jit_compile=True))
model = keras.models.load_model(directory / "model.keras")
provoke(model.compile, "sgd", "mse", jit_compile=True)
"""


def test_tensorflows_messages_are_printed(tmp_path, fresh_keras, native_required):
    """Every message quoted as TensorFlow's (Keras is part of it here), in a process that has what causes them."""
    model = keras.Sequential([keras.Input((4, 4, 3)), tf_agc.AutomaticGainControl("relu")])
    model.save(tmp_path / "model.keras")
    tf.saved_model.save(model, tmp_path / "exported")
    source = 'extern "C" void missing(); extern "C" void call() { missing(); }'
    compiler = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", tmp_path / "undefined.so"]
    subprocess.run(compiler, input=source, text=True, check=True)
    copy = tmp_path / "copy" / "tf_agc"
    without = shutil.ignore_patterns(native.XLA_STATUS.library.name, "__pycache__")
    shutil.copytree(pathlib.Path(native.__file__).parent, copy, ignore=without)
    output = python("-c", PROVOKE, tmp_path, path=copy.parent).stdout
    for message in messages_of("tensorflow"):
        assert pattern_of(message).search(output), f"{message!r} is not in\n{output}"


# ---- The API reference


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The page of the whole API."""
    directory = tmp_path_factory.mktemp("api")
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "tools" / "build_docs.py")
    build_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_docs)
    build_docs.main(["--output_dir", str(directory)])
    return (directory / "tf_agc.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", tf_agc.__all__)
def test_reference(reference, name):
    section = re.search(rf'<section id="{name}">.*?</section>', reference, re.DOTALL)
    assert section, f"the reference has no {name}"
    # google's style is recognised where a section becomes a heading, and its entries a list.
    docstring = getattr(tf_agc, name).__doc__ if name != "__version__" else ""
    for title, heading in [("Args", "Arguments"), ("Returns", "Returns"), ("Raises", "Raises")]:
        if re.search(rf"^ *{title}:$", docstring, re.MULTILINE):
            assert re.search(rf"<h6[^>]*>{heading}:</h6>\s*<(ul|blockquote)>", section.group())
