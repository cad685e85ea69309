"""The token-budget benchmark as a TFDS dataset (ArrayRecord, no TensorFlow).

`store.py` finds, builds and verifies it; `token_bench.py` is the TFDS builder.
"""
