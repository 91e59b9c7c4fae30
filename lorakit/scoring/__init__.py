"""Texts to numbers: metrics, significance, tables."""
