"""Linear layers with blocks of weights, on CUDA: kernels that compute with the active blocks alone."""
