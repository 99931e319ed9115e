"""What a round would need on hardware that need not exist."""
