"""Applies an `Execution` to a diffusers pipeline, each part by diffusers' own feature for it.

In this order: what the machine lacks is refused, weights are quantised as they are loaded, models are placed, then
come attention, tiling and compilation.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import platformdirs
import torch
from diffusers import TorchAoConfig
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from tqdm import tqdm

from tetriserve.core.errors import ConfigError
from tetriserve.core.execution import ATTENTIONS, DEFAULT, FP8, REGIONAL, TEXT_ENCODERS, VAE, Execution

_FP8_CAPABILITY = (8, 9)
_MAX_GRAPHS = 100_000
"""Dynamo fails beyond 8. Each size, degree, batch and length of texts has a graph."""
BACKENDS = {backend.value.lstrip("_"): backend for backend in AttentionBackendName}
"""By the names in `ATTENTIONS`."""
_WITHOUT_MASKS = ("flash", "sage")
_PROBE_TOKENS = 64
_PROBE_HEAD_DIM = 64
_LEAST_ACTIVATION = 1e-12
_CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"


def check_machine(execution: Execution, device: torch.device) -> None:
    """That what does not depend on the model works here, before any weights are read.

    Raises:
        ConfigError: it does not; one line names the value.
    """
    execution.check_device(device.type)
    if execution.quantization == FP8:
        if find_spec("torchao") is None:
            raise ConfigError("quantization is 'fp8', but torchao is not installed; pip install 'tetriserve[fp8]'")
        capability = torch.cuda.get_device_capability(device)
        if capability < _FP8_CAPABILITY:
            raise ConfigError(
                f"quantization is 'fp8', which takes compute capability {_dotted(_FP8_CAPABILITY)}, but {device} has "
                f"{_dotted(capability)}; allowed there: {DEFAULT}"
            )
    if execution.compile == REGIONAL:
        _keep_compiled()
        tqdm.set_lock(threading.RLock())  # inductor's bars would make a semaphore, which a killed worker leaves behind
        try:
            torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(8, device=device))
        except Exception as error:  # of many kinds: no compiler, no Triton, no room
            raise ConfigError(
                f"compile is 'regional', but torch cannot compile here: {_line(error)}; allowed: {DEFAULT}"
            ) from error


def backend_of(execution: Execution) -> AttentionBackendName | None:
    """The attention that was asked for, for processors that diffusers itself gives no choice; None is the default."""
    return None if execution.attention == DEFAULT else BACKENDS[execution.attention]


def takes_masks(execution: Execution) -> bool:
    """Whether the attention can leave out tokens, by which texts of several lengths go through one forward."""
    return not any(kind in execution.attention for kind in _WITHOUT_MASKS)


def loading_options(execution: Execution, device: torch.device) -> dict[str, Any]:
    """For `from_pretrained` of each transformer."""
    if execution.quantization != FP8:
        return {}
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    # Scaled by row, a token's activations do not depend on the others, hence not on the degree or on the batch. Torchao
    # would divide a row of zeros by its scale, zero, and tune inductor for the whole process.
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), activation_value_lb=_LEAST_ACTIVATION, set_inductor_config=False
    )
    return {"quantization_config": TorchAoConfig(config), "device_map": str(device)}


def place(execution: Execution, pipeline: Any, device: torch.device) -> None:
    """Move the models of `pipeline` to `device`. Offloaded ones follow, layer by layer, whenever they are used."""
    if execution.offload != TEXT_ENCODERS:
        pipeline.to(device)
        return
    pipeline.enable_group_offload(
        device,
        offload_type="leaf_level",
        use_stream=device.type == "cuda",
        exclude_modules=[name for name in pipeline.components if not name.startswith("text_encoder")],
    )


def apply(execution: Execution, pipeline: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Have a loaded and placed `pipeline` run as told.

    Raises:
        ConfigError: the attention backend cannot run here; one line names it and those that can.
    """
    for transformer in transformers_of(pipeline):
        if execution.quantization == FP8:
            _fill_empty_rows(transformer)
        if execution.attention != DEFAULT:
            _set_attention(transformer, execution.attention, dtype, device)
    if execution.tiling == VAE:
        pipeline.vae.enable_tiling()
    if execution.compile == REGIONAL:
        for transformer in transformers_of(pipeline):
            compile_blocks(transformer)


def transformers_of(pipeline: Any) -> list[Any]:
    """The models that make the steps; some pipelines have another for those of little noise."""
    found = (getattr(pipeline, name, None) for name in ("transformer", "transformer_2"))
    return [each for each in found if each is not None]


def compile_blocks(transformer: Any, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the repeated blocks, statically: each shape gets its own graph, also after other shapes were compiled.

    Raises:
        ConfigError: diffusers does not know the repeated blocks of this model.
    """
    if not getattr(transformer, "_repeated_blocks", None):  # SD3 names its blocks for another purpose
        transformer._repeated_blocks = getattr(transformer, "_no_split_modules", None)
    if not transformer._repeated_blocks:
        raise ConfigError(
            f"compile is 'regional', but {type(transformer).__name__} names no repeated blocks; allowed: {DEFAULT}"
        )
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _MAX_GRAPHS
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)


def _fill_empty_rows(transformer: Any) -> None:
    """Rows of zeros, which torchao has divided by their scale, zero: they are NaN."""
    from torchao.quantization import Float8Tensor

    for weight in transformer.parameters():
        if isinstance(weight.data, Float8Tensor):
            is_empty = weight.scale == 0
            weight.qdata.view(torch.uint8).masked_fill_(is_empty, 0)
            weight.scale.masked_fill_(is_empty, 1)


def _keep_compiled() -> None:
    """Have inductor write to the user's cache folder, unless the user names another.

    Torch's default is one in /tmp, which another user may have made; torch sets the variable when it is loaded.
    """
    if os.environ.get(_CACHE_DIR) in (None, default_cache_dir()):
        os.environ[_CACHE_DIR] = str(platformdirs.user_cache_path("tetriserve") / "compiled")


def _set_attention(transformer: Any, name: str, dtype: torch.dtype, device: torch.device) -> None:
    # Classes name heads and their width differently in their configurations.
    layers = (each for each in transformer.modules() if hasattr(each, "processor") and hasattr(each, "to_q"))
    attention = next(layers, None)
    num_heads = 1 if attention is None else attention.heads
    head_dim = _PROBE_HEAD_DIM if attention is None else attention.to_q.out_features // attention.heads
    probe = torch.zeros(1, _PROBE_TOKENS, num_heads, head_dim, dtype=dtype, device=device)
    try:
        transformer.set_attention_backend(BACKENDS[name].value)
        _attend(name, probe)
    except Exception as error:  # each backend has errors of its own
        can_run = [DEFAULT, *(other for other in ATTENTIONS[1:] if other != name and _can_attend(other, probe))]
        raise ConfigError(
            f"attention is {name!r}, which cannot run here: {_line(error)}; allowed: {', '.join(can_run)}"
        ) from error


def _can_attend(name: str, probe: torch.Tensor) -> bool:
    """Whether a backend runs as it is installed; nothing is downloaded."""
    try:
        _attend(name, probe)
    except Exception:  # each backend has errors of its own, for a missing package, a wrong dtype or device
        return False
    return True


@torch.no_grad()
def _attend(name: str, probe: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of each kernel that it cannot take
        dispatch_attention_fn(probe, probe, probe, backend=BACKENDS[name]).sum().item()


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "").rstrip(".") or type(error).__name__


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
