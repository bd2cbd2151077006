"""Where the feed-forward networks of a model are, found by what modules compute."""

from torch_prunepath.discover.find import Discovery, Refusal, discover, find_ffns, summary

__all__ = ["Discovery", "Refusal", "discover", "find_ffns", "summary"]
