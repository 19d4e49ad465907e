"""From text to content embeddings: the frozen language model, and how a catalogue is encoded and kept on disk."""
