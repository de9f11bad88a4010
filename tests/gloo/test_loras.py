"""LoRAs against diffusers' own: the bits of the pipeline that has loaded the adapter alone, and of the bare model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tetriserve.models.preload  # noqa: F401  as in workers, libraries' warnings are silent
from tests.families.case import FamilyCase, call_pipeline
from tests.families.flux import FLUX, FLUX_KONTEXT
from tests.families.flux2 import FLUX2_KLEIN_BASE
from tests.families.loras import ATTENTION, write_lora
from tests.families.qwen_image import QWEN_IMAGE
from tests.families.sd3 import SD3
from tests.families.wan import WAN
from tests.families.z_image import Z_IMAGE
from tests.gloo.test_families import (
    TOLERANCE,
    Tiny,
    all_stages,
    built,
    denoise,
    odd,
    picture,
    plan_of,
    request_of,
    run_batches,
    seeing,
)
from tests.ranks import results_of
from tetriserve.config import LoraConfig
from tetriserve.core.errors import CheckpointError
from tetriserve.core.execution import Execution
from tetriserve.core.request import Lora, Request
from tetriserve.core.stages import DENOISE, ENCODE
from tetriserve.models.adapter import Member
from tetriserve.models.card import ModelCard
from tetriserve.models.checkpoint import read_card
from tetriserve.models.diffusion import DiffusionAdapter
from tetriserve.models.loading import held_bytes
from tetriserve.models.lora import with_loras
from tetriserve.models.registry import FAMILIES, load_adapter
from tetriserve.worker.team.shm import ShmTeam

NUM_RANKS = 4


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LoraCase:
    """targets: of each adapter, the layers that it changes, by component. Where the family's loader allows, one reaches
    text encoders, and one a layer around which ranks divide tokens or gather them."""

    family: FamilyCase
    targets: Mapping[str, Mapping[str, Sequence[str]]]


CASES = {
    case.family.name: case
    for case in (
        LoraCase(
            family=FLUX,
            targets={
                "sketch": {"transformer": ATTENTION, "text_encoder": ("q_proj", "v_proj")},
                "neon": {"transformer": ("to_q", "add_k_proj", "proj_mlp", "proj_out", "ff.net.0.proj", "x_embedder")},
            },
        ),
        LoraCase(
            family=SD3,
            targets={
                "sketch": {"transformer": ATTENTION, "text_encoder": ("q_proj",), "text_encoder_2": ("fc1", "v_proj")},
                "neon": {"transformer": ("to_q", "add_k_proj", "proj_out", "ff.net.0.proj", "context_embedder")},
            },
        ),
        LoraCase(
            family=FLUX2_KLEIN_BASE,
            targets={
                "sketch": {"transformer": (*ATTENTION, "to_qkv_mlp_proj")},
                "neon": {"transformer": ("to_add_out", "add_k_proj", "linear_in", "x_embedder", "proj_out")},
            },
        ),
        LoraCase(
            family=QWEN_IMAGE,
            targets={
                "sketch": {"transformer": ATTENTION},
                "neon": {"transformer": ("to_v", "add_q_proj", "img_in", "txt_in", "proj_out")},
            },
        ),
        LoraCase(
            family=WAN,
            targets={
                "sketch": {"transformer": ATTENTION},
                "neon": {"transformer": ("to_v", "ffn.net.0.proj", "patch_embedding", "proj_out")},
            },
        ),
        LoraCase(
            family=Z_IMAGE,
            targets={
                "sketch": {"transformer": ATTENTION},
                "neon": {"transformer": ("to_v", "w1", "all_x_embedder.2-1", "cap_embedder.1")},
            },
        ),
    )
}


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A tiny checkpoint, and the adapters that were made for it, by name."""

    tiny: Tiny
    files: Mapping[str, Path]

    @property
    def card(self) -> ModelCard:
        return with_loras(self.tiny.card, [LoraConfig(name, str(file)) for name, file in self.files.items()])

    @cache  # noqa: B019  the suite has few, and for all of its time
    def adapter(self, dtype: str = "float32") -> DiffusionAdapter:
        adapter = load_adapter(dataclasses.replace(self.card, execution=Execution(dtype)), "cpu")
        assert isinstance(adapter, DiffusionAdapter)
        return adapter

    def lora(self, name: str, scale: float = 1.0) -> Lora:
        return Lora(name, scale, next(lora.digest for lora in self.card.loras if lora.name == name))

    def called(self, request: Request, output_type: str, dtype: str = "float32", **options: Any) -> Any:
        """By a pipeline that knows no adapter but the request's."""
        lora, case = request.lora, self.tiny.case
        pipeline = self.tiny.bare_pipeline(dtype)
        if lora is not None:
            pipeline.load_lora_weights(str(self.files[lora.name]), adapter_name="its")
            pipeline.set_adapters("its", lora.scale)
        return call_pipeline(case, pipeline, request, self.tiny.card.num_text_tokens, output_type, **options)


