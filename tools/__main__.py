"""Runs a module of the folders beside this file: `.venv/bin/python tools benchmarks.bench cpu`.

Every folder is a package, and they import each other by name (`from benchmarks import machine`). That works because
Python, given a directory, puts it on the path. It puts nothing else there, so what is demonstrated and measured is the
installed tf_agc. `python -m tools.benchmarks.bench` would put the checkout there, and with it tf_agc's sources, before
the installed wheel; and without the checkout in front, `tools` is a package that tf2onnx installs under that name.
"""

import runpy
import sys

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python tools FOLDER.MODULE [OPTION ...], for example: python tools demo.demo --help")
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
