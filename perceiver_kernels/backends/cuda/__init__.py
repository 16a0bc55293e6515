"""Kernels in CUDA C++, one file per stem: launchers that hand tensors to perceiver_kernels._cuda."""
