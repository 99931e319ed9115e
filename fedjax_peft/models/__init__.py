"""Language models as pure Flax linen, and readers of their published weights."""
