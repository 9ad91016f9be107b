"""CUDA: @local_cuda, the toolkit that is installed on this machine, and cuda_library, which compiles .cu files with it.

Only --config=cuda builds (//bazel:cuda) look at either. nvcc is $CUDA_HOME/bin/nvcc, else that on PATH, else that of
/usr/local/cuda; any release from 12.1 on. TF_AGC_CUDA_ARCHITECTURES chooses what machine code is made, as in "75 90".
Each may come from the environment or by --repo_env.
"""

load("//bazel:library.bzl", "COPTS")

# st.async needs PTX 8.1.
_OLDEST_NVCC = (12, 1)

# Turing to Hopper, and Blackwell where nvcc has it. The PTX of 90, or of the newest where 90 is not chosen, serves
# whatever is newer and has no code of its own: the driver compiles it when the library is first used.
_DEFAULT_ARCHITECTURES = "75 80 86 89 90"
_ARCHITECTURES_OF_NEWER_NVCC = ["100", "120"]

CudaToolkitInfo = provider(
    doc = "An installed CUDA compiler.",
    fields = {
        "flags": "list of options: the architectures, the release.",
        "nvcc": "absolute path.",
    },
)

def _find_nvcc(repository_ctx):
    home = repository_ctx.os.environ.get("CUDA_HOME")
    on_path = repository_ctx.which("nvcc")
    if home:
        candidates = [home + "/bin/nvcc"]
    else:
        candidates = ([str(on_path)] if on_path else []) + ["/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        # Not by way of a link: nvcc finds its headers beside the file that was called.
        if repository_ctx.path(candidate).exists:
            return str(repository_ctx.path(candidate).realpath)
    if home:
        fail("--config=cuda needs nvcc, and CUDA_HOME=%s has no bin/nvcc." % home)
    fail("--config=cuda needs nvcc 12.1 or newer: CUDA_HOME is not set, PATH has no nvcc, and there is no " +
         "/usr/local/cuda/bin/nvcc. docs/cuda.md says how to get one.")

# Asks nvcc itself, which may be a script far from its toolkit: its release and its toolkit's directory.
def _ask_nvcc(repository_ctx, nvcc):
    result = repository_ctx.execute([nvcc, "--version"])
    _, found, release = result.stdout.partition(" release ")
    if result.return_code != 0 or not found:
        fail("%s --version does not tell a release:\n%s%s" % (nvcc, result.stdout, result.stderr))
    release = release.partition(",")[0]
    if tuple([int(number) for number in release.split(".")]) < _OLDEST_NVCC:
        fail("%s is release %s: 12.1 or newer is needed." % (nvcc, release))

    repository_ctx.file("empty.cu", "")
    result = repository_ctx.execute([nvcc, "--dryrun", "-c", "empty.cu", "-o", "empty.o"])
    _, found, top = (result.stdout + result.stderr).partition("#$ TOP=")
    if result.return_code != 0 or not found:
        fail("%s does not tell where its toolkit is:\n%s%s" % (nvcc, result.stdout, result.stderr))
    return release, top.partition("\n")[0]

def _find_static_runtime(repository_ctx, top):
    directories = ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"]
    for directory in directories:
        file = repository_ctx.path("%s/%s/libcudart_static.a" % (top, directory))
        if file.exists:
            return file
    fail("%s has no libcudart_static.a in %s." % (top, ", ".join(directories)))

# Those of Blackwell that this nvcc compiles for.
def _newer_architectures(repository_ctx, nvcc):
    known = repository_ctx.execute([nvcc, "--list-gpu-code"]).stdout.split("\n")
    return [name for name in _ARCHITECTURES_OF_NEWER_NVCC if "sm_" + name in known]

def _architectures(repository_ctx, nvcc):
    text = repository_ctx.os.environ.get("TF_AGC_CUDA_ARCHITECTURES")
    text = text or " ".join([_DEFAULT_ARCHITECTURES] + _newer_architectures(repository_ctx, nvcc))
    words = [word for word in text.replace(",", " ").split(" ") if word]
    for word in words:
        if not word.isdigit():
            fail("TF_AGC_CUDA_ARCHITECTURES must list numbers such as \"75 90\" (sm_75 and sm_90), got \"%s\"." % text)

    # Each once, the newest last.
    return [str(number) for number in sorted({int(word): None for word in words}.keys())]

def _cuda_repository_impl(repository_ctx):
    nvcc = _find_nvcc(repository_ctx)
    release, top = _ask_nvcc(repository_ctx, nvcc)
    repository_ctx.symlink(_find_static_runtime(repository_ctx, top), "libcudart_static.a")
    architectures = _architectures(repository_ctx, nvcc)
    ptx = "90" if "90" in architectures else architectures[-1]
    flags = ["-gencode=arch=compute_%s,code=sm_%s" % (name, name) for name in architectures]
    flags.append("-gencode=arch=compute_%s,code=compute_%s" % (ptx, ptx))

    # Another release in the same place compiles again.
    flags.append("-DTF_AGC_CUDA_RELEASE=" + release)
    repository_ctx.file("cuda_build.h", "#define TF_AGC_CUDA_BUILD \"%s, %s, PTX %s\"\n" % (
        release,
        " ".join(["sm_" + name for name in architectures]),
        ptx,
    ))
    repository_ctx.template("BUILD", Label("//bazel:cuda.BUILD.tpl"), {"{flags}": repr(flags), "{nvcc}": nvcc})

cuda_repository = repository_rule(
    doc = "@local_cuda: nvcc (:toolkit), its static runtime (:runtime) and what it compiles for (:build_info).",
    implementation = _cuda_repository_impl,
    environ = ["CUDA_HOME", "PATH", "TF_AGC_CUDA_ARCHITECTURES"],
    local = True,
)

def _cuda_toolkit_impl(ctx):
    return [CudaToolkitInfo(flags = ctx.attr.flags, nvcc = ctx.attr.nvcc)]

cuda_toolkit = rule(
    implementation = _cuda_toolkit_impl,
    attrs = {
        "flags": attr.string_list(mandatory = True),
        "nvcc": attr.string(mandatory = True),
    },
)

def _cuda_objects_impl(ctx):
    toolkit = ctx.attr._toolkit[CudaToolkitInfo]
    headers = [dep[CcInfo].compilation_context.headers for dep in ctx.attr.deps]
    objects = []
    for source in ctx.files.srcs:
        object = ctx.actions.declare_file("%s/%s.pic.o" % (ctx.label.name, source.basename))
        arguments = ctx.actions.args()
        arguments.add_all(toolkit.flags)
        arguments.add_all(["-std=c++17", "-O3", "-I.", "-Xfatbin=-compress-all"])
        arguments.add("-Xcompiler=" + ",".join(["-fPIC"] + COPTS))
        arguments.add_all(["-c", source, "-o", object])
        ctx.actions.run(
            executable = toolkit.nvcc,
            arguments = [arguments],
            inputs = depset([source] + ctx.files.hdrs, transitive = headers),
            outputs = [object],
            use_default_shell_env = True,
            mnemonic = "CudaCompile",
            progress_message = "Compiling %s with nvcc" % source.short_path,
        )
        objects.append(object)
    return [DefaultInfo(files = depset(objects))]

_cuda_objects = rule(
    implementation = _cuda_objects_impl,
    attrs = {
        "deps": attr.label_list(providers = [CcInfo]),
        "hdrs": attr.label_list(allow_files = True),
        "srcs": attr.label_list(mandatory = True, allow_files = [".cu"]),
        "_toolkit": attr.label(default = "@local_cuda//:toolkit", providers = [CudaToolkitInfo]),
    },
)

def cuda_library(name, srcs, hdrs, textual_hdrs = [], deps = [], **kwargs):
    """A cc_library whose sources nvcc compiles, with the static CUDA runtime.

    It can be built with --config=cuda alone; wildcards such as //cc/... leave it out.

    Args:
      name: what others depend on, inside a select() on //bazel:cuda.
      srcs: .cu files.
      hdrs: headers for those who depend on it; without CUDA's, so that any compiler takes them.
      textual_hdrs: all other files that srcs include.
      deps: the cc_library targets that hdrs need.
      **kwargs: as in cc_library.
    """
    _cuda_objects(
        name = name + "_objects",
        srcs = srcs,
        hdrs = hdrs + textual_hdrs,
        tags = ["manual"],
        visibility = ["//visibility:private"],
        deps = deps,
    )
    native.cc_library(
        name = name,
        srcs = [name + "_objects"],
        hdrs = hdrs,
        linkstatic = True,
        tags = ["manual"],
        # libtf_agc_cuda.so refers to nothing of it.
        alwayslink = True,
        # The runtime comes before TensorFlow's framework library on the linker's line, which answers for CUDA's functions
        # with stubs of its own: no_cuda_symbols_test.sh.
        deps = deps + ["@local_cuda//:runtime"],
        **kwargs
    )
