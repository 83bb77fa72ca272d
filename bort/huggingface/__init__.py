"""Conversion of models and tokenizers from and to Hugging Face folders."""
