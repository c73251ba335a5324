"""From a data file to token sequences: read, template, build, pack."""
