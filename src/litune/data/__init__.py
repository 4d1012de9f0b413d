"""Pairs out of files, images into arrays, captions into tokens."""
