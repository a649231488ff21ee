"""The paper's analyses of autoencoders: one module per figure or table of `ldm analyze`."""
