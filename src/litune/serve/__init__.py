"""A run as a JSON API over HTTP: what `litune serve` starts."""
