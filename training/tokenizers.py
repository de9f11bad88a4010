"""The two tokenizers: one byte-level BPE in which every word of the grammar is one token.

Any other text falls back to pieces and bytes, so that no prompt is an error.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from tetriserve.evaluation.captions import WORDS

NUM_TEXT_TOKENS = 40
"""Enough for the grammar's longest caption; divisible by the degrees 2, 4 and 8."""
_WORD_END = "</w>"


def make_tokenizers() -> tuple[CLIPTokenizer, PreTrainedTokenizerFast]:
    """CLIP's and T5's, of the same words. The same files every time."""
    vocab, merges = _learn_merges(WORDS)
    return _clip_tokenizer(vocab, merges), _t5_tokenizer(vocab, merges)


def _learn_merges(words: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Merges until every word is one token.

    Not `tokenizers`' own trainer: it breaks ties by chance, and the files would differ from run to run.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [f"{byte}{_WORD_END}" for byte in alphabet]
    spellings = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        tokens.append("".join(best))
        spellings = [_merged(spelling, best) for spelling in spellings]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def _merged(spelling: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for token in spelling:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def _clip_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> CLIPTokenizer:
    special = {token: len(vocab) + index for index, token in enumerate(("<|startoftext|>", "<|endoftext|>"))}
    return CLIPTokenizer(vocab=vocab | special, merges=merges, model_max_length=NUM_TEXT_TOKENS)


def _t5_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """A plain fast tokenizer: T5's own class rebuilds itself as Unigram, which cannot fall back to bytes."""
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    shifted = special | {token: index + len(special) for token, index in vocab.items()}
    backend = Tokenizer(models.BPE(shifted, merges, end_of_word_suffix=_WORD_END))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=NUM_TEXT_TOKENS,
    )
