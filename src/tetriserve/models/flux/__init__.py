"""FLUX: `facts` without torch, `adapter` with diffusers' own parts."""
