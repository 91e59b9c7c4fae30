"""A run beside other runs: one writer an output, stopping cleanly, and going on after a stop."""
