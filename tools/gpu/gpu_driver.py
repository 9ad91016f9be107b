"""The CUDA driver and the launchers of cc/core/cuda through ctypes: memory, streams, events, graphs. No judgement here.

The driver's library is on every machine that runs a GPU, so this needs neither a toolkit nor PyTorch. PyTorch shares
the driver's primary context, and so memory and streams, with it.
"""

import ctypes
import pathlib
import statistics
from collections.abc import Callable, Sequence

import numpy as np

_DRIVER = "libcuda.so.1"

# CUdevice_attribute
_MULTIPROCESSORS, _L2_BYTES, _MAJOR, _MINOR = 16, 38, 75, 76
_NON_BLOCKING = 1
_THREAD_LOCAL = 1  # CUstreamCaptureMode: what other threads do, PyTorch's for one, does not end a capture.

_EMPTY_KERNEL = b".version 7.0\n.target sm_75\n.address_size 64\n.visible .entry empty() { ret; }\n"

# A measurement takes at least so long, and one time is the median of so many.
_MIN_MS = 2.0
_MEASUREMENTS = 21


class Error(RuntimeError):
    """What the driver or a launcher refused, in its own words."""


class NoGpu(Error):
    """There is no GPU that the driver's library can use; the text says why."""


class Driver:
    """The first GPU, its primary context current in this thread, and one stream."""

    def __init__(self, library: str = _DRIVER) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise NoGpu(f"there is no GPU driver on this machine ({error})") from None
        self._declare()
        try:
            self._call("cuInit", 0)
            count = self._get(ctypes.c_int, "cuDeviceGetCount")
        except Error as error:
            raise NoGpu(f"the driver finds no GPU ({error})") from None
        if count == 0:
            raise NoGpu("the driver finds no GPU")
        self._device = self._get(ctypes.c_int, "cuDeviceGet", 0)
        self._call("cuCtxSetCurrent", self._get(ctypes.c_void_p, "cuDevicePrimaryCtxRetain", self._device))
        self.stream = self._get(ctypes.c_void_p, "cuStreamCreate", _NON_BLOCKING)
        self._events = [self._get(ctypes.c_void_p, "cuEventCreate", 0) for _ in range(2)]

    def _declare(self) -> None:
        """The types of every function that is called; all return a CUresult."""
        pointer, size, int_, unsigned = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint
        address = ctypes.c_uint64  # CUdeviceptr
        for name, *types in (
            ("cuInit", unsigned),
            ("cuGetErrorString", int_, pointer),
            ("cuDriverGetVersion", pointer),
            ("cuDeviceGetCount", pointer),
            ("cuDeviceGet", pointer, int_),
            ("cuDeviceGetName", pointer, int_, int_),
            ("cuDeviceGetAttribute", pointer, int_, int_),
            ("cuDevicePrimaryCtxRetain", pointer, int_),
            ("cuCtxSetCurrent", pointer),
            ("cuMemGetInfo_v2", pointer, pointer),
            ("cuMemAlloc_v2", pointer, size),
            ("cuMemFree_v2", address),
            ("cuMemcpyHtoDAsync_v2", address, pointer, size, pointer),
            ("cuMemcpyDtoH_v2", pointer, address, size),
            ("cuMemcpyDtoDAsync_v2", address, address, size, pointer),
            ("cuMemsetD8Async", address, ctypes.c_ubyte, size, pointer),
            ("cuStreamCreate", pointer, unsigned),
            ("cuStreamSynchronize", pointer),
            ("cuStreamBeginCapture_v2", pointer, int_),
            ("cuStreamEndCapture", pointer, pointer),
            ("cuEventCreate", pointer, unsigned),
            ("cuEventRecord", pointer, pointer),
            ("cuEventSynchronize", pointer),
            ("cuEventElapsedTime", pointer, pointer, pointer),
            ("cuGraphInstantiateWithFlags", pointer, pointer, ctypes.c_ulonglong),
            ("cuGraphLaunch", pointer, pointer),
            ("cuGraphDestroy", pointer),
            ("cuGraphExecDestroy", pointer),
            ("cuModuleLoadData", pointer, pointer),
            ("cuModuleGetFunction", pointer, pointer, ctypes.c_char_p),
            ("cuLaunchKernel", pointer, *[unsigned] * 7, pointer, pointer, pointer),
        ):
            function = getattr(self._library, name)
            function.argtypes, function.restype = types, int_

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._library, name)(*arguments)
        if result != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(result, ctypes.byref(text))
            raise Error(f"{name}: {(text.value or b'unknown error').decode()} ({result})")

    def _get(self, kind: type, name: str, *arguments: object):
        """What a function writes to its first argument."""
        value = kind()
        self._call(name, ctypes.byref(value), *arguments)
        return value.value

    # ---- The device ----

    def describe(self) -> dict[str, str]:
        """The GPU's name and what of it decides speed, the newest CUDA that the driver runs."""
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, len(name), self._device)
        version = self._get(ctypes.c_int, "cuDriverGetVersion")
        _, total = self._memory()
        return {
            "gpu": name.value.decode(),
            "compute capability": ".".join(map(str, self.compute_capability)),
            "multiprocessors": str(self._attribute(_MULTIPROCESSORS)),
            "L2": f"{self.l2_bytes / 2**20:.0f} MiB",
            "memory": f"{total / 2**30:.0f} GiB",
            "driver's CUDA": f"{version // 1000}.{version % 1000 // 10}",
        }

    def _attribute(self, attribute: int) -> int:
        return self._get(ctypes.c_int, "cuDeviceGetAttribute", attribute, self._device)

    @property
    def compute_capability(self) -> tuple[int, int]:
        return self._attribute(_MAJOR), self._attribute(_MINOR)

    @property
    def l2_bytes(self) -> int:
        return self._attribute(_L2_BYTES)

    def _memory(self) -> tuple[int, int]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    @property
    def free_bytes(self) -> int:
        return self._memory()[0]

    # ---- Memory ----

    def allocate(self, size: int, offset: int = 0) -> "Buffer":
        """Memory for `size` bytes, `offset` bytes behind an aligned address."""
        start = self._get(ctypes.c_uint64, "cuMemAlloc_v2", max(size + offset, 1))
        return Buffer(start + offset, size, lambda: self._call("cuMemFree_v2", start))

    def upload(self, array: np.ndarray, offset: int = 0, repeat: int = 1) -> "Buffer":
        """Memory with an array's elements, `repeat` times."""
        array = np.ascontiguousarray(array)
        buffer = self.allocate(array.nbytes * repeat, offset)
        if array.nbytes > 0:
            # On the stream of the copies below: the one without a stream may still be under way when it returns.
            self._call("cuMemcpyHtoDAsync_v2", buffer.address, array.ctypes.data, array.nbytes, self.stream)
        done = array.nbytes
        while done < buffer.size:  # twice as much in every round
            size = min(done, buffer.size - done)
            self._call("cuMemcpyDtoDAsync_v2", buffer.address + done, buffer.address, size, self.stream)
            done += size
        self.synchronize()
        return buffer

    def download(self, buffer: "Buffer", shape: Sequence[int], dtype: np.dtype, first: int = 0) -> np.ndarray:
        """The elements of a buffer from number `first` on, after everything on the stream."""
        array = np.empty(shape, dtype)
        self.synchronize()
        if array.nbytes > 0:
            address = buffer.address + first * array.itemsize
            self._call("cuMemcpyDtoH_v2", array.ctypes.data, address, array.nbytes)
        return array

    def fill(self, buffer: "Buffer", byte: int) -> None:
        if buffer.size > 0:
            self._call("cuMemsetD8Async", buffer.address, byte, buffer.size, self.stream)

    def copy(self, to: "Buffer", source: "Buffer") -> None:
        self._call("cuMemcpyDtoDAsync_v2", to.address, source.address, source.size, self.stream)

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self.stream)

    # ---- Time ----

    def empty_kernel(self) -> Callable[[], None]:
        """A function that launches a kernel that does nothing."""
        module = self._get(ctypes.c_void_p, "cuModuleLoadData", _EMPTY_KERNEL)
        kernel = self._get(ctypes.c_void_p, "cuModuleGetFunction", module, b"empty")
        return lambda: self._call("cuLaunchKernel", kernel, 1, 1, 1, 32, 1, 1, 0, self.stream, None, None)

    def time_graph(self, calls: Sequence[Callable[[], None]]) -> tuple[float, float]:
        """Milliseconds of one of `calls` in a graph of all, one after the other: see `time`."""
        for call in calls:  # what a first call sets up may not be captured
            call()
        self.synchronize()
        self._call("cuStreamBeginCapture_v2", self.stream, _THREAD_LOCAL)
        try:
            for call in calls:
                call()
        finally:
            graph = self._get_graph()
        executable = self._get(ctypes.c_void_p, "cuGraphInstantiateWithFlags", graph, 0)
        try:
            return self.time(lambda: self._call("cuGraphLaunch", executable, self.stream), len(calls), self.stream)
        finally:
            self.synchronize()
            self._call("cuGraphExecDestroy", executable)
            self._call("cuGraphDestroy", graph)

    def _get_graph(self) -> int:
        graph = ctypes.c_void_p()
        self._call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        return graph.value

    def time(self, run: Callable[[], None], count: int, stream: int) -> tuple[float, float]:
        """Median milliseconds of one of the `count` calls that `run` starts, and half the distance of the quartiles."""

        def measure(repeat: int) -> float:
            elapsed = ctypes.c_float()
            self._call("cuEventRecord", self._events[0], stream)
            for _ in range(repeat):
                run()
            self._call("cuEventRecord", self._events[1], stream)
            self._call("cuEventSynchronize", self._events[1])
            self._call("cuEventElapsedTime", ctypes.byref(elapsed), *self._events)
            return elapsed.value

        run()
        repeat = max(1, round(_MIN_MS / max(measure(1), 1e-3)))
        samples = [measure(repeat) / (repeat * count) for _ in range(_MEASUREMENTS)]
        lower, middle, upper = statistics.quantiles(samples, n=4)
        return middle, (upper - lower) / 2


