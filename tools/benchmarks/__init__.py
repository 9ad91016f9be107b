"""What the op, whole networks and GainMonitor cost, and how that is measured and written down; results/ has the files.

No training that is compared, no correctness.
"""
