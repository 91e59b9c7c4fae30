"""Adapters and models on the Hugging Face hub."""
