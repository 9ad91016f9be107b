"""What stands beside every committed measurement: machine, versions, commit. Nothing is measured here."""

import datetime
import filecmp
import os
import pathlib
import platform
import subprocess

import keras
import tensorflow as tf

import tf_agc
from tf_agc import native

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def describe() -> dict[str, str]:
    """Returns one line of text for everything that a result depends on."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "caches": _caches(),
        "instruction set": native.instruction_set() if native.STATUS.available else "reference only",
        "tf_agc": tf_agc.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
    }


def differing(described: dict[str, str], earlier: dict[str, str]) -> list[str]:
    """What of it was different in an earlier measurement, which new results may then not be mixed with."""
    return [key for key, value in described.items() if key != "date" and earlier.get(key) != value]


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False).stdout

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "cc", "tf_agc", "tools/*.py")
    commit = (git("rev-parse", "--short=12", "HEAD").strip() or "unknown") + (" with changes" if changed else "")
    return commit if _imports_the_checkout() else f"{commit}, with another tf_agc installed"


def _imports_the_checkout() -> bool:
    """Whether the tf_agc that runs has the checkout's files, and the libraries that tools/build.sh last put there."""
    checkout, imported = CHECKOUT / "tf_agc", pathlib.Path(tf_agc.__file__).parent
    files = [file.relative_to(checkout) for file in checkout.rglob("*") if file.suffix in (".py", ".so")]
    return all((imported / file).is_file() and filecmp.cmp(checkout / file, imported / file, False) for file in files)


def _caches() -> str:
    caches = []
    for index in sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text(encoding="utf-8").strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            caches.append(f"L{level} {size}")
    return ", ".join(caches) or "unknown"
