"""Prints the table of docs/dependencies.md: every package of a lock, its versions and its licence, from its metadata.

Packages of the lock for other Pythons or systems are not installed; what is known of them stands here.
"""

import argparse
import importlib.metadata
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Not in the metadata, or not installed on the newest Python: read in the packages' sources.
KNOWN = {
    "colorama": "BSD-3-Clause",
    "coloredlogs": "MIT",
    "exceptiongroup": "MIT",
    "googleapis-common-protos": "Apache-2.0",
    "humanfriendly": "MIT",
    "mpmath": "BSD-3-Clause",
    "namex": "Apache-2.0",
    "narwhals": "MIT",
    "pyreadline3": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "tomli": "MIT",
}


def packages(lock: pathlib.Path) -> dict[str, list[str]]:
    """The versions of each package; a lock has several where Pythons or systems differ."""
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([a-z0-9][a-z0-9_.-]*)==([^ ;\\]+)", lock.read_text(encoding="utf-8"), re.M):
        if version not in found.setdefault(name, []):
            found[name].append(version)
    return found


def licence(name: str) -> str:
    """As the package's metadata names it; "unknown" where neither it nor KNOWN does."""
    try:
        fields = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return KNOWN.get(name, "unknown")
    classifiers = [text for text in fields.get_all("Classifier") or [] if text.startswith("License ::")]
    names = [text.split(" :: ")[-1] for text in classifiers if text != "License :: OSI Approved"]
    # "License" may hold the whole text of one.
    text = (fields.get_all("License") or [""])[0].strip().split("\n")[0]
    expression = (fields.get_all("License-Expression") or [""])[0]
    return expression or ", ".join(names) or text or KNOWN.get(name, "unknown")


def table(lock: pathlib.Path) -> str:
    rows = [f"| {name} | {', '.join(versions)} | {licence(name)} |" for name, versions in packages(lock).items()]
    return "\n".join(["| package | version | licence |", "|---|---|---|", *rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    newest = sorted((ROOT / "requirements").glob("tensorflow-*.lock"))[-1]
    parser.add_argument("--lock", type=pathlib.Path, default=newest, help=f"(default: {newest.relative_to(ROOT)})")
    print(table(parser.parse_args().lock))
