"""Weights and tokenizers from files."""
