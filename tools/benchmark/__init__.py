"""What networks and training cost in time: a module per subcommand of `python -m tools.benchmark`."""
