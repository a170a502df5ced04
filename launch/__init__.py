"""Scripts around the commands, and training machinery."""
