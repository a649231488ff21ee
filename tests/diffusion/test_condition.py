import pytest
import torch

from diffusion import EDM2Config, EDM2UNet, UNet, UNetConfig
from ldm.errors import LdmError

SIZES = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "head_width": 16}


@pytest.mark.parametrize("build", [lambda **s: UNet(UNetConfig(**SIZES, **s)),
                                   lambda **s: EDM2UNet(EDM2Config(**SIZES, **s))])  # fmt: skip
@pytest.mark.parametrize(
    ("knows", "labels", "augment", "message"),
    [
        ({"classes": 3}, [0, 3], None, "^label 3 is none of this network's: they are 0 to 2, and"),
        ({"classes": 3}, [-2, 0], None, "^label -2 is none"),
        ({}, [-1, 0], None, "^label 0 was given to a network without classes: leave labels out"),
        ({"augment_parameters": 9}, None, 8, "^augmentation parameters .2, 8. .* network of 9"),
        ({}, None, 9, "^augmentation parameters .2, 9. .* network of 0 for 2 image"),
        ({"classes": 3}, 1, None, "^labels are torch.int64 .*: they must be int64 .2,.$"),
        ({"classes": 3}, [1], None, "^labels are torch.int64 .1,."),
        ({"classes": 3}, [0.5, 1.0], None, "^labels are torch.float32"),
    ],
)
def test_both_networks_refuse_what_they_do_not_know(build, knows, labels, augment, message):
    labels = None if labels is None else torch.tensor(labels)
    augment = None if augment is None else torch.zeros(2, augment)
    with pytest.raises(LdmError, match=message):
        build(**knows)(torch.zeros(2, 4, 8, 8), torch.zeros(2), labels, augment)