class Buffer:
    """Device memory, freed with the object."""

    def __init__(self, address: int, size: int, free: Callable[[], None]) -> None:
        self.address, self.size, self._free = address, size, free

    def __del__(self) -> None:
        self._free()


# ---- The launchers: cc/core/agc.h and cc/core/cuda/agc_cuda.h in ctypes ----


class Shape(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("positions", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("layout", ctypes.c_int),
    ]


_COMMON = [
    ("shape", Shape),
    ("data_type", ctypes.c_int),
    ("activation", ctypes.c_int),
    ("alpha", ctypes.c_double),
]


class ForwardArgs(ctypes.Structure):
    _fields_ = [
        *_COMMON,
        *[(name, ctypes.c_void_p) for name in ("x", "gain", "mean_scale", "y", "mean", "bias", "shortcut")],
    ]


class BackwardArgs(ctypes.Structure):
    _fields_ = [
        *_COMMON,
        *[
            (name, ctypes.c_void_p)
            for name in ("dy", "dmean", "kept", "mean", "gain", "mean_scale", "dx", "dgain", "dmean_scale")
        ],
        *[(name, ctypes.c_void_p) for name in ("bias", "shortcut", "dbias", "dshortcut")],
    ]


class Launchers:
    """What libtf_agc_cuda.so exports."""

    def __init__(self, library: pathlib.Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name, kind in (("Forward", ForwardArgs), ("Backward", BackwardArgs)):
            launch = getattr(self._library, f"TfAgcCuda{name}")
            launch.argtypes, launch.restype = [ctypes.POINTER(kind), ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int
            size = getattr(self._library, f"TfAgcCuda{name}WorkspaceBytes")
            size.argtypes, size.restype = [ctypes.POINTER(kind)], ctypes.c_int64
            describe = getattr(self._library, f"TfAgcCudaDescribe{name}")
            describe.argtypes, describe.restype = [ctypes.POINTER(kind), ctypes.c_char_p, ctypes.c_int64], None
        self._library.TfAgcCudaTry.argtypes, self._library.TfAgcCudaTry.restype = [ctypes.c_int] * 4, None
        self._library.TfAgcCudaErrorString.argtypes = [ctypes.c_int]
        self._library.TfAgcCudaErrorString.restype = ctypes.c_char_p

    def start(self, stream: int) -> None:
        """A call without work, which fails where the CUDA runtime in the library cannot use this driver.

        Raises:
            Error: in CUDA's words.
        """
        self.launch(ForwardArgs(), None, stream)

    def workspace_bytes(self, args: ForwardArgs | BackwardArgs) -> int:
        return getattr(self._library, f"TfAgcCuda{_pass_of(args)}WorkspaceBytes")(ctypes.byref(args))

    def try_plan(self, segment_bytes: int = 0, cluster: int = 0, sharing: int = 0, prefetch: int = 0) -> None:
        """What is tried from here on instead of the rule's plan; 0 is the rule's choice (cc/core/cuda/plan.h)."""
        self._library.TfAgcCudaTry(segment_bytes, cluster, sharing, prefetch)

    def describe(self, args: ForwardArgs | BackwardArgs) -> str:
        """How a call is laid out, in words."""
        text = ctypes.create_string_buffer(256)
        getattr(self._library, f"TfAgcCudaDescribe{_pass_of(args)}")(ctypes.byref(args), text, len(text))
        return text.value.decode()

    def launch(self, args: ForwardArgs | BackwardArgs, workspace: int | None, stream: int) -> None:
        error = getattr(self._library, f"TfAgcCuda{_pass_of(args)}")(ctypes.byref(args), workspace, stream)
        if error != 0:
            text = self._library.TfAgcCudaErrorString(error).decode()
            raise Error(f"TfAgcCuda{_pass_of(args)}: {text} ({error})")


def _pass_of(args: ForwardArgs | BackwardArgs) -> str:
    return "Forward" if isinstance(args, ForwardArgs) else "Backward"
