"""From trained models to what a server loads: bundles, catalogues embedded offline, checks of a live server."""
