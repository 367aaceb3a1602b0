"""Smaller networks out of larger ones, through the width table of search_spaces."""

from pruning.slicing import slice_weights

__all__ = ["slice_weights"]
