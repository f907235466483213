"""What a device can hold and run, and what it will do with a file: predictions, never measurements."""

from efficli.target.predict import Memory, Prediction, predict
from efficli.target.profile import Figure, Range, Target, load_target, target_names
from efficli.target.work import Active, Share, Work, active_bytes

__all__ = [
    "Active", "Figure", "Memory", "Prediction", "Range", "Share", "Target", "Work", "active_bytes", "load_target",
    "predict", "target_names",
]  # fmt: skip
