"""Makes one attention head of the denoiser hear the marks that noise holds (see `layouts`).

A mark is a faint average over all tokens, which gradient descent does not find soon: `dit` prints what tokens miss of
the marks. What the head says of them is a start like any other, and is trained further with all else. What it
hears by stays as it is (`what_hears`).

Suffixes of tensor names: B batch, S image tokens, C latent channels, D width, M marks.
"""

from __future__ import annotations

from math import log

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn

from training.layouts import NUM_MARKS, marked
from training.model import NUM_UNROTATED, Denoiser
from training.tokenizers import NUM_TEXT_TOKENS

_NUM_SEEN, _NUM_DRAWS = 64, 4
"""Pictures on which it is tried what heads do, and noises for each picture that is to be heard."""
_LOUDNESS = {"image": 4.0, "text": 10.0}
"""How long a mark's vector in a token is; what tokens hold is some 15 and 70 long."""
_REST = 256
"""Image tokens that the text counts as much as. The mean of S tokens' noise is 1/sqrt(S) of a mark, and what the head
says sqrt(S) / (S + _REST): within a quarter the same of 64 to 1024 tokens, so that it need not be learnt of each."""
_BALLAST = 3.0
"""In each of two dimensions, over the length of an image token; those of mere noise differ by a tenth."""


@torch.no_grad()
def give_head_for_marks(model: Denoiser, latents_BSC: torch.Tensor, captions: list[str], width: int) -> int:
    """Of the first block's heads that which does least becomes the one; its number. If one is already, it is an error.

    Every token, of image or text, has from it the mean over the image of the head's values. These are, by least
    squares, those of which the mean says most of the marks, and one more says how many image tokens there are. They
    are written where the block's gates are open; a denoiser that was never trained has none, which is an error.
    """
    block = model.transformer.transformer_blocks[0]
    attention = block.attn
    size = attention.to_out[0].in_features // attention.heads
    heads = [slice(head * size, (head + 1) * size) for head in range(attention.heads)]
    if not all(attention.to_q.weight[rows].any() for rows in heads):
        raise ValueError("the denoiser has its head for marks already, which `dit` trains on")
    noisy_BSC, sigma_B, _ = _noisy(latents_BSC[:_NUM_SEEN])
    tokens = model.reader.tokenize(captions[:_NUM_SEEN], latents_BSC.device)
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        block.norm1.register_forward_hook(
            lambda layer, inputs, outputs: seen.update(inputs=inputs[0], gate=outputs[1])
        ),
        block.norm1_context.register_forward_hook(lambda layer, inputs, outputs: seen.update(text_gate=outputs[1])),
    ]

    def velocity() -> torch.Tensor:
        return model(noisy_BSC, sigma_B, *tokens, width).velocity  # type: ignore[no-any-return]

    velocity_BSC = velocity()
    for hook in hooks:
        hook.remove()
    if not seen["gate"].any():
        raise ValueError("the denoiser lets nothing through its first block yet: run `python -m training dit` before")

    def change_without(head: int) -> float:
        outputs = (attention.to_out[0], attention.to_add_out)
        kept = [output.weight.clone() for output in outputs]
        for output in outputs:
            output.weight[:, heads[head]] = 0.0
        change = (velocity() - velocity_BSC).square().mean().item()
        for output, weight in zip(outputs, kept, strict=True):
            output.weight.copy_(weight)
        return change

    head = min(range(attention.heads), key=change_without)
    rows = heads[head]
    lengths_BS = (seen["inputs"] - seen["inputs"].mean(-1, keepdim=True)).norm(dim=-1)
    _take_ballast(model.transformer, lengths_BS.mean().item())
    _attend_evenly(attention, rows)
    for layer in (attention.to_v, attention.add_v_proj):
        layer.weight[rows] = layer.bias[rows] = 0.0
    values = slice(rows.start, rows.start + NUM_MARKS)
    weights_DM, bias_M = _telling_values(model, latents_BSC, captions)
    num_tokens = latents_BSC.shape[1]
    scale = (num_tokens + _REST) / num_tokens**0.5
    attention.to_v.weight[values], attention.to_v.bias[values] = scale * weights_DM.T, scale * bias_M
    # From 64 to 1024 image tokens their mean goes from -1 to 1.
    attention.to_v.bias[values.stop], attention.add_v_proj.bias[values.stop] = 1 / 0.6, -1 / 0.6
    _write(attention.to_out[0], rows, seen["gate"].mean(0), _LOUDNESS["image"])
    _write(attention.to_add_out, rows, seen["text_gate"].mean(0), _LOUDNESS["text"])
    return head