@pytest.fixture(scope="module", params=CASES)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    case, path = CASES[request.param], tmp_path_factory.mktemp(request.param)
    tiny = built(case.family, path / "model")
    files = {
        name: write_lora(path / name, tiny.bare_pipeline(), targets, seed=seed, rank=2 + seed, alpha=6)
        for seed, (name, targets) in enumerate(case.targets.items())
    }
    return Adapted(tiny, files)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    path = tmp_path_factory.mktemp("flux")
    tiny = built(FLUX, path / "model")
    file = write_lora(path / "sketch", tiny.bare_pipeline(), CASES["flux"].targets["sketch"], seed=0)
    return Adapted(tiny, {"sketch": file})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_requests_in_any_order_have_the_bits_of_the_pipeline_with_their_adapter_alone(
    adapted: Adapted, dtype: str
) -> None:
    tiny, adapter = adapted.tiny, adapted.adapter(dtype)
    sketch, neon = adapted.lora("sketch"), adapted.lora("neon")
    requests = [
        tiny.request(),
        tiny.request(lora=sketch),
        tiny.request(lora=dataclasses.replace(neon, scale=0.5)),
        tiny.request(lora=dataclasses.replace(sketch, scale=-0.7), shape=odd(tiny.card)),
        tiny.guided(lora=neon),
        tiny.request(),
        tiny.guided(lora=sketch, num_steps=tiny.card.default_num_steps, prompt=""),
        tiny.guided(),
    ]
    seen = []
    for request in requests:
        latents = denoise(adapter, request)
        theirs = adapted.called(request, "latent", dtype)
        assert torch.equal(tiny.case.as_latents(adapter, request, latents), theirs), request.lora
        assert np.array_equal(adapter.decode(request, latents), np.asarray(adapted.called(request, "pil", dtype)))
        seen.append(latents)
    assert torch.equal(seen[0], seen[5])
    for other in seen[1:3]:
        assert (other - seen[0]).abs().max() > 1e-2, "an adapter that changes nothing shows nothing"


def test_adapters_of_text_encoders_change_embeddings_and_leave_no_trace(adapted: Adapted) -> None:
    tiny, adapter = adapted.tiny, adapted.adapter()
    plain, with_lora, again = (adapter.encode(tiny.request(lora=lora)) for lora in (None, adapted.lora("sketch"), None))
    for name in plain:
        assert torch.equal(plain[name], again[name])
    is_changed = any(not torch.equal(plain[name], with_lora[name]) for name in plain)
    targets = CASES[tiny.case.name].targets["sketch"]
    assert is_changed == any(component.startswith("text_encoder") for component in targets)


def test_steps_of_several_adapters_that_take_turns_have_the_bits_of_undisturbed_ones(adapted: Adapted) -> None:
    tiny, adapter = adapted.tiny, adapted.adapter()
    loras = (adapted.lora("sketch"), None, adapted.lora("neon", 0.25), adapted.lora("neon"))
    requests = [tiny.request(lora=lora, num_steps=4) for lora in loras]
    members = [Member(request, 0, {ENCODE: adapter.encode(request)}) for request in requests]
    for _ in range(4):
        for member in members:
            [left] = adapter.run(DENOISE, [member], 1, lambda: None)
            member.states, member.steps_done = {**member.states, DENOISE: left.tensors}, member.steps_done + 1
    for member in members:
        assert torch.equal(member.states[DENOISE]["latents"], denoise(adapter, member.request)), member.request.lora


def batches_of(card: ModelCard, guided: dict[str, Any]) -> list[list[Request]]:
    """Each of one adapter; the last of two members."""
    sketch, neon = (Lora(lora.name, 0.8, lora.digest) for lora in card.loras)
    one = [request_of(card, lora=sketch), request_of(card, lora=neon, prompt="red", shape=odd(card))]
    guided_one = request_of(card, **guided, lora=sketch, prompt="")
    pair = [request_of(card, lora=neon, prompt=text, seed=seed) for seed, text in enumerate(("red", "a tan square"))]
    return [*([each] for each in one), [guided_one], pair, [request_of(card)]]


