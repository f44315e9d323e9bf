"""Plan a run for hardware that is not here: what it takes, how fast it is, which mesh is best."""
