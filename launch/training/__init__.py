"""Training machinery of both stages: engine, trainer, checkpoints, faults, ranks."""
