"""Training-free methods between encoder and decoder."""
