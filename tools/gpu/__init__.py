"""What a GPU machine runs: the kernels without TensorFlow, and the op in it; only gpu_tensorflow.py imports that."""
