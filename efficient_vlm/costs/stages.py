"""The stages that FLOPs are counted by; apart, so that who reads results needs no JAX."""

STAGES = ("encoder", "compressor", "decoder", "head")  # In the order they run.
