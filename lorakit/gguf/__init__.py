"""Adapters and models as GGUF, the files of llama.cpp."""
