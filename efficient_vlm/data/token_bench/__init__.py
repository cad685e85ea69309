"""The token-budget benchmark as a TFDS dataset (ArrayRecord, no TensorFlow).

`store.py` builds and verifies it on the disk; `token_bench.py` is the TFDS builder.
"""
