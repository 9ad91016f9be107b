"""Repositories made from the Python environment that the plugin is built for.

@python_environment is the interpreter and its TensorFlow's version; @org_tensorflow and @xla are that TensorFlow's
headers and libraries under TensorFlow's own label names. Nothing about our own targets lives here.

The interpreter is --repo_env=TF_AGC_PYTHON, or python3. TF_AGC_ENVIRONMENT names what is installed in it: a new value
makes Bazel look at the interpreter again. tools/setup.sh sets both in .bazelrc.configured.

--repo_env=TF_AGC_TENSORFLOW is the folder of the same TensorFlow for another processor, whose headers and libraries are
taken in place of the interpreter's: tools/build_aarch64.sh.
"""

_ENVIRON = ["TF_AGC_PYTHON", "TF_AGC_ENVIRONMENT", "TF_AGC_TENSORFLOW"]

# Not what pip says, which spells a version between releases in another way: this is compared when the library is loaded.
_TENSORFLOW_VERSION = """
import tensorflow as tf
print(tf.__version__)
"""

# sysconfig knows the compile flags from the library itself, so TensorFlow has to be imported here.
_TENSORFLOW_FILES = """
import tensorflow as tf
print(tf.sysconfig.get_include())
print(tf.sysconfig.get_lib())
print(" ".join(tf.sysconfig.get_compile_flags()))
"""

def _python(repository_ctx):
    path = repository_ctx.os.environ.get("TF_AGC_PYTHON") or repository_ctx.which("python3")
    if not path:
        fail("No Python interpreter: run tools/setup.sh or set --repo_env=TF_AGC_PYTHON to one with TensorFlow.")
    return str(path)

def _ask_python(repository_ctx, program):
    python = _python(repository_ctx)
    result = repository_ctx.execute([python, "-c", program], environment = {"TF_CPP_MIN_LOG_LEVEL": "3"})
    if result.return_code != 0:
        fail("%s has no TensorFlow that can be used: run tools/setup.sh.\n%s" % (python, result.stderr))
    return result.stdout.strip().split("\n")

def _python_environment_impl(repository_ctx):
    version = _ask_python(repository_ctx, _TENSORFLOW_VERSION)[-1]
    repository_ctx.file("defs.bzl", "PYTHON = %r\nTENSORFLOW_VERSION = %r\n" % (_python(repository_ctx), version))

    # An input of actions that run the interpreter, so that they run again after a change of what is installed in it.
    repository_ctx.file("environment.txt", repository_ctx.os.environ.get("TF_AGC_ENVIRONMENT", version) + "\n")
    repository_ctx.file("BUILD", """exports_files(["environment.txt"])\n""")

python_environment = repository_rule(
    doc = "defs.bzl: PYTHON, TENSORFLOW_VERSION; environment.txt: changes with what is installed in the interpreter.",
    implementation = _python_environment_impl,
    environ = _ENVIRON,
    local = True,
)

_ROOT_BUILD = """# TensorFlow's headers and libraries; named in //tensorflow/core, //tensorflow/cc and //tensorflow/compiler/tf2xla.

cc_library(
    name = "headers",
    hdrs = glob(["include/**"], exclude = ["include/**/BUILD.bazel"]),
    defines = {defines},
    includes = ["include"],  # Bazel hands these on as -isystem: no warnings from TensorFlow's headers.
    visibility = ["//tensorflow:__subpackages__"],
)

cc_import(
    name = "framework_library",
    shared_library = "libtensorflow_framework.so.2",
    visibility = ["//tensorflow:__subpackages__"],
)

# What the headers of the XLA compiler include besides.
cc_library(
    name = "xla_headers",
    includes = [
        "include/external/farmhash_archive/src",
        "include/external/highwayhash",
    ],
    visibility = ["//tensorflow:__subpackages__"],
    deps = [":headers"],
)

cc_import(
    name = "cc_library",
    shared_library = "libtensorflow_cc.so.2",
    visibility = ["//tensorflow:__subpackages__"],
)
"""

_CORE_BUILD = """# The targets of TensorFlow's own //tensorflow/core that this project uses.

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "framework",
    deps = [
        "//:framework_library",
        "//:headers",
    ],
)

alias(
    name = "lib",
    actual = ":framework",
)

# With every kernel: for programs.
cc_library(
    name = "tensorflow",
    deps = [
        ":framework",
        "//:cc_library",
    ],
)
"""

_SAVED_MODEL_BUILD = """# The target of TensorFlow's own //tensorflow/cc/saved_model that this project uses.

alias(
    name = "loader",
    actual = "//tensorflow/core:tensorflow",
    visibility = ["//visibility:public"],
)
"""

_TF2XLA_BUILD = """# The targets of TensorFlow's own //tensorflow/compiler/tf2xla that this project uses.

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "xla_compiler",
    deps = [
        "//:cc_library",
        "//:xla_headers",
        "//tensorflow/core:framework",
    ],
)

alias(
    name = "common",
    actual = ":xla_compiler",
)

alias(
    name = "xla_op_registry",
    actual = ":xla_compiler",
)
"""

_FFI_BUILD = """# The target of XLA's own //xla/ffi/api that this project uses; the pip package has the header among TensorFlow's.

alias(
    name = "ffi",
    actual = "@org_tensorflow//tensorflow/core:framework",
    visibility = ["//visibility:public"],
)
"""

def _tensorflow_repository_impl(repository_ctx):
    include, library, flags = _ask_python(repository_ctx, _TENSORFLOW_FILES)[-3:]
    if repository_ctx.os.environ.get("TF_AGC_TENSORFLOW"):
        library = repository_ctx.os.environ["TF_AGC_TENSORFLOW"]
        include = library + "/include"
    repository_ctx.symlink(include, "include")
    for name in ["libtensorflow_framework.so.2", "libtensorflow_cc.so.2"]:
        repository_ctx.symlink(library + "/" + name, name)
    defines = [flag[len("-D"):] for flag in flags.split(" ") if flag.startswith("-D")]
    repository_ctx.file("BUILD", _ROOT_BUILD.format(defines = repr(defines)))
    repository_ctx.file("tensorflow/core/BUILD", _CORE_BUILD)
    repository_ctx.file("tensorflow/cc/saved_model/BUILD", _SAVED_MODEL_BUILD)
    repository_ctx.file("tensorflow/compiler/tf2xla/BUILD", _TF2XLA_BUILD)

tensorflow_repository = repository_rule(
    doc = "@org_tensorflow: TensorFlow's label names over the installed pip package.",
    implementation = _tensorflow_repository_impl,
    environ = _ENVIRON,
    local = True,
)

def _xla_repository_impl(repository_ctx):
    repository_ctx.file("xla/ffi/api/BUILD", _FFI_BUILD)

xla_repository = repository_rule(
    doc = "@xla: XLA's label names over @org_tensorflow.",
    implementation = _xla_repository_impl,
)
