"""Token-efficient vision-language models in JAX: every technique a config line, every claim measured."""

__version__ = "0.1.0"
