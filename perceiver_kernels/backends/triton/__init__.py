"""Kernels for GPUs in Triton, a file per stem; imported at the first call that they run, never before."""
