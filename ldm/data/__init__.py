"""Loading of images: sources, order, crops and worker processes.

A source holds whole images (`photos`, a folder, a zip, shards); `batches` turns one into the stream
of a training run, `evaluation_batches` into one pass, `sheet_images` into a picture.
`ldm.data.prepare` writes shards.
"""

from ldm.data.dataset import DataConfig, check_data, holds_out, open_source
from ldm.data.loader import Batch, batches, evaluation_batches, sheet_images
from ldm.data.sources import Source

__all__ = [
    "Batch",
    "DataConfig",
    "Source",
    "batches",
    "check_data",
    "evaluation_batches",
    "holds_out",
    "open_source",
    "sheet_images",
]
