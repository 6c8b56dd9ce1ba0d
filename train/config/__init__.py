"""What a run is told: the schema of recipes, methods and tasks; imports `melora_jax` alone."""
