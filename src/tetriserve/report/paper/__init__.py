"""The evaluation of the TetriServe paper (R. Lu et al., ASPLOS 2026, arXiv 2510.01565, section 6), drawn anew.

An exhibit is a function of an `Experiment`; `EXHIBITS` is the list of them, in the order of the page.
"""