def run_plans(
    team: ShmTeam,
    rank: int,
    end: Connection,
    path: Path,
    loras: list[LoraConfig],
    guided: dict[str, Any],
    degrees: Sequence[int],
) -> list[list[torch.Tensor]]:
    """The latents of each batch, on each rank."""
    card = with_loras(read_card(path), loras)
    adapter = load_adapter(card, "cpu")
    assert isinstance(adapter, DiffusionAdapter)
    return run_batches(team, rank, end, path, adapter, batches_of(card, guided), degrees)


def test_degrees_and_batches_with_an_adapter_give_the_latents_of_degree_1(adapted: Adapted, tmp_path: Path) -> None:
    card, adapter = adapted.card, adapted.adapter()
    guided = dict(adapted.tiny.case.guided or {})
    loras = [LoraConfig(lora.name, str(lora.file)) for lora in card.loras]
    degrees = adapted.tiny.case.degrees
    by_rank = results_of(run_plans, "shm", NUM_RANKS, tmp_path, card.path, loras, guided, degrees)
    assert any(len(ranks) > 1 for number in range(5) for ranks in plan_of(number, degrees))
    for number, batch in enumerate(batches_of(card, guided)):
        for index, request in enumerate(batch):
            expected = denoise(adapter, request)
            for latents in by_rank:
                difference = (latents[number][index] - expected).abs().max().item()
                assert difference < TOLERANCE, (plan_of(number, degrees), index, difference)


def test_a_picture_that_comes_along_is_seen_with_the_adapter(tmp_path: Path) -> None:
    tiny = built(FLUX_KONTEXT, tmp_path / "model")
    file = write_lora(tmp_path / "sketch", tiny.bare_pipeline(), CASES["flux"].targets["sketch"], seed=0)
    adapted, image = Adapted(tiny, {"sketch": file}), picture(200, 300)
    adapter, drawn = adapted.adapter(), []
    for lora in (adapted.lora("sketch"), None):
        request = tiny.request(lora=lora, num_steps=1)
        drawn.append(all_stages(adapter, seeing(tiny.card, request, [image]), image))
        theirs = adapted.called(request, "pil", image=[Image.fromarray(image)])
        assert np.array_equal(drawn[-1], np.asarray(theirs)), lora
    assert not np.array_equal(*drawn)


def test_without_text_encoders_the_other_parts_of_adapters_are_loaded_and_steps_are_the_same(
    adapted: Adapted, caplog: pytest.LogCaptureFixture
) -> None:
    tiny, whole = adapted.tiny, adapted.adapter()
    card = adapted.card
    part = load_adapter(card, "cpu", has_text_encoders=False)
    assert isinstance(part, DiffusionAdapter)
    assert not caplog.records
    held = held_bytes(part.pipeline)
    assert held == {name: num_bytes for name, num_bytes in held_bytes(whole.pipeline).items() if name in held}
    assert held["transformer"] > held_bytes(tiny.adapter().pipeline)["transformer"]
    for mine, theirs in zip(part.weights, whole.weights, strict=False):
        assert torch.equal(mine, theirs), "ranks share memory by the order of weights"
    for lora in (adapted.lora("sketch"), None, adapted.lora("neon", 0.5)):
        request = tiny.request(lora=lora)
        member = Member(request, 0, {ENCODE: whole.encode(request)})
        [left] = part.run(DENOISE, [member], request.num_steps, lambda: None)
        assert torch.equal(left.tensors["latents"], denoise(whole, request)), lora


def test_an_adapter_of_text_encoders_alone_changes_nothing_on_a_rank_without_them(
    flux: Adapted, tmp_path: Path
) -> None:
    file = write_lora(tmp_path / "words", flux.tiny.bare_pipeline(), {"text_encoder": ("q_proj",)}, seed=0)
    adapted = Adapted(flux.tiny, {"words": file, "sketch": flux.files["sketch"]})
    words, whole = adapted.lora("words"), adapted.adapter()
    part = load_adapter(adapted.card, "cpu", has_text_encoders=False)
    assert isinstance(part, DiffusionAdapter)
    for lora in (words, adapted.lora("sketch"), words, None):
        request = flux.tiny.request(lora=lora)
        member = Member(request, 0, {ENCODE: whole.encode(request)})
        [left] = part.run(DENOISE, [member], request.num_steps, lambda: None)
        assert torch.equal(left.tensors["latents"], denoise(whole, request)), lora
    alone = Adapted(flux.tiny, {"words": file})
    request = flux.tiny.request(lora=alone.lora("words"))
    part = load_adapter(alone.card, "cpu", has_text_encoders=False)
    [left] = part.run(DENOISE, [Member(request, 0, {ENCODE: whole.encode(request)})], request.num_steps, lambda: None)
    assert torch.equal(left.tensors["latents"], denoise(whole, request))
    assert torch.equal(denoise(whole, request), adapted.called(request, "latent"))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.lora_components])
