"""A plan for a collection: what its images are, the recipe that suits them and this machine, what it costs here."""
