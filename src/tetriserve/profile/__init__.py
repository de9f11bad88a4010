"""Measured times of stages by shape and degree: the file (`table`) and what is read off it (`cost`)."""

from tetriserve.profile.cost import ProfileCost
from tetriserve.profile.table import Profile, Row, load_profile, save_profile

__all__ = ["Profile", "ProfileCost", "Row", "load_profile", "save_profile"]
