"""A model as a folder of the Hugging Face Hub's conventions, for any autoencoder of ours.

config.json         whose it is, the version, and the `AutoencoderConfig`
model.safetensors   the weights, by our names
README.md           the model card
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from autoencoders.autoencoder import Autoencoder
from ldm.checkpoint import Damaged, write_atomically, write_json
from ldm.config import to_tree
from ldm.errors import LdmError

LIBRARY, MODEL_TYPE, FORMAT = "ldm", "autoencoder", 1
WEIGHTS_FILE = "model.safetensors"

CARD = """---
library_name: {library}
tags: [autoencoder, latent-diffusion, {encoder}]
---

# An image autoencoder ({encoder})

Images (3, H, W) in [−1, 1] ↔ latents ({n_z}, H/{f}, W/{f}); {parameters:,} parameters.

```python
from autoencoders import Autoencoder

ae = Autoencoder.from_pretrained("this repository")
latents = ae.encode(images).mode()
recon = ae.decode(latents)
```
"""


def save_pretrained(ae: Autoencoder, folder: str | Path) -> list[Path]:
    """Write config.json, model.safetensors and a README.md; what was written.

    Raises:
        LdmError: the folder cannot be written.
    """
    from safetensors.torch import save

    folder = Path(folder)
    described = {
        "library_name": LIBRARY,
        "model_type": MODEL_TYPE,
        "format": FORMAT,
        "version": _version(),
        "config": to_tree(ae.config),
    }
    weights = {name: tensor.contiguous().cpu() for name, tensor in ae.state_dict().items()}
    payload = save(weights, metadata={"format": "pt"})
    card = CARD.format(
        library=LIBRARY, encoder=ae.config.encoder.type, n_z=ae.config.latent_channels,
        f=ae.downsampling, parameters=sum(p.numel() for p in ae.parameters()),
    )  # fmt: skip
    paths = [folder / name for name in ("config.json", WEIGHTS_FILE, "README.md")]
    write_atomically(paths[1], lambda file: file.write(payload))
    write_atomically(paths[2], lambda file: file.write(card.encode()))
    write_json(paths[0], described)  # the last: what it describes is there
    return paths


def is_ours(described: Any) -> bool:
    """Whether a config.json is one that `save_pretrained` wrote."""
    return isinstance(described, dict) and described.get("library_name") == LIBRARY


def read_pretrained(
    folder: Path, described: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save_pretrained` wrote: (tree of an `AutoencoderConfig`, weights).

    Args:
        described: the folder's config.json.

    Raises:
        LdmError: another kind of model, a newer format, no weights, or damaged ones.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    kind, form, tree = (described.get(key) for key in ("model_type", "format", "config"))
    if kind != MODEL_TYPE or not isinstance(tree, dict):
        raise LdmError(f"{folder}/config.json describes no autoencoder, but a model_type {kind!r}")
    if not isinstance(form, int) or form > FORMAT:
        raise LdmError(
            f"{folder} has format {form}, this version reads up to {FORMAT}: upgrade ldm"
        )
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise LdmError(f"{folder} holds no {WEIGHTS_FILE}: copy or fetch it again")
    try:
        return tree, load_file(path)
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path} is truncated or damaged: copy or write it again") from error


def _version() -> str:
    try:
        return version(LIBRARY)
    except PackageNotFoundError:  # the source tree, not installed
        return "unknown"
