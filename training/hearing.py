"""Makes one attention head of the denoiser hear the marks that noise holds (see `layouts`).

A mark is a faint average over all tokens, which gradient descent does not find soon: `dit` prints what tokens miss of
the marks. Set by hand, the head's values are a start like any other, and are trained further with all else. Whom it
attends to stays as it is, and is set anew by the next `hear`, for what tokens are by then.

Suffixes of tensor names: B batch, S image tokens, C latent channels, D width, M marks.
"""

from __future__ import annotations

from math import log
from pathlib import Path
from random import Random

import torch
from torch import nn

from tetriserve.evaluation.captions import write_caption
from training.dit import dit_learner, noise_levels
from training.latents import LatentBank
from training.layouts import NUM_MARKS, marks_in
from training.model import NUM_UNROTATED, Denoiser, Reader
from training.pictures import scene_of
from training.tokenizers import NUM_TEXT_TOKENS

_NUM_PICTURES = 256
_LOUDNESS = {"image": 4.0, "text": 10.0}
"""How long a mark's vector in a token is; what tokens hold is some 15 and 70 long."""
_REST = 256
"""Image tokens that the text counts as much as. The mean of S tokens' noise is 1/sqrt(S) of a mark, and what the head
says sqrt(S) / (S + _REST): within a quarter the same of 64 to 1024 tokens, so that it need not be learnt of each."""


def let_hear(path: Path, latents: Path) -> int:
    """Give the denoiser of checkpoint `path` its head for marks, or tune the one that it has; its number."""
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
    """Of the first block's heads that which does least becomes the one; its number. If one is already, it attends anew.

    Every token, of image or text, has from it the mean over the image of the head's values. These are, by least
    squares, what each token's noise has of the marks. They are written where the block's gates are open; a denoiser
    that was never trained has none, which is an error.
    """
    noise_BSC = torch.randn_like(latents_BSC)
    sigma_B = noise_levels(len(latents_BSC), latents_BSC.shape[1], latents_BSC.device)
    noisy_BSC = torch.lerp(latents_BSC, noise_BSC, sigma_B[:, None, None])
    tokens = model.reader.tokenize(captions, latents_BSC.device)
    block = model.transformer.transformer_blocks[0]
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        block.norm1.register_forward_hook(
            lambda layer, inputs, outputs: seen.update(embedded=inputs[0], normed=outputs[0], gate=outputs[1])
        ),
        block.norm1_context.register_forward_hook(lambda layer, inputs, outputs: seen.update(text_gate=outputs[1])),
    ]
    velocity_BSC = model(noisy_BSC, sigma_B, *tokens, width).velocity
    for hook in hooks:
        hook.remove()
    if not seen["gate"].any():
        raise ValueError("the denoiser lets nothing through its first block yet: run `python -m training dit` before")
    normed_BSD = seen["normed"]
    lengths_BS = (seen["embedded"] - seen["embedded"].mean(-1, keepdim=True)).norm(dim=-1)

    attention = block.attn
    size = attention.to_out[0].in_features // attention.heads
    heads = [slice(head * size, (head + 1) * size) for head in range(attention.heads)]
    for head, rows in enumerate(heads):
        if not attention.to_q.weight[rows].any():
            _attend_by_length(attention, rows, normed_BSD, lengths_BS)
            return head

    def change_without(head: int) -> float:
        outputs = (attention.to_out[0], attention.to_add_out)
        kept = [output.weight.clone() for output in outputs]
        for output in outputs:
            output.weight[:, heads[head]] = 0.0
        change = (model(noisy_BSC, sigma_B, *tokens, width).velocity - velocity_BSC).square().mean().item()
        for output, weight in zip(outputs, kept, strict=True):
            output.weight.copy_(weight)
        return change

    head = min(range(attention.heads), key=change_without)
    rows = heads[head]
    _attend_by_length(attention, rows, normed_BSD, lengths_BS)
    for layer in (attention.to_v, attention.add_v_proj):
        layer.weight[rows] = layer.bias[rows] = 0.0
    values = slice(rows.start, rows.start + NUM_MARKS)
    as_long_BSD = normed_BSD * (lengths_BS / lengths_BS.mean(1, keepdim=True))[..., None]
    weights_DM, bias_M = _fitted(as_long_BSD.flatten(0, 1), marks_in(noise_BSC).flatten(0, 1))
    num_tokens = latents_BSC.shape[1]
    scale = (num_tokens + _REST) / num_tokens**0.5
    attention.to_v.weight[values], attention.to_v.bias[values] = scale * weights_DM.T, scale * bias_M
    _write(attention.to_out[0], rows, seen["gate"].mean(0), _LOUDNESS["image"])
    _write(attention.to_add_out, rows, seen["text_gate"].mean(0), _LOUDNESS["text"])
    return head