def test_components_are_those_of_diffusers_loader(family: Any) -> None:
    for name in family.pipeline_classes:
        assert tuple(getattr(diffusers, name)._lora_loadable_modules) == family.lora_components


Tensors = dict[str, torch.Tensor]
TO_Q = "transformer.transformer_blocks.0.attn.to_q"
A, B = f"{TO_Q}.lora_A.weight", f"{TO_Q}.lora_B.weight"


def with_shapes(**shapes: tuple[int, ...]) -> Callable[[Tensors], Tensors]:
    """A change of tensors, by names with double underscores for dots; they come in another shape, or newly."""
    made = {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}
    return lambda tensors: tensors | made


def with_to_q(lora_A: tuple[int, ...], lora_B: tuple[int, ...] = (48, 4)) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {A: torch.zeros(lora_A), B: torch.zeros(lora_B)}


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "another width": (
        with_to_q((4, 64), (64, 4)),
        "to_q.lora_A.weight' is 4x64, but that layer of .*transformer is 48x48; it was made for another model",
    ),
    "a narrower width, which diffusers pads": (
        with_to_q((4, 32)),
        "to_q.lora_A.weight' is 4x32, but that layer of .*transformer is 48x48",
    ),
    "another output": (
        with_to_q((4, 48), (64, 4)),
        "to_q.lora_B.weight' is 64x4, but that layer of .*transformer is 48x48",
    ),
    "two ranks": (with_to_q((4, 48), (48, 8)), "lora_A.weight' is 4x48, but the lora_B beside it 48x8; ranks differ"),
    "half of a layer": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != B},
        "lacks '.*to_q.lora_B.weight', the other half of",
    ),
    "a layer that is not there": (
        with_shapes(transformer__transformer_blocks__7__attn__to_q__lora_A__weight=(4, 48)),
        "blocks.7.attn.to_q.lora_A.weight' is for a layer that .*transformer does not have; it was made for another",
    ),
    "a component without LoRAs": (
        with_shapes(text_encoder_2__shared__lora_A__weight=(4, 24)),
        "is for text_encoder_2; a LoRA of FluxPipeline is for transformer, text_encoder",
    ),
    "a whole layer": (
        with_shapes(transformer__norm_out__linear__weight=(96, 48)),
        "'transformer.norm_out.linear.weight' is no part of a LoRA",
    ),
    "a DoRA": (
        with_shapes(transformer__proj_out__lora_magnitude_vector=(16,)),
        "'transformer.proj_out.lora_magnitude_vector' makes it a DoRA, which is not served",
    ),
    "no LoRA": (
        lambda tensors: {"conv.weight": torch.zeros(2)},
        "no tensor is called lora, the first is 'conv.weight'; it is no LoRA",
    ),
    "nothing": (lambda tensors: {}, "holds no tensors; it is no LoRA"),
}


def refusal(card: ModelCard, path: Path) -> str:
    """The line that ends the start, which names the file."""
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}") as caught:
        with_loras(card, [LoraConfig("sketch", str(path))])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_lora_of_this_model_is_refused_before_anything_is_loaded(
    flux: Adapted, tmp_path: Path, fault: str
) -> None:
    change, message = FAULTS[fault]
    file = tmp_path / "spoilt.safetensors"
    save_file(change(load_file(flux.files["sketch"])), file)
    assert re.search(message, refusal(flux.tiny.card, file))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ('{"transformer.init_lora_weights": "pissa"}', 'its metadata says init_lora_weights "pissa", which is not'),
        ('{"transformer.modules_to_save": ["proj_out"]}', 'its metadata says modules_to_save \\["proj_out"\\]'),
        ("{", "its lora_adapter_metadata is no JSON object"),
    ],
)
def test_metadata_that_asks_for_more_than_a_lora_is_refused(
    flux: Adapted, tmp_path: Path, metadata: str, message: str
) -> None:
    file = tmp_path / "spoilt.safetensors"
    save_file(load_file(flux.files["sketch"]), file, {"lora_adapter_metadata": metadata})
    assert re.search(message, refusal(flux.tiny.card, file))


