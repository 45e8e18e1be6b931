"""Writing new tokens into a packed segment, in place."""
