# @local_cuda, written by //bazel:cuda.bzl.

load("@tf_agc//bazel:cuda.bzl", "cuda_toolkit")

package(default_visibility = ["//visibility:public"])

cuda_toolkit(
    name = "toolkit",
    flags = {flags},
    nvcc = "{nvcc}",
)

cc_library(
    name = "runtime",
    srcs = ["libcudart_static.a"],
    linkopts = [
        "-ldl",
        "-lrt",
        "-lpthread",
    ],
    linkstatic = True,
)

cc_library(
    name = "build_info",
    hdrs = ["cuda_build.h"],
    includes = ["."],
)
