"""What a user types: one function a file, a config in, a result out."""
