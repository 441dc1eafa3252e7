"""Measures of embeddings [N, D], as pure functions: for training, which watches them, and for evaluation."""
