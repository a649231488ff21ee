"""How large a loss is to be expected at a noise level, learned: Karras et al. 2024 (EDM2).

Noise levels are tasks of one multi-task problem, weighted as by Kendall et al. 2018 (arXiv
1705.07115), made continuous in Appendix B.2 of arXiv 2312.02696. Dividing by the loss that is to
be expected lets every noise level pull alike at the network, throughout training.
"""

from torch import Tensor, nn

from diffusion.magnitude import MPFourier, MPLinear, normalize_weights


class Uncertainty(nn.Module):
    """u(σ), the logarithm of the loss to be expected at σ; needed in training only.

    One fully-connected layer on Fourier features, trained beside the network by the loss that it
    weighs (`weigh`).
    """

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        self.fourier = MPFourier(features)
        self.linear = MPLinear(features, 1)

    def forward(self, c_noise: Tensor) -> Tensor:
        """Scaled noise levels c_noise = ln(σ)/4 (B,) → u (B,)."""
        return self.linear(self.fourier(c_noise)).squeeze(1)

    def normalize_weights(self) -> None:
        """Forced weight normalisation, in place; call it after every step of the optimiser."""
        normalize_weights(self)


def weigh(loss: Tensor, u: Tensor) -> Tensor:
    """A loss weighted by its uncertainty u, elementwise; least where e^u is the mean loss."""
    # Eq. 21: λ L / e^u + u, where λ L is the loss; by Eq. 25, e^u = λ L at the minimum
    return loss / u.exp() + u
