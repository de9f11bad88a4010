"""Wan 2.1 and 2.2: videos from texts, and from a picture that is their first frame."""
