"""Data structures that table drafters share: rank trees, suffix automata, tri-grams, datastores."""
