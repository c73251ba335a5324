"""New rows from a few seed tasks: a model writes tasks like them, then answers; what is poor or known is refused."""
