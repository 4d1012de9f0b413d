"""What is done with several runs or before any: compare, probe, inspect, the quickstart."""
