"""Trains the bundled model: `python -m training --help`.

Pictures are drawn, never downloaded, so that training needs nothing but this repository: `vae` learns to compress
drawings, `latents` compresses many of them once, `text` learns to read captions, `dit` learns to denoise the latents
from what is read, and `export` writes the `FluxPipeline` directory that is shipped. `tetriserve evaluate --model` then
measures it on scenes that were never trained on.

    pictures   scenes and drawings by number          model      transformer and text encoders
    vae        the autoencoder                        tokenizers one vocabulary for both
    latents    shards of compressed pictures          text       the text encoders
    learner    the loop, schedule and checkpoints     dit        flow matching
    muon       the optimizer of all matrices          export     the pipeline directory
    layouts    where objects lie, told by the noise   hearing    the head that hears it
"""
