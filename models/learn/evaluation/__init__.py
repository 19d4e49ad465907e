"""Full ranking of held-out events, and the metrics of its ranks."""
