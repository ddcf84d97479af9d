"""Weak, strong and contrastive views: batched, random for each image by counters, equal to PIL's."""

from ccssl_hf.transforms.settings import CONTRASTIVE, STRONG, WEAK, Column, View, ViewSettings
from ccssl_hf.transforms.views import crop_boxes, make_view, normalize

__all__ = ["CONTRASTIVE", "STRONG", "WEAK", "Column", "View", "ViewSettings", "crop_boxes", "make_view", "normalize"]
