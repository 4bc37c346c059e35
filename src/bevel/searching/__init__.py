"""Many recipes tried: a search with Optuna, and a comparison over a grid with the same seeds."""

from bevel.searching.grid import compare
from bevel.searching.records import Comparison, SearchRecord
from bevel.searching.study import search

__all__ = ["Comparison", "SearchRecord", "compare", "search"]
