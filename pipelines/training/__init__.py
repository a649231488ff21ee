"""What the two training loops are made of: their recipes, their steps, what they learn from."""
