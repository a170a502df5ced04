"""Dense and sparse layouts of tokens, and the operations that depend on the layout."""
