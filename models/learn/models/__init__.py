"""What is trained: the towers (PCH), the CVR head, and what every retrieval model looks like from outside."""
