"""Tiny tokenizers of the classes that language models have: all bytes, a few words, and a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WORDS = ("a", "red", "circle", "on", "blue", "background", "tan", "square", "green", "rain", "user", "assistant")
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
QWEN_TEMPLATE = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}
"""
"""Thinking is turned off by an empty thought, as Qwen3's own template does it."""


def byte_pairs(words: Sequence[str], first_id: int = 0) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary and the merges of a byte-level BPE that makes one token of each word, with and without a space."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens, merges = sorted(ByteLevel.alphabet()), []
    for word in words:
        for text in (word, "\u0120" + word):
            for end in range(1, len(text)):
                if text[: end + 1] not in tokens:
                    tokens.append(text[: end + 1])
                    merges.append((text[:end], text[end]))
    return {token: first_id + number for number, token in enumerate(tokens)}, merges


def qwen_tokenizer() -> Any:
    from transformers import Qwen2Tokenizer

    vocab, merges = byte_pairs(WORDS)
    tokenizer: Any = Qwen2Tokenizer(
        vocab=vocab, merges=merges, extra_special_tokens=list(QWEN_SPECIALS[1:3]), chat_template=QWEN_TEMPLATE.strip()
    )
    tokenizer.add_tokens(list(QWEN_SPECIALS[3:]))
    return tokenizer


MISTRAL_SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
PIXTRAL_SPECIALS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
MISTRAL_TEMPLATE = """
{{- bos_token }}
{%- for message in messages %}
{%- set mark = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}
{{- '[' + mark + ']' }}
{%- for block in message.content %}
{{- block.text if block.type == 'text' else '[IMG]' }}
{%- endfor %}
{{- '[/' + mark + ']' }}
{%- endfor %}
"""


def mistral_tokenizer(words: Sequence[str]) -> Any:
    """With a token for each of `words`, too."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    specials = (*MISTRAL_SPECIALS, *PIXTRAL_SPECIALS)
    vocab, merges = byte_pairs([*WORDS, *words], len(specials))
    tokenizer = Tokenizer(BPE({text: number for number, text in enumerate(specials)} | vocab, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = Decoder()
    unknown, begin, end, pad, *others = specials
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=begin, eos_token=end, pad_token=pad,
        extra_special_tokens=others, chat_template=MISTRAL_TEMPLATE.strip(), padding_side="left",
    )  # fmt: skip
