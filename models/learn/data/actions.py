"""What users can do with items."""

from __future__ import annotations

# In the order of the enum Action of the wire contract.
ACTIONS = ("view", "click", "like", "dislike", "share", "cart", "purchase", "skip")
# The name of an action that is not known.
UNSPECIFIED = "unspecified"
# Actions that say that a user likes an item.
LIKED = ("like", "share", "cart", "purchase")
