"""The training study, and the recipe and the data that the demo shares with it; results/ has the files.

Nothing is timed here.
"""
