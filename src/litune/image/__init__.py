"""Image towers, the pictures that they read, and what runs them."""
