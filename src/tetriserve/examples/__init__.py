"""What helps to try TetriServe without a checkpoint: `python -m tetriserve.examples.NAME`."""
