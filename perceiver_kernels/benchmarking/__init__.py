"""Measuring this library against its peers: cases, providers, clocks and bars, used by the command line and by benchmarks/run.py."""
