"""What is wrong with data: detectors over rows, and over all rows together."""
