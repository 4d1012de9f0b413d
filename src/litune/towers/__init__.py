"""Towers: encoders of images and of texts, and the heads on top of them."""
