"""The page at `/`: the pool as a board of falling blocks, drawn by the browser from a stream of events."""

from tetriserve.server.board.pages import OPEN_PATHS
from tetriserve.server.board.router import board_router

__all__ = ["OPEN_PATHS", "board_router"]
