"""Finding the feed-forward networks of a model by what its modules compute."""

from torch_prunepath.discover.find import Discovery, Refusal, discover, find_ffns, summary

__all__ = ["Discovery", "Refusal", "discover", "find_ffns", "summary"]
