"""Artifacts: directories that can be shipped, written whole or not at all, and read with their hashes checked."""

from __future__ import annotations

from efficli.artifact.atomic import Draft, draft
from efficli.artifact.checks import check_output
from efficli.artifact.manifest import Artifact, FileRecord, read_artifact
from efficli.ops.storage import writing

__all__ = ["Artifact", "Draft", "FileRecord", "check_output", "draft", "read_artifact", "writing"]
