"""What the benchmarks that train have in common: the store of runs, settings on the command line, reports."""