def test_broken_and_foreign_files_are_refused_before_anything_is_loaded(flux: Adapted, tmp_path: Path) -> None:
    whole = flux.files["sketch"].read_bytes()

    card = flux.tiny.card
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    assert "is truncated or not a safetensors file" in refusal(card, tmp_path / "cut.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.safetensors")
    assert "is truncated or not a safetensors file" in refusal(card, tmp_path / "pickle.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.bin")
    assert "is no .safetensors file; other formats, which may run code" in refusal(card, tmp_path / "pickle.bin")
    assert "is not there" in refusal(card, tmp_path / "missing.safetensors")
    assert "holds 2 safetensors files; give the file of one LoRA" in refusal(card, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no safetensors file" in refusal(card, tmp_path / "empty")
    (tmp_path / "one").mkdir()
    (tmp_path / "one/any.safetensors").write_bytes(whole)
    [found] = with_loras(flux.tiny.card, [LoraConfig("sketch", str(tmp_path / "one"))]).loras
    assert found.file == tmp_path / "one/any.safetensors"


def kohya_of(tensors: Tensors) -> Tensors:
    """Two layers in the names of another trainer."""
    names = {
        "single_transformer_blocks.0.norm.linear": "lora_unet_single_blocks_0_modulation_lin",
        "single_transformer_blocks.1.proj_out": "lora_unet_single_blocks_1_linear2",
    }
    made: Tensors = {}
    generator = torch.Generator().manual_seed(3)
    widths = {"norm.linear": (48, 144), "proj_out": (240, 48)}
    for name, other in names.items():
        takes, gives = next(width for end, width in widths.items() if name.endswith(end))
        made[f"{other}.lora_down.weight"] = torch.randn(4, takes, generator=generator)
        made[f"{other}.lora_up.weight"] = torch.randn(gives, 4, generator=generator)
        made[f"{other}.alpha"] = torch.tensor(2.0)
    return made


def test_the_layout_of_another_trainer_is_converted_by_diffusers(flux: Adapted, tmp_path: Path) -> None:
    file = tmp_path / "kohya.safetensors"
    save_file(kohya_of({}), file)
    adapted = Adapted(flux.tiny, {"kohya": file})
    request = flux.tiny.request(lora=adapted.lora("kohya"))
    latents = denoise(adapted.adapter(), request)
    assert torch.equal(latents, adapted.called(request, "latent"))
    assert not torch.equal(latents, adapted.called(flux.tiny.request(), "latent"))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("lora_unet_double_blocks_0_xyz", (4, 48)), ("lora_unet_single_blocks_9_modulation_lin", (4, 48))],
)
def test_what_the_conversion_or_the_loader_would_leave_out_is_refused(
    flux: Adapted, tmp_path: Path, name: str, shape: tuple[int, int]
) -> None:
    tensors = kohya_of({})
    tensors |= {f"{name}.lora_down.weight": torch.ones(shape), f"{name}.lora_up.weight": torch.ones(144, 4)}
    tensors[f"{name}.alpha"] = torch.tensor(2.0)
    file = tmp_path / "kohya.safetensors"
    save_file(tensors, file)
    card = with_loras(flux.tiny.card, [LoraConfig("kohya", str(file))])
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(file))}") as caught:
        load_adapter(card, "cpu")
    assert "\n" not in str(caught.value)


def test_a_file_that_changes_after_the_start_is_refused_by_the_next_worker(flux: Adapted, tmp_path: Path) -> None:
    file = tmp_path / "sketch.safetensors"
    file.write_bytes(flux.files["sketch"].read_bytes())
    card = with_loras(flux.tiny.card, [LoraConfig("sketch", str(file))])
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="was changed after the server started; restart the server"):
        load_adapter(card, "cpu")


def test_a_request_with_an_adapter_that_is_not_loaded_fails_alone(flux: Adapted) -> None:
    adapter = flux.adapter()
    with pytest.raises(ValueError, match="lora 'other' is not loaded; loaded: sketch"):
        adapter.encode(flux.tiny.request(lora=Lora("other")))
    request = flux.tiny.request()
    assert torch.equal(denoise(adapter, request), flux.called(request, "latent"))
