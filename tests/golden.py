"""Numbers the models must have, each with where it comes from."""

# Sadat et al. 2024 (arXiv 2405.14477), Table 2a: encoders of 1.03, 6.75, 32.75, 41.42 M and, of
# SD-VAE, 34.16 M parameters. To the last digit: those of an independent prototype of Appendix G,
# with three extractors (the printed listing passes level 2 through the first), n_z = 4.
LITEVAE_ENCODER_PARAMETERS = {
    "litevae-s": 1_035_692,
    "litevae-b": 6_750_636,
    "litevae-m": 32_750_124,
    "litevae-l": 41_422_380,
}

# The published kl-f8 (Rombach et al. 2022), without the 1×1 convolutions around its latent.
SDVAE_ENCODER_PARAMETERS = 34_163_592
SDVAE_DECODER_PARAMETERS = 49_490_179

# Table 2b names 6.75 M and no widths; base 64, multipliers (2, 3, 3, 3) come nearest.
SDVAE_SMALL_ENCODER_PARAMETERS = 6_733_640

# Multiply-accumulates for one 256×256 image, in units of 10⁹, n_z = 4: those of an independent
# prototype of the same structures.
ENCODER_GMAC_256 = {
    "litevae-s": 5.76,
    "litevae-b": 37.83,
    "litevae-m": 223.99,
    "litevae-l": 232.86,
    "sdvae": 136.36,
}
DECODER_GMAC_256 = 311.09
