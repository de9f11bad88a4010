"""Qwen-Image-Edit, of one picture, and Qwen-Image-Edit-Plus, of up to three."""
