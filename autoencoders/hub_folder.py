"""A model as a folder of the Hugging Face Hub's conventions, for any autoencoder of ours.

config.json         whose it is, the version, the `AutoencoderConfig`, and what it came with
model.safetensors   the weights, by our names
README.md           the model card
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from autoencoders.autoencoder import Autoencoder
from autoencoders.sdvae.formats import pick_said
from ldm.checkpoint import Damaged, shown
from ldm.config import to_tree
from ldm.errors import LdmError
from ldm.files import to_json, write_together
from ldm.run_folder import installed_version

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


def save_pretrained(
    ae: Autoencoder, folder: str | Path, imported: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write config.json, model.safetensors and, where there is none, a README.md; what was written.

    Args:
        imported: what the model came with from another toolkit: how to use it is written down too.

    Raises:
        LdmError: the folder cannot be written.
    """
    from safetensors.torch import save

    folder = Path(folder)
    described = {
        "library_name": LIBRARY,
        "model_type": MODEL_TYPE,
        "format": FORMAT,
        "version": installed_version(LIBRARY),
        "config": to_tree(ae.config),
    }
    if said := pick_said(imported):
        described["imported"] = said
    weights = {name: tensor.contiguous().cpu() for name, tensor in ae.state_dict().items()}
    payload = save(weights, metadata={"format": "pt"})
    card = CARD.format(
        library=LIBRARY, encoder=ae.config.encoder.type, n_z=ae.config.latent_channels,
        f=ae.downsampling, parameters=sum(p.numel() for p in ae.parameters()),
    )  # fmt: skip
    contents = {
        "README.md": card.encode(),
        WEIGHTS_FILE: payload,
        "config.json": to_json(described),
    }
    if (folder / "README.md").exists():  # somebody's own words
        del contents["README.md"]
    write_together(
        {
            folder / name: lambda file, content=content: file.write(content)
            for name, content in contents.items()
        }
    )
    return [folder / name for name in reversed(contents)]


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
            f"{folder} has format {shown(form)}, this version reads up to {FORMAT}: upgrade ldm"
        )
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise LdmError(f"{folder} holds no {WEIGHTS_FILE}: copy or fetch it again")
    try:
        return tree, load_file(path)
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path} is truncated or damaged: copy or write it again") from error
