"""A LoRA in memory and on disk, with numpy alone."""
