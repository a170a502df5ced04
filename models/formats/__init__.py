"""Other projects' weight files."""
