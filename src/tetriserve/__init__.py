"""TetriServe: deadline-aware serving for diffusion transformers."""
