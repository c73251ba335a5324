"""Personal data and secrets in text: found by pattern, checksum and context, and replaced."""
