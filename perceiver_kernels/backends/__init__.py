"""What runs the ops: the pure-PyTorch reference and the compiled kernels. A backend never imports ops."""
