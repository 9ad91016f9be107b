"""Writes the API reference, HTML made from the docstrings of the installed tf_agc. What it says, the docstrings say."""

import argparse
import pathlib
import warnings

import pdoc

import tf_agc

CHECKOUT = pathlib.Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=pathlib.Path, default=CHECKOUT / "build" / "api", help="%(default)s")
    output_dir = parser.parse_args(arguments).output_dir

    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pdoc warns of what it leaves out,
        warnings.filterwarnings("ignore", "'tf_agc' may refer to either")  # and of the sources in the current directory
        # The function tf_agc.implementation has the name of its module, which pdoc would give a page of its own.
        pdoc.pdoc(tf_agc.__name__, "!tf_agc.implementation", output_directory=output_dir)
    print(f"wrote {output_dir / 'tf_agc.html'}")


if __name__ == "__main__":
    main()