def _noisy(latents_BSC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The latents at noise levels that decide layouts; the levels (B,), and the marks (B, M) of the noise."""
    marks_BM = torch.randn(len(latents_BSC), NUM_MARKS)
    sigma_B = 1.0 - 0.35 * torch.rand(len(latents_BSC))
    noise_BSC = marked(torch.randn_like(latents_BSC), marks_BM)
    return torch.lerp(latents_BSC, noise_BSC, sigma_B[:, None, None]), sigma_B, marks_BM


def _telling_values(
    model: Denoiser, latents_BSC: torch.Tensor, captions: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (D, M) and bias (M,), on image tokens as the first block's attention sees them, of which the sum over a
    picture is nearest to the marks times noise level and root of the number of tokens.

    Of single tokens one must not ask it: what little pictures hold of the pattern is in many tokens the same.
    """
    transformer = model.transformer
    pooled_BD, _ = model.reader(*model.reader.tokenize(captions, latents_BSC.device))
    means: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    for _ in range(_NUM_DRAWS):
        noisy_BSC, sigma_B, marks_BM = _noisy(latents_BSC)
        conditioning_BD = transformer.time_text_embed(1000 * sigma_B, pooled_BD)
        normed_BSD = transformer.transformer_blocks[0].norm1(transformer.x_embedder(noisy_BSC), emb=conditioning_BD)[0]
        means.append(torch.nn.functional.pad(normed_BSD.mean(1), (0, 1), value=1.0))
        targets.append(marks_BM * sigma_B[:, None])
    # By SVD: the default driver can be far off where inputs lie in few dimensions, as those of a fresh denoiser do.
    sums = torch.cat(means) * latents_BSC.shape[1] ** 0.5
    solution = torch.linalg.lstsq(sums, torch.cat(targets), driver="gelsd").solution
    return solution[:-1], solution[-1]


@torch.no_grad()
def _take_ballast(transformer: FluxTransformer2DModel, length: float) -> None:
    """Make the first layer norm treat all image tokens, which are about `length` long, alike.

    It divides each token by its length, and so the noise in it by more or by less, which would be heard as an error of
    the marks. From the embedding to the first block's attention two dimensions, opposite to each other, hold
    nothing but a constant that is longer than all else.
    """
    embed, block = transformer.x_embedder, transformer.transformer_blocks[0]
    dimensions = embed.weight.norm(dim=1).topk(2, largest=False).indices
    ballast = torch.tensor([1.0, -1.0]) * round(_BALLAST * length)
    embed.weight[dimensions], embed.bias[dimensions] = 0.0, ballast
    scales, gates = (_chunk_rows(block.norm1.linear, number) for number in (1, 2))
    longer = (1 + 2 * _BALLAST**2) ** 0.5
    block.norm1.linear.weight[scales] *= longer
    block.norm1.linear.bias[scales] = longer * (1 + block.norm1.linear.bias[scales]) - 1
    for rows, value in ((scales[dimensions], -1.0), (gates[dimensions], 1.0)):
        block.norm1.linear.weight[rows], block.norm1.linear.bias[rows] = 0.0, value
    output = block.attn.to_out[0]
    output.weight[dimensions], output.bias[dimensions] = 0.0, -ballast


@torch.no_grad()
def _attend_evenly(attention: FluxAttention, rows: slice) -> None:
    """Queries and keys that are the same everywhere: an image token counts 1, all text together _REST."""
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
    loudest = (rows.stop - rows.start) ** 0.5 / length * attention.norm_added_k.weight[dimension]
    sine = (log(_REST / NUM_TEXT_TOKENS) / loudest).clamp(-1.0, 1.0)
    attention.to_k.bias[filling_keys] = 1.0
    attention.add_k_proj.bias[at], attention.add_k_proj.bias[filling_keys] = sine, (1 - sine**2).sqrt()


def what_hears(model: Denoiser) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """All that the head for marks hears by, from the embeddings of image tokens and noise level to the head's mean.

    Parameters, each with a mask of its rows. Marks are so faint that what is left of a picture in the mean must be
    taken out exactly: were this trained, or its weights decayed, they would be drowned within some steps. What the head
    says of them to tokens is not among it.
    """
    block = model.transformer.transformer_blocks[0]
    attention = block.attn
    looks = attention.to_q.weight.detach().unflatten(0, (attention.heads, -1)).ne(0.0).any(dim=(1, 2))
    if looks.all():
        return []
    hears_O = ~looks.repeat_interleave(attention.to_q.out_features // attention.heads)
    embed, modulation = model.transformer.x_embedder, block.norm1.linear
    is_ballast_D = embed.weight.detach().eq(0.0).all(dim=1)
    all_D = torch.ones_like(is_ballast_D)
    scores = all_D[: attention.norm_q.weight.numel()].cumsum(0) <= NUM_UNROTATED
    kept = [
        (embed, all_D),
        (modulation, torch.cat([all_D, all_D, is_ballast_D, *[~all_D] * 3])),
        (attention.to_out[0], is_ballast_D),
    ]
    for image, text in (("to_q", "add_q_proj"), ("to_k", "add_k_proj"), ("to_v", "add_v_proj")):
        kept += [(getattr(attention, image), hears_O), (getattr(attention, text), hears_O)]
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        kept.append((getattr(attention, norm), scores))
    conditioning = model.transformer.time_text_embed
    kept += [(layer, all_D) for layer in conditioning.modules() if isinstance(layer, nn.Linear)]
    return [(parameter, rows) for layer, rows in kept for parameter in layer.parameters()]


def _chunk_rows(modulation: nn.Linear, number: int) -> torch.Tensor:
    """Rows of an `AdaLayerNormZero`'s layer that make its shift (0), scale (1) or gate (2) of the attention."""
    width = modulation.out_features // 6
    return torch.arange(number * width, (number + 1) * width)


def _write(output: nn.Linear, columns: slice, gate_D: torch.Tensor, loudness: float) -> None:
    """What the head's first values add to a token: orthogonal vectors, in the dimensions that are let through most."""
    is_open_D = gate_D.abs() >= gate_D.abs().median()
    is_open_D &= output.weight.ne(0.0).any(dim=1)
    vectors_DV = torch.linalg.qr(torch.randn(len(gate_D), NUM_MARKS + 1) * is_open_D[:, None]).Q
    output.weight[:, columns] = 0.0
    output.weight[is_open_D, columns.start : columns.start + NUM_MARKS + 1] = (
        loudness * vectors_DV[is_open_D] / gate_D[is_open_D, None]
    )
