"""Data: read (files, hub) -> detect (format) -> encode (template, mask, truncate) -> batch."""

from trivet.data.dataset import Dataset, load_dataset
from trivet.data.detect import Example

__all__ = ["Dataset", "Example", "load_dataset"]
