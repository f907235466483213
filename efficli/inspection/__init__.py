"""What a checkpoint, a GGUF or an ONNX file is, and what is wrong with it: read by our own bounded readers."""

from __future__ import annotations

from efficli.inspection.report import Check, Difference, Finding, Group, Inspection, ModelReport

__all__ = ["Check", "Difference", "Finding", "Group", "Inspection", "ModelReport"]
