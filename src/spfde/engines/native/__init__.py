"""The native engine: training kernels that compute with the active weights alone, on CPUs."""
