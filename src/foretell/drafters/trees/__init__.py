"""Token trees: one API for every drafter that has a distribution of its own (`shape.TreeShape`)."""
