"""Where a batch's tokens lie (layouts), and the operations that depend on it."""
