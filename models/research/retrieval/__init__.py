"""Studies of retrieval: several models and seeds under one protocol, and estimates from their results."""
