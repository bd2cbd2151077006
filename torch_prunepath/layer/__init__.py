"""What a sparse layer is: a feed-forward network seen as experts, its router, and how one takes a dense one's place."""

from torch_prunepath.layer.sparse import ExpertsSpec, RoutedExperts, Routing, SparseFFN, _blank, is_sparse

# _blank: pickled models name it as the function that rebuilds their layers.
__all__ = ["ExpertsSpec", "RoutedExperts", "Routing", "SparseFFN", "_blank", "is_sparse"]
