"""Between a shell command and a running, restartable engine: DeepSpeed, checkpoints, the run's log."""
