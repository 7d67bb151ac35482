"""The kernels of the Triton backend; :mod:`subzero_kernels.backends.triton` launches them."""

try:
    import triton  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "Triton is not installed; PyTorch for NVIDIA GPUs on Linux brings it, or `pip install "
        "triton` does"
    ) from error
