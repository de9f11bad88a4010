"""Trains the bundled model: `python -m training --help`.

Pictures are drawn, never downloaded, so that training needs nothing but this repository: `vae` learns to compress
drawings, `latents` compresses many of them once, `dit` learns to denoise those from their captions, `export` writes
the `FluxPipeline` directory that is shipped, and `accuracy` measures it on scenes that were never trained on.

    pictures   scenes and drawings by number          model      transformer and text encoders
    vae        the autoencoder                        tokenizers one vocabulary for both
    latents    shards of compressed pictures          dit        flow matching
    learner    the loop, schedule and checkpoints     export     the pipeline directory
    muon       the optimizer of all matrices          accuracy   unseen prompts, checker, contact sheet
"""
