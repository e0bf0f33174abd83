"""Images in, batches out: image sets, splits and sample order."""

from smalti.data.batch import ImageBatch, load_batch, to_uint8, to_unit_range
from smalti.data.image_set import ArrayImages, ImageSet
from smalti.data.order import Order, SampleOrder, Split, split, training_order
from smalti.data.sets import load_image_set
from smalti.data.sources import ImageSource, open_images

__all__ = [
    "ArrayImages",
    "ImageBatch",
    "ImageSet",
    "ImageSource",
    "Order",
    "SampleOrder",
    "Split",
    "load_batch",
    "load_image_set",
    "open_images",
    "split",
    "to_uint8",
    "to_unit_range",
    "training_order",
]
