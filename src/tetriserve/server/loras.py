"""Which adapter a body asks for: by the field `lora`, or by the name of a model."""

from __future__ import annotations

from tetriserve.core.errors import InvalidRequest
from tetriserve.core.request import Lora
from tetriserve.models.card import ModelCard
from tetriserve.server.schemas import LoraChoice


def lora_of(model: str | None, choice: LoraChoice | str | None, card: ModelCard) -> Lora | None:
    """None: the model as it is. Whether the field's name is served is for `engine.intake` to say.

    Raises:
        InvalidRequest: `model` is one adapter's name and `choice` another's.
    """
    named = None if model is None else card.find_lora(model)
    if choice is None:
        return None if named is None else Lora(named.name)
    lora = Lora(choice) if isinstance(choice, str) else Lora(choice.name, choice.scale)
    if named is not None and named.name != lora.name:
        raise InvalidRequest(f"lora is {lora.name[:200]!r}, but model is {named.name!r}; leave one out", "lora")
    return lora
