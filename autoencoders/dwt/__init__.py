"""The non-learned encoder: a wavelet transform, and nothing else (Sadat et al. 2024, App. B)."""
