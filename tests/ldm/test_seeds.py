import numpy as np
import torch

from ldm.seeds import generator, normal, torch_seed


def test_a_row_depends_on_its_own_number_alone():
    together = normal(3, "noise", [5, 6, 7], (4, 8, 8))
    apart = torch.cat([normal(3, "noise", [k], (4, 8, 8)) for k in (5, 6, 7)])
    assert torch.equal(together, apart)
    assert together.dtype == torch.float32 and together.shape == (3, 4, 8, 8)


def test_seed_purpose_and_number_each_make_another_stream():
    base = normal(0, "noise", [0], (1000,))
    for other in (normal(1, "noise", [0], (1000,)), normal(0, "sigma", [0], (1000,)),
                  normal(0, "noise", [1], (1000,))):  # fmt: skip
        correlation = torch.corrcoef(torch.cat([base, other]))[0, 1]
        assert abs(correlation) < 0.15


def test_draws_are_standard_normal():
    from scipy.stats import kstest

    draws = normal(0, "noise", range(64), (16, 16)).flatten().numpy()
    assert kstest(draws, "norm").pvalue > 0.01
    scalars = normal(0, "sigma", range(4000), ()).numpy()
    assert scalars.shape == (4000,) and kstest(scalars, "norm").pvalue > 0.01


def test_the_stream_is_philox_and_stays_the_same():
    """A run that is resumed years later must see the same images."""
    values = generator(0, "crop", 7).integers(0, 1000, 4)
    assert np.array_equal(values, generator(0, "crop", 7).integers(0, 1000, 4))
    assert 0 <= torch_seed(0, "dropout", 1) < 2**63
    assert torch_seed(0, "dropout", 1) != torch_seed(0, "dropout", 2)
