"""The denoiser: flow matching on stored latents, captions written anew each time a picture is seen.

Suffixes of tensor names: B batch, S image tokens, C latent channels, M marks.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tetriserve.evaluation.captions import write_caption
from training.hearing import give_head_for_marks, what_hears
from training.latents import LatentBank
from training.layouts import marked
from training.learner import Learner, Schedule
from training.model import Denoiser, Reader
from training.pictures import marks_of, scene_of
from training.text import load_reader, shape_tokens, shapes_by_token
from training.tokenizers import NUM_TEXT_TOKENS

SHIFTS = {"base_image_seq_len": 64, "max_image_seq_len": 1024, "base_shift": 0.6, "max_shift": 1.8}
"""The scheduler's: the more tokens say the same, the more noise it takes to hide it (Esser et al. 2024, 5.3.2)."""
_CAPTION_DROPOUT = 0.08
_WEIGHT_DECAY = 0.01
_REFRESH_STEPS = 100
_OBJECTS_WEIGHT = 0.05
_PLACES_WEIGHT = 0.1
_SPOTS_WEIGHT = 0.6
_MARKS_WEIGHT = 0.2
_NOISIER = 1.1
"""How much further than the sampler's levels those trained on are shifted: high ones decide layout and shapes."""
_NUM_HEARD = 2048
"""Pictures of which the head for marks is made."""
_SPREAD = 0.6
"""Of their logits, 1 being an even time's: less leaves out most of the low levels, where little is left to decide."""
_BEGINNING = 0.05
"""Share of pictures at noise level 1, where sampling begins and which no spread of levels reaches."""
_NOTHING_WEIGHT = 0.15
_BACKENDS = {
    # The fused one is several times slower for so few tokens.
    "cpu": [SDPBackend.MATH],
    "cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


def train_dit(
    path: Path,
    text: Path,
    latents: Path,
    schedule: Schedule,
    *,
    shares: dict[tuple[int, int], float],
    batch: int,
    guidance: float,
    device: torch.device,
    is_compiled: bool,
) -> None:
    """Train into the checkpoint `path`, continuing it if it exists.

    text: checkpoint of the text encoders, which stay as they are.
    shares: how often a batch is of each (height, width).
    batch: pictures of 256x256 in a batch; of larger sizes there are fewer, so that the tokens are as many.
    guidance: scale of classifier-free guidance that the weights themselves learn; 1 is none.
    """
    torch.manual_seed(0)
    model = Denoiser(load_reader(text, device)).to(device)
    learner = dit_learner(path, model)
    for parameter, rows in what_hears(model):
        learner.keep(parameter, rows)
    if is_compiled:
        for block in _blocks(model):
            block.compile()
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    random = Random(f"{rank} {learner.num_steps}")
    sizes = Random(learner.num_steps)  # the same for all processes: none waits for another's larger batch
    torch.manual_seed(random.getrandbits(32))
    banks = {LatentBank(latents, *size): share for size, share in shares.items()}
    if not any(map(len, banks)):
        raise FileNotFoundError(f"no latents of any of the sizes in {latents}; `python -m training latents` makes them")

    def loss_terms() -> dict[str, Tensor]:
        if learner.num_steps % _REFRESH_STEPS == 0:
            for bank in banks:
                bank.refresh()
        ready = [bank for bank in banks if len(bank)]
        (bank,) = sizes.choices(ready, [banks[bank] for bank in ready])
        return _losses(model, bank, random, batch, guidance, device)

    learner.train(schedule, loss_terms)


def let_hear(path: Path, latents: Path) -> int:
    """Give the denoiser of checkpoint `path` its head for marks; its number."""
    if not path.exists():
        raise FileNotFoundError(f"no {path}; `python -m training dit` or `restore` makes it")
    model = Denoiser(Reader())
    learner = dit_learner(path, model)
    bank = LatentBank(latents, 256, 256)
    if not len(bank):
        raise FileNotFoundError(f"no latents of 256x256 in {latents}; `python -m training latents` makes them")
    random = Random(0)
    torch.manual_seed(0)
    seeds, latents_BSC = bank.draw(random, _NUM_HEARD)
    captions = [write_caption(scene_of(seed), random) for seed in seeds]
    head = give_head_for_marks(model, latents_BSC, captions, bank.width)
    learner.average.load_state_dict(model.state_dict())
    learner.save({})
    return head


def dit_learner(path: Path, model: Denoiser) -> Learner[Denoiser]:
    return Learner(path, model, _blocks(model), horizon=100, weight_decay=_WEIGHT_DECAY)


def _blocks(model: Denoiser) -> list[nn.Module]:
    return [*model.transformer.transformer_blocks, *model.transformer.single_transformer_blocks]


def shift_of(num_tokens: int) -> float:
    """mu, as `FluxPipeline` computes it from the scheduler's config."""
    slope = (SHIFTS["max_shift"] - SHIFTS["base_shift"]) / (SHIFTS["max_image_seq_len"] - SHIFTS["base_image_seq_len"])
    return SHIFTS["base_shift"] + slope * (num_tokens - SHIFTS["base_image_seq_len"])


def noise_levels(count: int, num_tokens: int, device: torch.device) -> Tensor:
    """Sigmas (count,), evenly spread over a batch, which makes its gradient less of a chance; some are 1."""
    time_B = (torch.randperm(count, device=device) + torch.rand(count, device=device)) / count
    time_B = (time_B / (1 - _BEGINNING)).clamp(max=1.0)
    return torch.sigmoid(_SPREAD * torch.logit(time_B) + shift_of(num_tokens) + _NOISIER)


def _losses(
    model: Denoiser, bank: LatentBank, random: Random, batch: int, guidance: float, device: torch.device
) -> dict[str, Tensor]:
    """Mean squared error of the velocity, noise less data (Lipman et al. 2023; Esser et al. 2024, section 2), how
    surprising it was what each token is part of, and mean squared error of where in its object it lies, of what the
    noise says, and of where the objects lie that text tokens name.
    """
    num_tokens = bank.height * bank.width
    count = max(1, batch * (64 + NUM_TEXT_TOKENS) // (num_tokens + NUM_TEXT_TOKENS))
    seeds, latents_BSC = bank.draw(random, count)
    captions = ["" if random.random() < _CAPTION_DROPOUT else write_caption(scene_of(seed), random) for seed in seeds]
    labels_BS5 = bank.labels(seeds).to(device)
    latents_BSC = latents_BSC.to(device)
    marks_BM = torch.tensor([marks_of(seed) for seed in seeds], device=device)
    noise_BSC = marked(torch.randn_like(latents_BSC), marks_BM)
    sigma_B = noise_levels(count, num_tokens, device)
    noisy_BSC = torch.lerp(latents_BSC, noise_BSC, sigma_B[:, None, None])
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(_BACKENDS[device.type]):
        clip_BL, t5_BL = model.reader.tokenize(captions, device)
        prediction = model(noisy_BSC, sigma_B, clip_BL, t5_BL, bank.width)
        target_BSC = noise_BSC - latents_BSC
        if guidance > 1.0:
            with torch.no_grad():
                unguided = model(noisy_BSC, sigma_B, *model.reader.tokenize([""] * count, device), bank.width)
                target_BSC += guidance_of(guidance, prediction.velocity.detach(), unguided.velocity)
    objects = [
        _object_loss(logits, labels_BS5[..., index].long())
        for index, logits in enumerate((prediction.colours, prediction.shapes))
    ]
    velocity = torch.nn.functional.mse_loss(prediction.velocity.float(), target_BSC)
    is_object_BS = labels_BS5[..., 0] > 0
    places = torch.nn.functional.mse_loss(prediction.places[is_object_BS].float(), labels_BS5[is_object_BS][:, 2:])
    marks = (prediction.marks.float() - marks_BM[:, None]).square().mean()
    named = shape_tokens([scene_of(seed) for seed in seeds], t5_BL, shapes_by_token(model.reader))
    spots = {(row, column): bank.spots(seeds[row])[item] for row, column, item in named}
    return {
        "velocity": velocity,
        "spots": _SPOTS_WEIGHT * spots_loss(prediction.spots, spots),
        "marks": _MARKS_WEIGHT * marks,
        "objects": _OBJECTS_WEIGHT * torch.stack(objects).sum(),
        "places": _PLACES_WEIGHT * places,
    }


def guidance_of(scale: float, velocity_BSC: Tensor, without_caption_BSC: Tensor) -> Tensor:
    """What to add to the target so that the model learns to be guided by itself, in one pass (Tang et al. 2025, MG).

    Where the model has learnt v' = v + (1 - 1/s)(v' - u), v' is u + s(v - u): classifier-free guidance of scale s.
    """
    return (1 - 1 / scale) * (velocity_BSC - without_caption_BSC)


def spots_loss(predicted_BL3: Tensor, spots: dict[tuple[int, int], np.ndarray]) -> Tensor:
    """Mean squared error at those tokens (row, column) that name an object; of none it is 0."""
    found = [predicted_BL3[token].float() - torch.from_numpy(spot).to(predicted_BL3) for token, spot in spots.items()]
    return torch.stack(found).square().mean() if found else 0.0 * predicted_BL3.float().sum()


def _object_loss(logits_BSK: Tensor, labels_BS: Tensor) -> Tensor:
    """Cross entropy, in which the many tokens that belong to nothing count little."""
    weights_K = torch.ones(logits_BSK.shape[-1], device=logits_BSK.device)
    weights_K[0] = _NOTHING_WEIGHT
    return torch.nn.functional.cross_entropy(logits_BSK.float().flatten(0, 1), labels_BS.flatten(), weights_K)
