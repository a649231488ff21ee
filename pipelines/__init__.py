"""Floor 2: the jobs. They build models, move data through them, and write what comes out.

A module here is a job, and so is a package with one of its own name or a command's (`doctor`,
`report`, `reproduce`, `analysis`, `exchange`); `training`, `sampling` and `measuring` are what jobs
are made of.
"""

from typing import Any

__all__ = ["Codec", "LatentDiffusionPipeline"]


def __getattr__(name: str) -> Any:
    """Import the public classes when they are asked for: a command needs only its own job."""
    if name == "LatentDiffusionPipeline":
        from pipelines.latent_diffusion import LatentDiffusionPipeline

        return LatentDiffusionPipeline
    if name == "Codec":
        from pipelines.codec import Codec

        return Codec
    raise AttributeError(f"module 'pipelines' has no attribute '{name}'")
