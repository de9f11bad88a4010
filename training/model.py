"""The transformer and the text encoders of the pipeline, and how both are fed in training.

Suffixes of tensor names: B batch, L text tokens, S image tokens, C latent channels, D embedding width, H height,
W width, A position axes (3), M marks of the noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tetriserve.evaluation.vocabulary import COLOURS, SHAPES
from training.layouts import NUM_MARKS
from training.tokenizers import NUM_TEXT_TOKENS, make_tokenizers

EMBED_DIM = 128
_TAPPED_SINGLE_BLOCK = 1
LATENT_CHANNELS = 16
NUM_UNROTATED = 8
"""Of a head's dimensions: those that rotary positions turn by the first axis, on which all tokens are at 0."""


class Reader(nn.Module):
    """Both text encoders, each with its tokenizer: captions to what `FluxPipeline` conditions the transformer on."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer, self.tokenizer_2 = make_tokenizers()
        self.text_encoder = _make_clip(self.tokenizer)
        self.text_encoder_2 = _make_t5(self.tokenizer_2)

    def tokenize(self, captions: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Token numbers (B, L) for CLIP and for T5, padded as `FluxPipeline` pads them."""
        clip_BL, t5_BL = (
            tokenizer(
                captions, padding="max_length", max_length=NUM_TEXT_TOKENS, truncation=True, return_tensors="pt"
            ).input_ids.to(device)
            for tokenizer in (self.tokenizer, self.tokenizer_2)
        )
        return clip_BL, t5_BL

    def forward(self, clip_BL: torch.Tensor, t5_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's pooled embedding (B, D) and T5's of every token (B, L, D)."""
        return self.text_encoder(clip_BL).pooler_output, self.text_encoder_2(t5_BL)[0]


class Prediction(NamedTuple):
    """velocity (B, S, 4C), and of the object that each token is part of, see `Label`:

    colours, shapes: logits (B, S, classes), the first of which is "none".
    places: the rest (B, S, 3).

    marks: those of the noise (B, S, M), as each token knows them.
    spots: where the object lies that a text token names (B, L, 3), see `spots_of`.
    """

    velocity: torch.Tensor
    colours: torch.Tensor
    shapes: torch.Tensor
    places: torch.Tensor
    marks: torch.Tensor
    spots: torch.Tensor


class Denoiser(nn.Module):
    """Velocity of packed latents from captions: FLUX's transformer, small, with what reads the captions for it.

    Part of the way through the transformer linear layers tell what the noise says, where that puts each object of the
    caption, and then which object each token is part of, and which part. They are of use in training alone: what
    caption and noise mean for a token is learnt many times sooner when it is asked for than from the velocity (as REPA
    does with features of another model: Yu et al. 2024).
    """

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.reader = reader.requires_grad_(False)
        self.transformer = _make_transformer()
        width = self.transformer.inner_dim
        self.colours, self.shapes = nn.Linear(width, len(COLOURS) + 1), nn.Linear(width, len(SHAPES) + 1)
        self.places = nn.Linear(width, 3)
        self.marks, self.spots = nn.Linear(width, NUM_MARKS), nn.Linear(width, 3)
        self._tapped: list[tuple[torch.Tensor, torch.Tensor]] = []
        for block in (
            self.transformer.transformer_blocks[-1],
            self.transformer.single_transformer_blocks[_TAPPED_SINGLE_BLOCK],
        ):
            block.register_forward_hook(lambda block, inputs, outputs: self._tapped.append(outputs))

    def forward(
        self, latents_BSC: torch.Tensor, sigma_B: torch.Tensor, clip_BL: torch.Tensor, t5_BL: torch.Tensor, width: int
    ) -> Prediction:
        """`width` is that of the image in tokens."""
        self._tapped.clear()
        pooled_BD, text_BLD = self.reader(clip_BL, t5_BL)
        velocity_BSC: torch.Tensor = self.transformer(
            hidden_states=latents_BSC,
            timestep=sigma_B,
            pooled_projections=pooled_BD,
            encoder_hidden_states=text_BLD,
            txt_ids=latents_BSC.new_zeros(t5_BL.shape[1], 3),
            img_ids=image_ids(latents_BSC.shape[1] // width, width, latents_BSC.device),
            return_dict=False,
        )[0]
        (early_text_BLD, early_BSD), (_, middle_BSD) = self._tapped
        return Prediction(
            velocity_BSC,
            colours=self.colours(middle_BSD),
            shapes=self.shapes(middle_BSD),
            places=self.places(middle_BSD),
            marks=self.marks(early_BSD),
            spots=self.spots(early_text_BLD),
        )


def image_ids(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Positions (S, A) of the tokens of a height x width grid, as `FluxPipeline` numbers them."""
    ids_HWA = torch.zeros(height, width, 3, device=device)
    ids_HWA[..., 1] = torch.arange(height, device=device)[:, None]
    ids_HWA[..., 2] = torch.arange(width, device=device)[None, :]
    return ids_HWA.reshape(height * width, 3)


def pack(latents_BCHW: torch.Tensor) -> torch.Tensor:
    """Tokens (B, S, 4C) of 2x2 latent pixels each, in `FluxPipeline`'s order."""
    batch, channels, height, width = latents_BCHW.shape
    cells = latents_BCHW.view(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def _make_transformer() -> FluxTransformer2DModel:
    """8 heads of 32; 64, 256 and 1024 image tokens at 256, 512 and 1024 pixels."""
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=EMBED_DIM,
        pooled_projection_dim=EMBED_DIM,
        guidance_embeds=False,
        axes_dims_rope=(NUM_UNROTATED, 12, 12),
    )
    # Blocks start as the identity and the output as zero, as in DiT (Peebles and Xie 2023, section 3.2).
    modulations = [
        module for name, module in transformer.named_modules() if name.endswith(("norm.linear", "norm1.linear"))
    ]
    modulations += [block.norm1_context.linear for block in transformer.transformer_blocks]
    for linear in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def _make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=EMBED_DIM,
            intermediate_size=2 * EMBED_DIM,
            projection_dim=EMBED_DIM,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=NUM_TEXT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _make_t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=EMBED_DIM,
            d_kv=EMBED_DIM // 4,
            d_ff=2 * EMBED_DIM,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=48,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
