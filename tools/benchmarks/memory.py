"""Resident memory of this process and its peak, as Linux counts them."""

import ctypes
import pathlib

_PROCESS = pathlib.Path("/proc/self")


def peak_mib() -> float:
    """The largest resident memory so far, or since `forget_peak`, in MiB."""
    # Not getrusage, whose maximum a process inherits from the one that started it.
    return _status_mib("VmHWM")


def resident_mib() -> float:
    """The resident memory now, in MiB."""
    return _status_mib("VmRSS")


def _status_mib(name: str) -> float:
    status = dict(line.split(":", 1) for line in (_PROCESS / "status").read_text(encoding="utf-8").splitlines())
    return int(status[name].split()[0]) / 1024


def forget_peak() -> None:
    """Counts anew, from what is in use now."""
    # The C library keeps freed memory for later: it would stay resident, and count.
    ctypes.CDLL(None).malloc_trim(0)
    (_PROCESS / "clear_refs").write_text("5", encoding="utf-8")
