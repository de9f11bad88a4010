"""Random LoRAs, saved as peft and diffusers save trained ones.

As a program: `python -m tests.families.loras CHECKPOINT FILE SEED` writes one for a checkpoint's transformer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def write_lora(
    path: Path, pipeline: Any, targets: Mapping[str, Sequence[str]], *, seed: int, rank: int = 4, alpha: int = 8
) -> Path:
    """Write an adapter of a bare pipeline, which keeps it, for the layers whose names end so, by component.

    Returns: the file, in the folder `path`.
    """
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    options: dict[str, Any] = {}
    for component, layers in targets.items():
        model = getattr(pipeline, component)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers), init_lora_weights=False))
        options[f"{component}_lora_layers"] = get_peft_model_state_dict(model)
        options[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    type(pipeline).save_lora_weights(path, **options)
    [file] = path.glob("*.safetensors")
    return file


def main(checkpoint: str, file: str, seed: str) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(checkpoint)
    made = write_lora(Path(f"{file}.d"), pipeline, {"transformer": ATTENTION}, seed=int(seed))
    made.rename(file)
    made.parent.rmdir()


if __name__ == "__main__":
    main(*sys.argv[1:])
