"""The models that are trained: the towers (PCH), the CVR head, and the interface of all retrieval models."""
