"""The training loop and what it is handed: batches, optimizer, guards, checkpoints, proofs."""
