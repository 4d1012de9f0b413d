"""Runs out to other libraries: each export is loaded with the target's own library and compared before it counts."""
