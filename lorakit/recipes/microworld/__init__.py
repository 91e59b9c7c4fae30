"""A generated world, and tasks about it."""
