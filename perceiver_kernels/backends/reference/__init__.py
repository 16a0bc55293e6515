"""Pure PyTorch, one file per op: the executable specification. Runs everything everywhere, memory permitting."""
