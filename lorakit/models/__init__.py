"""Base models: the only room that knows transformers and peft."""