def _attend_by_length(attention: nn.Module, rows: slice, normed_BSD: torch.Tensor, lengths_BS: torch.Tensor) -> None:
    """Queries that are the same everywhere, keys by which an image token counts as much as it was long: the layer norm
    has made all as long, and so the noise in some fainter. Text tokens, which say nothing here, count _REST.

    normed_BSD: image tokens as keys are made of them; their lengths_BS are those before the norm.
    """
    queries = {attention.to_q: attention.norm_q.weight, attention.add_q_proj: attention.norm_added_q.weight}
    keys = {attention.to_k: attention.norm_k.weight, attention.add_k_proj: attention.norm_added_k.weight}
    # Scores are made in the one dimension that the norms' learnt weights leave most of. Two others fill vectors up, one
    # queries, one keys, to lengths at which what the norms make of them is what is meant.
    least_Q, least_K = (
        torch.stack([w[:NUM_UNROTATED].abs() for w in side.values()]).amin(0) for side in (queries, keys)
    )
    dimension = int((least_Q * least_K).argmax())
    at, filling_queries, filling_keys = (rows.start + (dimension + step) % NUM_UNROTATED for step in range(3))
    for layer in (*queries, *keys):
        layer.weight[rows] = layer.bias[rows] = 0.0
    length = 1 / least_Q[dimension]
    for layer, weight_Q in queries.items():
        layer.bias[at] = 1 / weight_Q[dimension]
        layer.bias[filling_queries] = (length**2 - layer.bias[at] ** 2).clamp(min=0.0).sqrt()
    image, text = ((rows.stop - rows.start) ** 0.5 / length * weight_K[dimension] for weight_K in keys.values())
    weights_D1, bias_1 = _fitted(normed_BSD.flatten(0, 1), lengths_BS.log().flatten()[:, None])
    attention.to_k.weight[at] = weights_D1[:, 0] / image
    attention.to_k.bias[at] = (bias_1[0] - lengths_BS.log().mean()) / image
    attention.to_k.bias[filling_keys] = 1.0
    sine = (log(_REST / NUM_TEXT_TOKENS) / text).clamp(-1.0, 1.0)
    attention.add_k_proj.bias[at], attention.add_k_proj.bias[filling_keys] = sine, (1 - sine**2).sqrt()


def _fitted(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and bias of the affine map that is closest by least squares.

    By SVD: the default driver can be far off where inputs lie in few dimensions, as those of a fresh denoiser do.
    """
    solution = torch.linalg.lstsq(torch.nn.functional.pad(inputs, (0, 1), value=1.0), targets, driver="gelsd").solution
    return solution[:-1], solution[-1]


def _write(output: nn.Linear, columns: slice, gate_D: torch.Tensor, loudness: float) -> None:
    """What the head's first values add to a token: orthogonal vectors, in the dimensions that are let through most."""
    is_open_D = gate_D.abs() >= gate_D.abs().median()
    vectors_DM = torch.linalg.qr(torch.randn(len(gate_D), NUM_MARKS) * is_open_D[:, None]).Q
    output.weight[:, columns] = 0.0
    output.weight[is_open_D, columns.start : columns.start + NUM_MARKS] = (
        loudness * vectors_DM[is_open_D] / gate_D[is_open_D, None]
    )
