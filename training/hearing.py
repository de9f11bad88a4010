"""Makes one attention head of the denoiser hear the marks that noise holds (see `layouts`).

A mark is a faint average over all tokens, which gradient descent does not find soon: `dit` prints what tokens miss of
the marks. Set by hand, the head is a start like any other, and is trained further with all else.

Suffixes of tensor names: B batch, S image tokens, C latent channels, D width, M marks.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from torch import nn

from tetriserve.evaluation.captions import write_caption
from training.dit import dit_learner, noise_levels
from training.latents import LatentBank
from training.layouts import NUM_MARKS, marks_in
from training.model import Denoiser, Reader
from training.pictures import scene_of

_NUM_PICTURES = 256
_LOUDNESS = {"image": 4.0, "text": 10.0}
"""How long a mark's vector in a token is; what tokens hold is some 15 and 70 long."""
_NUM_UNROTATED = 8
"""Of a head's dimensions: those that rotary positions turn by the first axis, on which all tokens are at 0."""


def let_hear(path: Path, latents: Path) -> int:
    """Give the denoiser of checkpoint `path` its head for marks; which it is."""
    if not path.exists():
        raise FileNotFoundError(f"no {path}; `python -m training dit` or `restore` makes it")
    model = Denoiser(Reader())
    learner = dit_learner(path, model)
    bank = LatentBank(latents, 256, 256)
    if not len(bank):
        raise FileNotFoundError(f"no latents of 256x256 in {latents}; `python -m training latents` makes them")
    random = Random(0)
    torch.manual_seed(0)
    seeds, latents_BSC = bank.draw(random, _NUM_PICTURES)
    head = give_head_for_marks(
        model, latents_BSC, [write_caption(scene_of(seed), random) for seed in seeds], bank.width
    )
    learner.average.load_state_dict(model.state_dict())
    learner.save({})
    return head


@torch.no_grad()
def give_head_for_marks(model: Denoiser, latents_BSC: torch.Tensor, captions: list[str], width: int) -> int:
    """Of the first block's heads that which does least becomes the one; its number.

    Its queries and keys are the same everywhere, so that every token, of image or text, has the mean over the image of
    the head's values. These are, by least squares, what each token's noise has of the marks. They are written where
    the block's gates are open; a denoiser that was never trained has none, which is an error.
    """
    noise_BSC = torch.randn_like(latents_BSC)
    sigma_B = noise_levels(len(latents_BSC), latents_BSC.shape[1], latents_BSC.device)
    noisy_BSC = torch.lerp(latents_BSC, noise_BSC, sigma_B[:, None, None])
    tokens = model.reader.tokenize(captions, latents_BSC.device)
    block = model.transformer.transformer_blocks[0]
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        block.norm1.register_forward_hook(
            lambda layer, inputs, outputs: seen.update(normed=outputs[0], gate=outputs[1])
        ),
        block.norm1_context.register_forward_hook(lambda layer, inputs, outputs: seen.update(text_gate=outputs[1])),
    ]
    velocity_BSC = model(noisy_BSC, sigma_B, *tokens, width).velocity
    for hook in hooks:
        hook.remove()
    if not seen["gate"].any():
        raise ValueError("the denoiser lets nothing through its first block yet: run `python -m training dit` before")

    attention = block.attn
    size = attention.to_out[0].in_features // attention.heads

    def change_without(head: int) -> float:
        outputs = (attention.to_out[0], attention.to_add_out)
        kept = [output.weight.clone() for output in outputs]
        for output in outputs:
            output.weight[:, head * size : (head + 1) * size] = 0.0
        change = (model(noisy_BSC, sigma_B, *tokens, width).velocity - velocity_BSC).square().mean().item()
        for output, weight in zip(outputs, kept, strict=True):
            output.weight.copy_(weight)
        return change

    head = min(range(attention.heads), key=change_without)
    rows = slice(head * size, (head + 1) * size)
    same = torch.zeros(size)
    same[:_NUM_UNROTATED] = 1.0
    attends = {"to_q": same, "to_k": same, "add_q_proj": same, "add_k_proj": -same, "to_v": 0.0, "add_v_proj": 0.0}
    for name, bias in attends.items():
        layer = getattr(attention, name)
        layer.weight[rows] = 0.0
        layer.bias[rows] = bias
    inputs = torch.nn.functional.pad(seen["normed"].flatten(0, 1), (0, 1), value=1.0)
    own_M = marks_in(noise_BSC).flatten(0, 1)
    weights_DM = torch.linalg.lstsq(inputs, own_M).solution * latents_BSC.shape[1] ** 0.5
    values = slice(rows.start, rows.start + NUM_MARKS)
    attention.to_v.weight[values], attention.to_v.bias[values] = weights_DM[:-1].T, weights_DM[-1]
    _write(attention.to_out[0], rows, seen["gate"].mean(0), _LOUDNESS["image"])
    _write(attention.to_add_out, rows, seen["text_gate"].mean(0), _LOUDNESS["text"])
    return head


def _write(output: nn.Linear, columns: slice, gate_D: torch.Tensor, loudness: float) -> None:
    """What the head's first values add to a token: orthogonal vectors, in the dimensions that are let through most."""
    is_open_D = gate_D.abs() >= gate_D.abs().median()
    vectors_DM = torch.linalg.qr(torch.randn(len(gate_D), NUM_MARKS) * is_open_D[:, None]).Q
    output.weight[:, columns] = 0.0
    output.weight[is_open_D, columns.start : columns.start + NUM_MARKS] = (
        loudness * vectors_DM[is_open_D] / gate_D[is_open_D, None]
    )
