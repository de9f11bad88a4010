"""SD3's attention over text and image together, with a choice of kernel and a division among ranks.

Diffusers' own processor, `JointAttnProcessor2_0`, has neither; where neither is asked for, it runs unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.attention_processor import JointAttnProcessor2_0


class JointAttention:
    """Takes and gives what `JointAttnProcessor2_0` does; H is heads, D the width of one."""

    _parallel_config: Any = None
    """Set by `SequenceParallel`, which also replaces this module's `dispatch_attention_fn`."""

    def __init__(self, backend: AttentionBackendName | None) -> None:
        self._attention_backend = backend
        self._plain = JointAttnProcessor2_0()

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Image tokens (B, S, width) and, in joint attention, text tokens (B, L, width)."""
        if self._parallel_config is None and self._attention_backend is None:
            return self._plain(attn, hidden_states, encoder_hidden_states, **kwargs)
        parts = [_projected(hidden_states, attn.heads, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            parts.append(
                _projected(
                    encoder_hidden_states, attn.heads, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj,
                    attn.norm_added_q, attn.norm_added_k,
                )
            )  # fmt: skip
        query_BTHD, key_BTHD, value_BTHD = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
        attended_BTHD = dispatch_attention_fn(
            query_BTHD, key_BTHD, value_BTHD, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        attended = attended_BTHD.flatten(2).to(query_BTHD.dtype)
        image, text = attended.split([hidden_states.shape[1], attended.shape[1] - hidden_states.shape[1]], dim=1)
        image = attn.to_out[1](attn.to_out[0](image))
        if encoder_hidden_states is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def _projected(
    tokens: torch.Tensor, num_heads: int, to_q: Any, to_k: Any, to_v: Any, norm_q: Any, norm_k: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value (B, T, H, D)."""
    query, key, value = (layer(tokens).unflatten(-1, (num_heads, -1)) for layer in (to_q, to_k, to_v))
    return query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value
