"""Turns trained models into what a server loads: bundles and precomputed catalogues; also checks a live server."""
