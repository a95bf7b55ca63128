"""Detections: the result of a detector for one image, its masks, drawing and other forms."""

from vitadapter_zoo.detections.detections import Detections
from vitadapter_zoo.detections.instances import Instances

__all__ = ["Detections", "Instances"]
