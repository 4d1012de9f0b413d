"""Pairs are looked at, fetched, filtered, and rid of near-duplicates."""
