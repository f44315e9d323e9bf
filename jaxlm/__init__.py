"""jaxlm: train language models in JAX on any mesh that a config names."""

__version__ = "0.1.0"
