"""Stage 1, sources: locating and opening the sources of a spec (files, folders, datasets on the Hub)."""

from zeta_core.data.sources.locations import SourceLocations
from zeta_core.data.sources.opening import open_sources
from zeta_core.data.sources.source import Source

__all__ = ["Source", "SourceLocations", "open_sources"]
