"""Previews: the colours of a linear model's latents are found exactly, with the noise taken out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import TensorSpec, serialize_file

from tetriserve.core.events import TensorRef
from tetriserve.core.execution import Execution
from tetriserve.core.request import Request, Shape
from tetriserve.core.stages import image_stages
from tetriserve.engine.previews import PreviewReader
from tetriserve.models.card import ModelCard
from tetriserve.models.preview import PATCH, Latents, fit_basis, project
from tetriserve.worker.store import TensorStore

SIDE = 4  # pixels to a token, so 2 to a pixel of a preview
CARD = ModelCard(
    name="linear", path=Path(), family="flux", pipeline_class="FluxPipeline",
    execution=Execution("float32"), size_multiple=SIDE,
    pixels_per_token=SIDE, num_heads=1, num_text_tokens=1, default_num_steps=4, default_guidance_scale=1.0,
    has_guidance=False, has_negative_prompt=False, sizes=(Shape(16, 8),), fingerprint="0",
)  # fmt: skip
MIXING = np.random.default_rng(1).normal(size=(PATCH * PATCH * 3, 20))
REQUEST = Request(
    request_id="r", prompt="", shape=Shape(16, 8), stages=image_stages(4), seed=0, arrival_s=0.0, deadline_s=1.0
)  # fmt: skip


class Array(np.ndarray):
    """As much of a tensor as is asked for."""

    def float(self):
        return self

    def cpu(self):
        return self

    def numpy(self):
        return np.asarray(self)


def shrunk(pixels):
    rows, columns = pixels.shape[0] // 2, pixels.shape[1] // 2
    return pixels.reshape(rows, 2, columns, 2, 3).mean(axis=(1, 3))


def tokens_of(pixels):
    """A model whose latents mix the colours of the four quarters of a token, and shift them."""
    small = shrunk(pixels) / 255
    rows, columns = small.shape[0] // PATCH, small.shape[1] // PATCH
    squares = [
        small[PATCH * row : PATCH * row + PATCH, PATCH * column : PATCH * column + PATCH].ravel()
        for row in range(rows)
        for column in range(columns)
    ]
    return np.array(squares) @ MIXING + 0.5


class LinearAdapter:
    def latents_of(self, pixels):
        return tokens_of(pixels)[None].view(Array)


@pytest.fixture(scope="module")
def basis():
    return fit_basis(LinearAdapter(), CARD)


@pytest.fixture(scope="module")
def pixels():
    """Blocks of 2 by 2 pixels, as a preview can show them."""
    small = np.random.default_rng(2).integers(0, 256, (8, 4, 3), dtype=np.uint8)
    return small.repeat(2, axis=0).repeat(2, axis=1)


def test_what_is_linear_is_found_exactly_and_in_its_place(basis, pixels):
    assert basis.shape == (21, 12)
    preview = project(basis, Latents(tokens_of(pixels), 0.0), None, num_rows=4, num_columns=2)
    assert (preview.shape, preview.dtype) == ((8, 4, 3), np.uint8)
    np.testing.assert_allclose(preview, shrunk(pixels), atol=1)


def test_two_points_of_a_straight_way_from_noise_tell_where_it_leads(basis, pixels):
    picture = tokens_of(pixels)
    noise = np.random.default_rng(3).normal(size=picture.shape) * 3
    early, later = (Latents((1 - level) * picture + level * noise, level) for level in (0.9, 0.7))
    seen = project(basis, later, early, 4, 2)
    np.testing.assert_allclose(seen, shrunk(pixels), atol=1)
    assert np.abs(project(basis, later, None, 4, 2) - shrunk(pixels)).mean() > 30


def test_two_points_of_one_noise_level_tell_nothing(basis, pixels):
    latents = Latents(tokens_of(pixels), 0.5)
    np.testing.assert_array_equal(project(basis, latents, latents, 4, 2), project(basis, latents, None, 4, 2))


def save(store_path, key, **arrays):
    """As a worker leaves tensors; uint16 stands for the bits of bfloat16, which numpy does not have."""
    kinds = {"float32": "float32", "uint16": "bfloat16"}
    specs = {
        name: TensorSpec(
            dtype=kinds[array.dtype.name], shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in arrays.items()
    }
    serialize_file(specs, store_path / f"{key}.safetensors")
    return TensorRef(key, 1)


@pytest.fixture
def reader(tmp_path, basis):
    executor = SimpleNamespace(states=TensorStore(tmp_path), preview_bases={"": save(tmp_path, "basis", basis=basis)})
    return PreviewReader(executor, {"": CARD})


def test_a_preview_is_read_from_the_store_and_leads_to_the_next(reader, tmp_path, pixels):
    picture = tokens_of(pixels).astype(np.float32)
    noise = np.random.default_rng(3).normal(size=picture.shape).astype(np.float32)
    first = save(tmp_path, "r.latents.1", latents=noise[None], noise_level=np.array(1.0, np.float32))
    halfway = ((picture + noise) / 2)[None]
    second = save(tmp_path, "r.latents.2", latents=halfway, noise_level=np.array(0.5, np.float32))
    before = reader.read(REQUEST, first, None)
    seen = reader.read(REQUEST, second, before.latents)
    assert seen.latents.noise_level == 0.5
    np.testing.assert_allclose(seen.pixels, shrunk(pixels), atol=1)


def test_bfloat16_is_read_without_torch(reader, tmp_path, pixels):
    picture = tokens_of(pixels).astype(np.float32)
    halves = (picture.view(np.uint32) >> 16).astype(np.uint16)[None]
    ref = save(tmp_path, "r.latents.4", latents=halves, noise_level=np.array(0.0, np.float32))
    np.testing.assert_allclose(reader.read(REQUEST, ref, None).pixels, shrunk(pixels), atol=12)


def test_latents_that_are_gone_and_a_matrix_that_never_came_give_no_preview(reader, tmp_path):
    assert reader.read(REQUEST, TensorRef("r.latents.3", 1), None) is None
    without_matrix = SimpleNamespace(states=TensorStore(tmp_path), preview_bases={})
    assert PreviewReader(without_matrix, {"": CARD}).read(REQUEST, TensorRef("basis", 1), None) is None
