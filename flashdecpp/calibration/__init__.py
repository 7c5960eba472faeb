"""Chooses phi from measurements of a model's softmax inputs."""
