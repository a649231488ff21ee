"""Floor 2: the jobs. They build models, move data through them, and write what comes out.

The jobs are the modules here and the packages `analysis`, `doctor`, `report` and `reproduce`.
`sampling` and `measuring` hold what several jobs share. `latent_diffusion`, and the codec in
`latents`, are for Python users, too.
"""

from typing import Any

__all__ = ["Codec", "LatentDiffusionPipeline"]


def __getattr__(name: str) -> Any:
    """Import the public classes when they are asked for: a command needs only its own job."""
    if name == "LatentDiffusionPipeline":
        from pipelines.latent_diffusion import LatentDiffusionPipeline

        return LatentDiffusionPipeline
    if name == "Codec":
        from pipelines.latents import Codec

        return Codec
    raise AttributeError(f"module 'pipelines' has no attribute '{name}'")
