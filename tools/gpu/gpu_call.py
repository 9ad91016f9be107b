"""One case of gpu_numerics.py in a GPU's memory: inputs, results and workspaces, and the launches of both passes."""

import math

import numpy as np

from agc_numerics import ACTIVATIONS, DATA_FORMATS, DTYPES, Case, parameter_dtype
from gpu import gpu_driver
from gpu import gpu_numerics as numerics


class Call:
    """A case in device memory.

    Args:
        driver: of gpu_driver.
        launchers: of gpu_driver.
        case: what is computed.
        layout: of the maps in memory, "channels_last" or "channels_first".
        misaligned: whether maps start one element behind an aligned address.
        repeat: how many times the case's samples follow each other in the batch.
        like: a call of the same case and layout, whose maps are copied: that is quicker than to encode them again.
    """

    def __init__(
        self,
        driver: gpu_driver.Driver,
        launchers: gpu_driver.Launchers,
        case: Case,
        layout: str,
        misaligned: bool = False,
        repeat: int = 1,
        like: "Call | None" = None,
    ) -> None:
        self._driver, self._launchers, self._case, self._layout = driver, launchers, case, layout
        self._results = numerics.result_kinds(case)
        samples, positions, channels = case.x.shape
        u, t = np.dtype(parameter_dtype(case.dtype)), numerics.storage(case.dtype)
        batch = samples * repeat
        maps = (batch, *self._in_memory(case.x).shape[1:]), t
        kinds = {"maps": maps, "map": ((batch, channels), u), "channel": ((channels,), u)}
        self._kinds = {name: kinds[of] for name, of in self._results.items()}

        offset = t.itemsize if misaligned else 0
        self._buffers = {}
        for name in ("x", "dy", "shortcut"):
            if getattr(case, name) is None:
                continue
            if like is not None:
                self._buffers[name] = driver.allocate(like._buffers[name].size, offset)
                driver.copy(self._buffers[name], like._buffers[name])
            else:
                encoded = numerics.encode(self._in_memory(getattr(case, name)), case.dtype)
                self._buffers[name] = driver.upload(encoded, offset, repeat)
        self._buffers["dmean"] = driver.upload(case.dmean.astype(u), repeat=repeat)
        for name in ("gain", "mean_scale", "bias"):
            if getattr(case, name) is not None:
                self._buffers[name] = driver.upload(getattr(case, name).astype(u))
        for name, (shape, kind) in self._kinds.items():
            size = math.prod(shape) * kind.itemsize
            self._buffers[name] = driver.allocate(size, offset if self._results[name] == "maps" else 0)

        shape = gpu_driver.Shape(batch, positions, channels, DATA_FORMATS.index(layout))
        self._passes = {}
        for name, kind in (("forward", gpu_driver.ForwardArgs), ("backward", gpu_driver.BackwardArgs)):
            args = self._arguments(kind, shape)
            size = launchers.workspace_bytes(args)
            self._passes[name] = args, driver.allocate(max(0, size))  # -1: the launch says why

    def _in_memory(self, maps: np.ndarray) -> np.ndarray:
        """[N, P, C] as it lies in memory, and back."""
        return maps if self._layout == "channels_last" else np.moveaxis(maps, 2, 1)

    def _arguments(self, kind, shape):
        args = kind(
            shape,
            DTYPES.index(self._case.dtype),
            ACTIVATIONS.index(self._case.activation),
            self._case.alpha,
        )
        buffers = dict(self._buffers)
        buffers["kept"] = buffers["x" if self._case.activation == "linear" else "y"]
        if kind is gpu_driver.BackwardArgs and not numerics.has_dshortcut(self._case):
            buffers.pop("shortcut", None)
        for name, _ in kind._fields_[4:]:
            if name in buffers:  # what is absent stays null
                setattr(args, name, buffers[name].address)
        return args

    def forward(self) -> None:
        self._launch("forward")

    def backward(self) -> None:
        self._launch("backward")

    def both(self) -> None:
        self.forward()
        self.backward()

    def _launch(self, name: str) -> None:
        args, workspace = self._passes[name]
        self._launchers.launch(args, workspace.address, self._driver.stream)

    def plan(self, name: str) -> str:
        """How "forward" or "backward" is laid out, in words."""
        return self._launchers.describe(self._passes[name][0])

    def copy_maps(self) -> None:
        """A copy of one map tensor to another: the traffic that a pass forward has at least."""
        self._driver.copy(self._buffers["y"], self._buffers["x"])

    def run(self) -> None:
        """Both passes, over results and workspaces that are full of NaN."""
        for buffer in [self._buffers[name] for name in self._kinds] + [space for _, space in self._passes.values()]:
            self._driver.fill(buffer, 0xFF)
        self.both()

    def results(self) -> dict[str, np.ndarray]:
        """What was stored, as it lies in memory."""
        return {name: self._driver.download(self._buffers[name], *kind) for name, kind in self._kinds.items()}

    def sample(self, name: str, index: int) -> np.ndarray:
        """One sample of what has samples, as it lies in memory."""
        shape, kind = self._kinds[name]
        return self._driver.download(self._buffers[name], (1, *shape[1:]), kind, index * math.prod(shape[1:]))

    def errors(self, stored: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
        """The largest error of each result as a multiple of what is allowed; `want` is what numerics expects."""
        got = {}
        for name, values in stored.items():
            if self._results[name] == "maps":
                got[name] = numerics.decode(self._in_memory(values), self._case.dtype)
            else:
                got[name] = values.astype(np.float64)
        return numerics.errors(self._case, want, got)
