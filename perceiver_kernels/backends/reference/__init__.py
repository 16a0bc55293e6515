"""Pure PyTorch, one file per op: the executable specification. Runs everything, everywhere, without regard to memory."""
