"""The decoder: what a model is made of, and how it runs on the ops."""
