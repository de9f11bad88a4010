"""FLUX.2 dev and klein."""
