"""What becomes of a trained adapter: merged into its base."""
