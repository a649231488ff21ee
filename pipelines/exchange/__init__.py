"""Models in and out: those of diffusers and CompVis as a `ckpt.pt` of ours, and ours as theirs."""
