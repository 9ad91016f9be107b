"""tf_agc_library: the plugin as a static library, for programs that link TensorFlow, and as the wheel's shared library."""

# For all our own C++. -Werror comes with --config=dev (.bazelrc).
COPTS = [
    "-Wall",
    "-Wextra",
]

def shared_object(name, exports, deps, **kwargs):
    """Makes the shared library `name` from `deps`; it exports what the version script `exports` names, nothing else."""
    native.cc_binary(
        name = name,
        additional_linker_inputs = [exports],
        linkopts = [
            "-Wl,--version-script=$(location %s)" % exports,
            "-Wl,--no-undefined",
            "-Wl,-z,relro",
            "-Wl,-z,now",
            "-Wl,-z,noexecstack",
        ],
        linkshared = True,
        visibility = ["//visibility:public"],
        deps = deps,
        **kwargs
    )

def tf_agc_library(name, shared_library, srcs, deps, tensorflow):
    """Makes `name` and `shared_library` from the same objects.

    TensorFlow is reached through its own label names alone: the installed package here, its sources inside TensorFlow
    Serving.

    Args:
      name: the static library; its ops and kernels register themselves in whatever program links it.
      shared_library: the file name of the shared library; it exports the symbols named in exports.lds and no others.
      srcs: the files that include TensorFlow's headers.
      deps: our own libraries, without TensorFlow.
      tensorflow: labels of @org_tensorflow and @xla.
    """
    native.cc_library(
        name = name,
        srcs = srcs,
        copts = COPTS,
        linkstatic = True,
        visibility = ["//visibility:public"],
        deps = deps + tensorflow,
        # Nothing refers to the registrations: without this the linker would drop them.
        alwayslink = True,
    )
    shared_object(
        name = shared_library,
        exports = "//bazel:exports.lds",
        deps = [":" + name],
    )
