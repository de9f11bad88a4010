"""Each part of an execution on a real model: it computes what diffusers' own feature computes, or is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.modeling_utils import ModelMixin

import tetriserve.models.preload  # noqa: F401  as in workers, the libraries' warnings are silent
from tests.gloo.test_flux_adapter import call_pipeline, denoise
from tetriserve.config import EngineConfig, ExecutionConfig, ModelConfig, PoolConfig
from tetriserve.core.errors import ConfigError
from tetriserve.core.execution import ATTENTIONS, Execution
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.launch import StartProgress, launch
from tetriserve.models.card import ModelCard
from tetriserve.models.execution import BACKENDS, check_machine, compile_blocks, place
from tetriserve.models.flux.adapter import FluxAdapter

REQUEST = Request(
    request_id="r",
    prompt="a red circle on a blue background",
    shape=Shape(64, 64),
    stages=image_stages(3),
    seed=7,
    arrival_s=0.0,
    deadline_s=10.0,
)
WIDE = dataclasses.replace(
    REQUEST, shape=Shape(64, 96), stages=image_stages(2, 2), negative_prompt="blurry", true_cfg_scale=3.0
)


def adapter_of(card: ModelCard, **values: str) -> FluxAdapter:
    return FluxAdapter(dataclasses.replace(card, execution=Execution(card.execution.dtype, **values)), "cpu")


def plain_pipeline(card: ModelCard) -> Any:
    pipeline: Any = FluxPipeline.from_pretrained(card.path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_compiled_model_gives_the_bits_of_the_pipeline_compiled_alike_and_nearly_those_of_the_eager_one(
    bundled_card: ModelCard, reference: FluxAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    latents = denoise(adapter_of(bundled_card, compile="regional"), REQUEST)
    pipeline = plain_pipeline(bundled_card)
    pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    assert torch.equal(latents, call_pipeline(pipeline, REQUEST, "latent"))
    eager = denoise(reference, REQUEST)
    assert not torch.equal(latents, eager), "this would not notice that nothing was compiled"
    assert (latents - eager).abs().max().item() < 1e-5


class Block(torch.nn.Module):
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


class TwoBlocks(ModelMixin):
    _repeated_blocks = ["Block"]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(tensor))


def test_each_shape_is_compiled_once_for_all_blocks_beyond_what_dynamo_allows_by_itself() -> None:
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        compiled.append(inputs)
        return graph.forward

    model = TwoBlocks()
    compile_blocks(model, backend)
    sides = range(1, 261)  # beyond both of its limits, 8 and 256
    for side in (*sides, *sides):
        assert model(torch.ones(side)).sum().item() == 4 * side
    assert len(compiled) == len(sides)


def test_tiling_changes_only_pictures_that_are_larger_than_a_tile_and_as_the_pipelines_own_does(
    bundled_card: ModelCard, reference: FluxAdapter
) -> None:
    adapter, pipeline = adapter_of(bundled_card, tiling="vae"), plain_pipeline(bundled_card)
    pipeline.vae.enable_tiling()
    tile = pipeline.vae.config.sample_size
    for side, is_changed in ((tile, False), (2 * tile, True)):
        request = dataclasses.replace(REQUEST, shape=Shape(side, side), stages=image_stages(1))
        latents = denoise(adapter, request)
        pixels = adapter.decode(request, latents)
        assert np.array_equal(pixels, np.asarray(call_pipeline(pipeline, request, "pil")[0]))
        assert np.array_equal(pixels, reference.decode(request, latents)) != is_changed


@pytest.mark.parametrize("name", ["native", "native_math"])
def test_another_kernel_of_attention_gives_the_bits_of_the_pipeline_with_it(
    bundled_card: ModelCard, reference: FluxAdapter, name: str
) -> None:
    default = denoise(reference, WIDE)
    pipeline = plain_pipeline(bundled_card)
    pipeline.transformer.set_attention_backend(BACKENDS[name].value)
    latents = denoise(adapter_of(bundled_card, attention=name), WIDE)
    assert torch.equal(latents, call_pipeline(pipeline, WIDE, "latent"))
    assert (latents - default).abs().max().item() < 1e-4


def test_every_kernel_that_can_be_named_is_one_of_diffusers() -> None:
    assert {*ATTENTIONS} - {"default"} <= BACKENDS.keys()


@pytest.mark.parametrize("name", ["flash_3", "flash_hub", "native_cudnn", "sage", "xformers"])
def test_a_kernel_of_attention_that_cannot_run_here_is_refused_in_one_line_with_those_that_can(
    bundled_card: ModelCard, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        adapter_of(bundled_card, attention=name)
    message = str(caught.value)
    assert message.startswith(f"attention is {name!r}, which cannot run here: ")
    allowed = message.rpartition("; allowed: ")[2].split(", ")
    assert {"default", "native", "native_math"} <= {*allowed} <= {*ATTENTIONS} - {name}
    assert "\n" not in message
    assert capfd.readouterr().err == ""


async def test_a_worker_that_cannot_run_the_model_so_ends_the_start_with_that_line(profile_path: str) -> None:
    config = EngineConfig(
        models=(ModelConfig(profile=profile_path, execution=ExecutionConfig(attention="native_cudnn")),),
        pool=PoolConfig(num_ranks=1),
    )
    with pytest.raises(
        ConfigError, match="^attention is 'native_cudnn', which cannot run here: .*; allowed: default, "
    ):
        await launch(config, StartProgress())


def test_offloaded_text_encoders_read_prompts_as_those_on_the_device_do(bundled_card: ModelCard) -> None:
    """On a CPU they are moved nowhere: this is about the calls."""
    pipeline = plain_pipeline(bundled_card)
    before = pipeline.encode_prompt(REQUEST.prompt, max_sequence_length=40)
    place(Execution("float32", offload="text_encoders"), pipeline, torch.device("cpu"))
    after = pipeline.encode_prompt(REQUEST.prompt, device=torch.device("cpu"), max_sequence_length=40)
    assert hasattr(pipeline.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q, "_diffusers_hook")
    assert not any(hasattr(module, "_diffusers_hook") for module in pipeline.transformer.modules())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("device", "package", "message"),
    [
        ("cpu", None, "quantization is 'fp8', which takes a GPU, but device is cpu; allowed there: default"),
        ("cuda:0", None, "quantization is 'fp8', but torchao is not installed; pip install 'tetriserve[fp8]'"),
        (
            "cuda:1",
            object(),
            "quantization is 'fp8', which takes compute capability 8.9, but cuda:1 has 8.6; allowed there: default",
        ),
    ],
)
def test_what_fp8_takes_is_asked_for_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, device: str, package: object, message: str
) -> None:
    monkeypatch.setattr("tetriserve.models.execution.find_spec", lambda name: package)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 6))
    with pytest.raises(ConfigError) as caught:
        check_machine(Execution("bfloat16", quantization="fp8"), torch.device(device))
    assert str(caught.value) == message


def test_without_a_compiler_compilation_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),), "fx_graph_cache": False}),
        pytest.raises(ConfigError) as caught,
    ):
        check_machine(Execution("float32", compile="regional"), torch.device("cpu"))
    message = str(caught.value)
    assert message.startswith("compile is 'regional', but torch cannot compile here: ")
    assert message.endswith("; allowed: default")
    assert "\n" not in message
