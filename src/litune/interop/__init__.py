"""Models of other systems, in and out: each export is loaded with the target's own library before it counts."""
