"""How fast rounds are, and what clients with large states cost."""
