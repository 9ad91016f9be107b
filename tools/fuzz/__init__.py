"""Looking for what breaks: generated calls and graphs, libFuzzer on the arithmetic, long and large runs.

Nothing is timed. What is expected of the op, and how far it may be off, is agc_testing.py's, beside this folder.
"""
