"""Feature stores: every image encoded once; and some of their rows with some of their captions."""
