"""Adaptive LoRA merge with pruning, and merges without data."""
