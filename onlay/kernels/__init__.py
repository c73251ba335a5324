"""Ops that this project exists for: each a file with its equations, an eager reference, a fast version, and its limits."""
