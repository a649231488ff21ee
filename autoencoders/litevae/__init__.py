"""LiteVAE (Sadat et al., NeurIPS 2024, arXiv 2405.14477)."""
