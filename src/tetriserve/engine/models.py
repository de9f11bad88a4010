"""The models that an engine serves, each with the rules of its admission."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tetriserve.core.errors import UnknownModel
from tetriserve.core.models import of_model
from tetriserve.core.request import Request
from tetriserve.engine.intake import Intake

ANY = (None, "default")
"""Names by which clients leave the choice of a model to the server."""


@dataclass(frozen=True)
class ServedModels:
    """`intakes` have cards with a key each; the first model of a kind is that of requests that name none."""

    intakes: tuple[Intake, ...]

    def __post_init__(self) -> None:
        keys = [intake.card.key for intake in self.intakes]
        assert keys and len(set(keys)) == len(keys), keys

    @property
    def first(self) -> Intake:
        return self.intakes[0]

    def of(self, request: Request) -> Intake:
        """That of the model that the request is for."""
        return of_model({intake.card.key: intake for intake in self.intakes}, request.model)

    def called(self, name: str | None, *, makes_videos: bool = False) -> Intake:
        """The model that clients call `name`, which makes what is asked for; None: the first that does.

        Raises:
            UnknownModel: no model has that name, or it makes something else; the message lists those that can be named.
        """
        able = [intake for intake in self.intakes if intake.card.makes_videos == makes_videos]
        if name in ANY and able:
            return able[0]
        if name is not None and (found := next((each for each in able if each.card.is_called(name)), None)):
            return found
        what = "videos" if makes_videos else "images"
        served = ", ".join(map(repr, names_of(able))) or f"none that makes {what}"
        if name is None:
            raise UnknownModel(f"no model that makes {what} is served", "model")
        if any(intake.card.is_called(name) for intake in self.intakes):
            raise UnknownModel(f"model {name[:200]!r} does not make {what}; served: {served}", "model")
        raise UnknownModel(f"model {name[:200]!r} is not served; served: {served}", "model")


def names_of(intakes: Sequence[Intake]) -> list[str]:
    """The first names of models, and of their adapters."""
    cards = [intake.card for intake in intakes]
    return [name for card in cards for name in (card.name, *(lora.name for lora in card.loras))]
