"""Text from a base with or without its adapter."""
