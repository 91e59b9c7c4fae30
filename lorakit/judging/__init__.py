"""Language models, and people, as judges."""
