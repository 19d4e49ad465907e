"""Studies of the CVR head: which of its parts put a user's events in a better order."""
