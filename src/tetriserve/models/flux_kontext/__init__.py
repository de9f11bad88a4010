"""FLUX.1 Kontext: FLUX.1 whose steps see a picture beside the latents."""
