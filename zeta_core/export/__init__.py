"""Exporting a checkpoint to other formats, and proving that the export answers like the checkpoint."""
