"""Benchmarks of networks, training and data loading: one module per subcommand of `python -m tools.benchmark`."""
