"""What the paper says of autoencoders beyond their scores: `ldm analyze`, a module a figure."""
