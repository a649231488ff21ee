"""What sampling is made of: the model that makes one batch, its options, and where images go."""
