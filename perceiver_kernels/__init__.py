"""perceiver_kernels: fused kernels that make Perceiver models fast."""
