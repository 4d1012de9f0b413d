"""Search: the images of a feature store that are nearest to a query."""
