"""Finding the feed-forward networks of a model by what their modules compute, and choosing among them."""

from torch_prunepath.discover.choose import Which
from torch_prunepath.discover.find import Discovery, discover, find_ffns
from torch_prunepath.discover.refusal import Refusal, in_one_line, summary

__all__ = ["Discovery", "Refusal", "Which", "discover", "find_ffns", "in_one_line", "summary"]
