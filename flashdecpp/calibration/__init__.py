"""Measures a model's softmax inputs and chooses phi."""
