"""Writes the trained parts as a `FluxPipeline` directory, weights in half precision, and reads one back to train on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from training.dit import SHIFTS, dit_learner
from training.learner import load
from training.model import Denoiser, Reader
from training.text import Questions, text_learner
from training.vae import load_vae, make_vae, vae_learner

CARD = {
    "name": "tetriserve-tiny",
    "num_steps": 20,
    "guidance_scale": 3.5,
    "sizes": ["256x256", "512x512", "1024x1024"],
    "dtype": "float32",
    "max_sequence_length": 40,
}


def load_denoiser(path: Path, device: torch.device) -> Denoiser:
    """The averaged weights of checkpoint `path`."""
    denoiser = Denoiser(Reader()).to(device).eval().requires_grad_(False)
    denoiser.load_state_dict(load(path, device)["average"])
    return denoiser


def make_pipeline(vae_path: Path, dit_path: Path) -> FluxPipeline:
    """The whole pipeline in float32, from two checkpoints."""
    cpu = torch.device("cpu")
    denoiser = load_denoiser(dit_path, cpu)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **SHIFTS),
        vae=load_vae(vae_path, cpu),
        text_encoder=denoiser.reader.text_encoder,
        tokenizer=denoiser.reader.tokenizer,
        text_encoder_2=denoiser.reader.text_encoder_2,
        tokenizer_2=denoiser.reader.tokenizer_2,
        transformer=denoiser.transformer,
    )


def export_pipeline(pipeline: FluxPipeline, directory: Path) -> int:
    """Save to `directory`; the bytes of all weights together."""
    pipeline.to(torch.float16).save_pretrained(directory, safe_serialization=True)
    for part in ("text_encoder", "text_encoder_2"):
        # The weights are stored as float16 and computed with in float32, unless the caller asks for another type.
        file = directory / part / "config.json"
        config = json.loads(file.read_text(encoding="utf-8")) | {"dtype": "float32"}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in directory.rglob("*.safetensors"):
        file.chmod(0o644)
    (directory / "tetriserve.json").write_text(json.dumps(CARD, indent=2) + "\n", encoding="utf-8")
    return sum(file.stat().st_size for file in directory.rglob("*.safetensors"))


def restore_checkpoints(directory: Path, vae_path: Path, text_path: Path, dit_path: Path) -> None:
    """Checkpoints of a pipeline that `export_pipeline` wrote, for its training to go on.

    Optimizers start anew, and so do the layers that only training uses.
    """
    cpu = torch.device("cpu")
    pipeline = FluxPipeline.from_pretrained(directory, dtype=torch.float32)
    vae, denoiser = make_vae(), Denoiser(Reader())
    vae.load_state_dict(pipeline.vae.state_dict())
    denoiser.transformer.load_state_dict(pipeline.transformer.state_dict())
    denoiser.reader.text_encoder.load_state_dict(pipeline.text_encoder.state_dict())
    denoiser.reader.text_encoder_2.load_state_dict(pipeline.text_encoder_2.state_dict())
    for linear in (denoiser.colours, denoiser.shapes, denoiser.places, denoiser.marks, denoiser.spots):
        torch.nn.init.zeros_(linear.weight)  # before they have learnt something, their gradient would only disturb
    facts = {name: pipeline.vae.config[name] for name in ("shift_factor", "scaling_factor")}
    vae_learner(vae_path, vae).save(facts)
    text_learner(text_path, Questions(denoiser.reader).to(cpu)).save({})
    dit_learner(dit_path, denoiser).save({})
