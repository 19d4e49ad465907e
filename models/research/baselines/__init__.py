"""The models that LEARN is compared with."""
