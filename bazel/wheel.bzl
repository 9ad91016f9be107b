"""wheel: runs tools/make_wheel.py. A rule of its own because only auditwheel knows the wheel's file name: the output is a
directory with this one file."""

load("@python_environment//:defs.bzl", "PYTHON", "TENSORFLOW_VERSION")

def _wheel_impl(ctx):
    directory = ctx.actions.declare_directory(ctx.label.name)
    arguments = ctx.actions.args()
    arguments.add(ctx.file.make_wheel)
    arguments.add_all(ctx.files.libraries, before_each = "--library")
    arguments.add("--tensorflow_version", TENSORFLOW_VERSION)
    arguments.add("--platform", ctx.attr.platform)
    arguments.add("--output", directory.path)
    arguments.add_all(ctx.files.srcs)
    ctx.actions.run(
        executable = PYTHON,
        arguments = [arguments],
        inputs = ctx.files.srcs + ctx.files.libraries + [ctx.file.make_wheel, ctx.file._environment],
        outputs = [directory],
        mnemonic = "Wheel",
        progress_message = "Making the wheel",
    )
    return [DefaultInfo(files = depset([directory]))]

wheel = rule(
    implementation = _wheel_impl,
    attrs = {
        "libraries": attr.label_list(
            mandatory = True,
            allow_files = [".so"],
            doc = "The native libraries.",
        ),
        "make_wheel": attr.label(
            mandatory = True,
            allow_single_file = True,
            doc = "The program that makes the wheel.",
        ),
        "platform": attr.string(
            mandatory = True,
            doc = "What sysconfig.get_platform() says where the libraries run.",
        ),
        "srcs": attr.label_list(
            mandatory = True,
            allow_files = True,
            doc = "pyproject.toml, setup.py, the files that they name, and the package's sources.",
        ),
        "_environment": attr.label(
            default = "@python_environment//:environment.txt",
            allow_single_file = True,
        ),
    },
)
