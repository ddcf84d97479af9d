"""Weak, strong and contrastive views, made in batches, with counter-based random numbers and the results of PIL."""

from .views import MAX_SIDE_HELD, MAX_SIDE_UNCROPPED, View, ViewSettings, crop_boxes, make_view, normalize

__all__ = ["MAX_SIDE_HELD", "MAX_SIDE_UNCROPPED", "View", "ViewSettings", "crop_boxes", "make_view", "normalize"]
