"""TensorFlow Serving with the op: the overlay of its sources, images, configuration, an example client.

Each program here runs alone, by its path, and imports no other.
"""
