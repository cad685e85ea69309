"""Trained projectors: convolutions, learned queries and perceptrons that give fewer tokens."""
