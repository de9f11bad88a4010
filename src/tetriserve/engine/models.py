"""The models that an engine serves, each with the rules of its admission."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

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

    @property
    def are_several(self) -> bool:
        return len(self.intakes) > 1

    @property
    def title(self) -> str:
        """The names of all."""
        return ", ".join(intake.card.name for intake in self.intakes)

    def of(self, request: Request) -> Intake:
        """That of the model that the request is for."""
        return of_model(self._by_key, request.model)

    def called(self, name: str | None, *, makes_videos: bool = False, num_images: int = 0) -> Intake:
        """The model that clients call `name`, which makes what is asked for; None: the first that does.

        num_images: pictures that come along. Where no model is named, those that take as many go before others.

        Raises:
            UnknownModel: no model has that name, or it makes something else; the message lists those that can be named.
        """
        able = [intake for intake in self.intakes if intake.card.makes_videos == makes_videos]
        if name in ANY and able:
            return next((intake for intake in able if intake.pictures.takes(num_images)), able[0])
        if name is not None and (found := next((each for each in able if each.card.is_called(name)), None)):
            return found
        what = "videos" if makes_videos else "images"
        served = ", ".join(map(repr, names_of(able))) or f"none that makes {what}"
        if name is None:
            raise UnknownModel(f"no model that makes {what} is served", "model")
        if any(intake.card.is_called(name) for intake in self.intakes):
            raise UnknownModel(f"model {name[:200]!r} does not make {what}; served: {served}", "model")
        raise UnknownModel(f"model {name[:200]!r} is not served; served: {served}", "model")

    def chosen(self, name: str | None, *, makes_videos: bool = False, num_images: int = 0) -> tuple[Intake, str | None]:
        """As `called`, and `Generation.model` for it: None where that is the model without a name, too, so that work is
        the same whether or not its client named it.
        """
        intake = self.called(name, makes_videos=makes_videos, num_images=num_images)
        is_default = intake is self.called(None, makes_videos=makes_videos, num_images=num_images)
        return intake, None if is_default else intake.card.name

    def named(self, name: str) -> Intake:
        """The model that clients call `name`, whatever it makes.

        Raises:
            UnknownModel: no model has that name; the message lists those that can be named.
        """
        found = next((intake for intake in self.intakes if intake.card.is_called(name)), None)
        if found is None:
            served = ", ".join(map(repr, names_of(self.intakes)))
            raise UnknownModel(f"model {name[:200]!r} is not served; served: {served}", "model")
        return found

    @cached_property
    def _by_key(self) -> Mapping[str, Intake]:
        return {intake.card.key: intake for intake in self.intakes}


def names_of(intakes: Sequence[Intake]) -> list[str]:
    """The first names of models, and of their adapters."""
    cards = [intake.card for intake in intakes]
    return [name for card in cards for name in (card.name, *(lora.name for lora in card.loras))]
