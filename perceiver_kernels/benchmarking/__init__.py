"""This library measured against its peers: cases, providers, clocks and bars, which the command line shows."""
