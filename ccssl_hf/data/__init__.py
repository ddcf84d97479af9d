"""From files to batches: sources, images, labels, and what the splits hold.

A split passes `sources` (`files` finds the images of a folder), `splits` and `labels` (checks), and `survey` (what it
holds, with `copies`). Then `batches` reads the images of each step through `pixels` and `images`.
"""

from .batches import EvaluationDataset, PairedDataset, default_workers
from .labels import OUT_OF_DISTRIBUTION, read_class_names, read_labels, split_validation
from .sources import load_split, skipped
from .splits import FINGERPRINTED_IMAGES, check_images, content_key, drop_unreadable, fingerprint, name_of

__all__ = [
    "FINGERPRINTED_IMAGES",
    "OUT_OF_DISTRIBUTION",
    "EvaluationDataset",
    "PairedDataset",
    "check_images",
    "content_key",
    "default_workers",
    "drop_unreadable",
    "fingerprint",
    "load_split",
    "name_of",
    "read_class_names",
    "read_labels",
    "skipped",
    "split_validation",
]
