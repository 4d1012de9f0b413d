"""Evaluation: pure functions of features and scores."""
