"""The ops' public functions, one file per op: documentation, validation, autograd rule and registration."""
