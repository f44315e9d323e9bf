"""Weights of other libraries: Hugging Face directories in and out, safetensors only."""
