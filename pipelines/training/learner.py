"""What of a diffusion model changes in training: the network, its averages, and its optimiser."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion.build import build_denoiser, build_network
from diffusion.edm import EDMLoss
from diffusion.uncertainty import Uncertainty
from ldm.ema import Ema, PowerEma
from ldm.posthoc_ema import save_snapshot
from ldm.run import Run
from ldm.saved_state import restore
from ldm.schedule import learning_rate, set_learning_rate
from pipelines.training.diffusion_recipe import DiffusionRecipe


class Learner:
    """All that has state, built from a recipe and placed where a run trains.

    Attributes:
        network: what denoises, F.
        objective: what is trained, an `EDMLoss`: the denoiser and, if asked for, its uncertainty.
        ema: the averaged denoiser, which ckpt.pt is made of.
        powers: averages of other widths, by their relative standard deviation.
        optimizer: Adam over the objective's parameters.
    """

    def __init__(self, recipe: DiffusionRecipe, run: Run) -> None:
        self.recipe = recipe
        self.network = run.place(build_network(recipe.network))
        denoiser = build_denoiser(self.network, recipe.denoiser)
        uncertainty = Uncertainty().to(run.device) if recipe.denoiser.uncertainty else None
        self.objective = EDMLoss(denoiser, uncertainty)
        self.ema = Ema(denoiser, recipe.ema_half_life_images)
        self.powers = {std: PowerEma(self.network, std) for std in recipe.ema_stds}
        parameters = self.objective.parameters()
        self.optimizer = torch.optim.Adam(parameters, recipe.lr, recipe.betas, fused=True)
        for module in (self.network, uncertainty):
            if hasattr(module, "normalize_weights"):  # of a magnitude-preserving network
                self.optimizer.register_step_post_hook(lambda *_, m=module: m.normalize_weights())

    def set_rate(self, images_seen: int) -> float:
        """The learning rate of the step that ends at `images_seen`, set and answered."""
        recipe = self.recipe
        rate = learning_rate(
            recipe.lr, images_seen, recipe.warmup_images,
            recipe.lr_schedule, recipe.steps * recipe.batch_size, recipe.lr_decay_images,
        )  # fmt: skip
        set_learning_rate(self.optimizer, rate)
        return rate

    def average(self, images_seen: int) -> None:
        """Let all averages follow, after a step."""
        for average in (self.ema, *self.powers.values()):
            average.update(images_seen, self.recipe.batch_size)

    def save_snapshots(self, folder: Path, images_seen: int) -> None:
        """Keep what the averages of other widths are now, for `ldm ema`."""
        for std, power in self.powers.items():
            save_snapshot(folder, images_seen, std, power.model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        restore(self._parts(), state)

    def _parts(self) -> dict[str, Any]:
        powers = {f"power_ema_{std}": power for std, power in self.powers.items()}
        return {
            "objective": self.objective, "ema": self.ema, "optimizer": self.optimizer, **powers
        }  # fmt: skip
