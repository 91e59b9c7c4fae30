"""Composable commands that merge, prune and trim LoRA adapters for low-resource adaptation."""
