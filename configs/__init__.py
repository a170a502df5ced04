"""What a run is: the typed schema, the recipes, and the command line made of them."""
