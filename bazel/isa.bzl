"""isa_library: one source, compiled once per instruction-set level. Which level runs is chosen at load, in C++."""

load("//bazel:library.bzl", "COPTS")

# Without math errno and trapping math the compiler vectorises comparisons and square roots; results stay those of IEEE,
# as nothing is reordered, and nothing is contracted that the source does not contract itself.
_LOOP_COPTS = [
    "-O3",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
]

_X86_LEVELS = {
    "v2": ["-march=x86-64-v2"],
    "v3": ["-march=x86-64-v3"],
    "v4": [
        "-march=x86-64-v4",
        "-mprefer-vector-width=512",
    ],
}

_OTHER_LEVELS = {"baseline": []}

def isa_library(name, srcs, textual_hdrs = [], deps = []):
    """Makes a cc_library of `srcs` for every level, `name` of those that fit the target's CPU, and a test.

    Args:
      name: the target that others depend on; "<name>_symbols_test" checks that no level exports weak symbols.
      srcs: compiled once per level; TF_AGC_ISA_LEVEL is the level's name, which is also the namespace of its code.
      textual_hdrs: headers for `srcs` alone.
      deps: as in cc_library.
    """
    for level, copts in _X86_LEVELS.items() + _OTHER_LEVELS.items():
        native.cc_library(
            name = name + "_" + level,
            srcs = srcs,
            textual_hdrs = textual_hdrs,
            copts = COPTS + _LOOP_COPTS + copts,
            linkstatic = True,
            local_defines = ["TF_AGC_ISA_LEVEL=" + level],
            tags = ["manual"],  # Only by way of `name`: the other CPU's levels do not compile.
            visibility = ["//visibility:private"],
            deps = deps,
        )

    levels = select({
        "@platforms//cpu:x86_64": [":" + name + "_" + level for level in _X86_LEVELS],
        "//conditions:default": [":" + name + "_" + level for level in _OTHER_LEVELS],
    })
    native.cc_library(
        name = name,
        visibility = ["//visibility:private"],
        deps = levels,
    )
    native.sh_test(
        name = name + "_symbols_test",
        size = "small",
        srcs = ["//bazel:no_weak_symbols_test.sh"],
        args = select({
            "@platforms//cpu:x86_64": ["$(locations :%s_%s)" % (name, level) for level in _X86_LEVELS],
            "//conditions:default": ["$(locations :%s_%s)" % (name, level) for level in _OTHER_LEVELS],
        }),
        data = levels,
    )
