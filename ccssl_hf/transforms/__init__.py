"""Weak, strong and contrastive views: batched, random for each image by counters, equal to PIL's."""

from .settings import MAX_SIDE_HELD, MAX_SIDE_UNCROPPED, Column, View, ViewSettings
from .views import crop_boxes, make_view, normalize

__all__ = [
    "MAX_SIDE_HELD",
    "MAX_SIDE_UNCROPPED",
    "Column",
    "View",
    "ViewSettings",
    "crop_boxes",
    "make_view",
    "normalize",
]
