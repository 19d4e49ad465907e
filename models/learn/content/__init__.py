"""Text -> content embeddings: loading a frozen language model, encoding a catalogue, and storing the vectors."""
