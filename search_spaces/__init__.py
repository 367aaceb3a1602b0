"""What can be built: Arch documents, five families of vision transformers, and their search axes.

from search_spaces import Arch, create_model, get_arch, list_models
model = create_model("levit_128s")
"""

from search_spaces.api import count, create_model, get_arch, list_models, stage_counts, table
from search_spaces.arch import Arch, ArchError
from search_spaces.network import fold

__all__ = ["Arch", "ArchError", "count", "create_model", "fold", "get_arch", "list_models", "stage_counts", "table"]
