"""Scenes of flat shapes: their captions, their exact drawings, and a checker that reads them back from pixels."""
