"""Give a small model a large one's cost and the same output."""
