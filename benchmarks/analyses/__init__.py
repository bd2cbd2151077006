"""Analyses of routed experts, each with tables, a plot and results as JSON, on the harness's store and methods."""
