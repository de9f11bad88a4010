"""The parts of training that must agree with diffusers' pipeline, or with each other. No test here trains for long."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count, product
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from tetriserve.evaluation.captions import WORDS, write_caption
from tetriserve.evaluation.reading import read_image
from tetriserve.evaluation.scenes import Item, Relation, Scene, draw_scene
from tetriserve.evaluation.scoring import score_reading
from tetriserve.evaluation.vocabulary import COLOURS, SHAPES
from tetriserve.launch import BUNDLED_MODEL
from training.dit import SHIFTS, guidance_of, shift_of, spots_loss
from training.export import export_pipeline, make_pipeline, restore_checkpoints
from training.learner import Learner, Schedule, load, save
from training.model import Denoiser, Reader, image_ids, pack
from training.muon import orthogonal
from training.pictures import Label, crops_of, labels_of, pictures_of, prefetched, scene_of
from training.text import OBJECT_FACTS, Questions, object_facts, scene_facts
from training.tokenizers import NUM_TEXT_TOKENS, make_tokenizers
from training.vae import encode, load_vae, to_images, train_vae

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine are many times slower."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_tokens_are_packed_and_numbered_as_the_pipeline_does() -> None:
    latents_BCHW = torch.randn(2, 16, 8, 16)
    assert torch.equal(pack(latents_BCHW), FluxPipeline._pack_latents(latents_BCHW, 2, 16, 8, 16))
    ids_SA = FluxPipeline._prepare_latent_image_ids(1, 4, 8, CPU, torch.float32)
    assert torch.equal(image_ids(4, 8, CPU), ids_SA)


@pytest.mark.parametrize("num_tokens", [64, 256, 1024])
def test_noise_is_shifted_as_the_pipeline_shifts_it(num_tokens: int) -> None:
    assert shift_of(num_tokens) == pytest.approx(calculate_shift(num_tokens, *SHIFTS.values()))


def test_every_word_is_one_token_and_every_caption_fits() -> None:
    clip, t5 = make_tokenizers()
    for word in WORDS:
        assert len(clip(word).input_ids) == 3, word
        assert len(t5(word).input_ids) == 2, word
    random = Random(0)
    captions = [write_caption(draw_scene(random, 3), random) for _ in range(500)]
    assert max(len(clip(caption).input_ids) for caption in captions) <= NUM_TEXT_TOKENS


def test_text_outside_the_vocabulary_has_tokens_too() -> None:
    for tokenizer in make_tokenizers():
        ids = tokenizer("Ein blauer Würfel — 青い立方体 🟦").input_ids
        assert len(ids) > 10
        assert tokenizer.unk_token_id not in ids[:-1]


def test_orthogonal_keeps_directions_and_evens_out_their_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((32, 64), (64, 32)):
        matrix = torch.randn(shape, generator=generator) @ torch.diag(torch.linspace(0.1, 2.0, shape[1]))
        values = torch.linalg.svdvals(orthogonal(matrix))
        assert values.min() > 0.5 and values.max() < 1.35


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    stable = Schedule(learning_rate=1.0, minutes=1.0, warmup_steps=10, decay=0.0)
    assert [stable.rate(step, 0.99) for step in (0, 4, 9, 10_000)] == [0.1, 0.5, 1.0, 1.0]
    falling = Schedule(learning_rate=1.0, minutes=1.0, warmup_steps=10, decay=0.5)
    assert [falling.rate(100, elapsed) for elapsed in (0.0, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0]


def test_learning_follows_the_loss_and_continues_where_it_stopped(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    schedule = Schedule(learning_rate=0.1, minutes=50, warmup_steps=1, decay=0.8)
    learner = Learner(tmp_path / "layer.pt", layer, [layer], horizon=5)
    seconds = count()
    learner.train(
        schedule,
        lambda: {"weight": (layer.weight - 3.0).square().mean(), "bias": layer.bias.norm()},
        clock=lambda: next(seconds),
    )
    assert 2900 < learner.num_steps <= 3000
    for module in (learner.module, learner.average):
        assert (module.weight - 3.0).abs().max() < 0.1
        assert module.bias.abs().max() < 0.1
    other = torch.nn.Linear(2, 2)
    again = Learner(tmp_path / "layer.pt", other, [other], horizon=5)
    assert again.num_steps == learner.num_steps
    assert torch.equal(other.weight, layer.weight)


def _learn_in_a_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    learner = _learn(folder / "two.pt", rows=slice(4 * rank, 4 * rank + 4))
    save(folder / f"{rank}.pt", learner.module.state_dict())
    torch.distributed.destroy_process_group()


def _learn(path: Path, rows: slice) -> Learner[torch.nn.Linear]:
    """Five steps on these of eight inputs."""
    torch.manual_seed(0)
    layer, inputs_BD, wanted_BD = torch.nn.Linear(4, 4), torch.randn(8, 4), torch.randn(8, 4)
    learner = Learner(path, layer, [layer], horizon=5)
    learner.train(
        Schedule(learning_rate=1e-2, minutes=1.0, warmup_steps=1),
        lambda: {"error": (layer(inputs_BD[rows]) - wanted_BD[rows]).square().mean()},
        clock=count(step=12.0).__next__,
    )
    return learner


def test_two_processes_learn_what_one_learns_of_both_batches(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_learn_in_a_process, (tmp_path,), nprocs=2, start_method="spawn")
    alone = _learn(tmp_path / "one.pt", rows=slice(0, 8))
    first, second = (load(tmp_path / f"{rank}.pt", CPU) for rank in (0, 1))
    for name, value in alone.module.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-2, atol=1e-4)
    assert load(tmp_path / "two.pt", CPU)["step"] == alone.num_steps


def test_a_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "part.pt"
    for step in (1, 2):
        save(path, {"step": step})
    assert load(path, CPU) == {"step": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_a_seed_is_one_scene_at_every_size() -> None:
    assert scene_of(5) == scene_of(5) != scene_of(6)
    for seed, side in product(range(5, 10), (256, 512)):
        (picture,) = pictures_of([seed], side, side)
        score = score_reading(scene_of(seed), read_image(picture))
        assert score.objects and score.background and score.relations in (None, True)


def test_workers_draw_what_one_process_draws() -> None:
    calls = [(seed, 2**14) for seed in range(3)]
    alone, together = (list(prefetched(crops_of, calls, num_workers)) for num_workers in (0, 2))
    assert [len(batch) for batch in alone] == [2**14 // batch.shape[1] ** 2 or 1 for batch in alone]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_vae_is_trained_continued_and_gives_latents_of_unit_variance(tmp_path: Path) -> None:
    schedule = Schedule(learning_rate=1e-3, minutes=0.005, warmup_steps=1)
    path = tmp_path / "vae.pt"
    train_vae(path, schedule, num_pixels=2**13, decoder_only=False, num_workers=0, device=CPU)
    first = load(path, CPU)
    train_vae(path, schedule, num_pixels=2**13, decoder_only=True, num_workers=0, device=CPU)
    second = load(path, CPU)
    assert second["step"] > first["step"] >= 1
    before, after = first["average"], second["average"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("decoder") for name in changed)
    assert first["facts"] == second["facts"]
    latents = encode(load_vae(path, CPU), to_images(pictures_of(range(4), 256, 256), CPU))
    assert latents.mean().abs() < 0.3
    assert 0.7 < latents.std() < 1.3


SCENE = Scene(
    background="white",
    items=(Item(colour="red", shape="circle", size="big"), Item(colour="blue", shape="ring")),
    relations=(Relation(subject=0, name="above", target=1),),
)


def test_facts_say_what_belongs_to_what() -> None:
    facts = scene_facts(SCENE)
    assert {("white", "background"), ("red", "circle"), ("red", "big"), ("red", "above"), ("ring", "below")} <= facts
    assert not facts & {("red", "ring"), ("blue", "above"), ("blue", "big")}
    assert object_facts(SCENE, 1) & set(OBJECT_FACTS) == {("white", "background"), ("blue",), ("ring",), ("below",)}


def test_objects_are_asked_about_at_the_word_for_their_shape() -> None:
    questions = Questions(Reader())
    caption = "on a white background, a ring in blue with a big red disc above it"
    _, t5_BL = questions.reader.tokenize([caption], CPU)
    places, truths = questions.objects_of([SCENE], t5_BL)
    words = [
        questions.reader.tokenizer_2.convert_ids_to_tokens(int(t5_BL[row, column])) for row, column in places.tolist()
    ]
    assert words == ["ring</w>", "disc</w>"]
    held = [{name for name, truth in zip(OBJECT_FACTS, row, strict=True) if truth} for row in truths.tolist()]
    assert [("blue",) in held[0], ("red",) in held[0], ("red",) in held[1]] == [True, False, True]


@pytest.mark.parametrize(("height", "width"), [(256, 256), (256, 384)])
def test_tokens_are_labelled_by_the_object_they_show(height: int, width: int) -> None:
    for seed in range(20):
        scene = scene_of(seed)
        pixels = pictures_of([seed], height, width)[0]
        cells = pixels.reshape(height // 32, 32, width // 32, 32, 3).swapaxes(1, 2).reshape(-1, 32 * 32, 3)
        labels = [Label(*row) for row in labels_of(seed, height, width).tolist()]
        assert len(labels) == len(cells)
        known = {(1 + list(COLOURS).index(item.colour), 1 + SHAPES.index(item.shape)) for item in scene.items}
        assert {(label.colour, label.shape) for label in labels} - {(0, 0)} == known
        background = np.array(COLOURS[scene.background])
        for cell, label in zip(cells, labels, strict=True):
            if label.colour:
                ink = np.array(list(COLOURS.values())[int(label.colour) - 1])
                others = (cell != background).any(1) & (np.abs(cell.astype(int) - ink).sum(1) > 30)
                assert others.mean() < 0.25, "no other object lies here"
            else:
                assert (cell != background).any(1).mean() < 0.06


def test_labels_tell_where_in_its_object_a_token_lies() -> None:
    seed = next(seed for seed in range(100) if scene_of(seed).items[0].size == "big" and len(scene_of(seed).items) == 1)
    pixels = pictures_of([seed], 256, 256)[0]
    rows, columns = np.nonzero((pixels != np.array(COLOURS[scene_of(seed).background])).any(-1))
    left, right, top, bottom = columns.min(), columns.max(), rows.min(), rows.max()
    labels = {number: Label(*row) for number, row in enumerate(labels_of(seed, 256, 256).tolist()) if row[0]}
    for number, label in labels.items():
        row, column = divmod(number, 8)
        extent = math.exp(label.extent) * 32
        assert (column + 0.5) * 32 - label.across * extent == pytest.approx((left + right) / 2, abs=2)
        assert (row + 0.5) * 32 - label.down * extent == pytest.approx((top + bottom) / 2, abs=2)
        assert extent == pytest.approx(max(right - left, bottom - top) / 2, abs=2)
    assert len(labels) > 4


def test_the_denoiser_says_what_tokens_are_part_of_and_its_gradient_reaches_the_transformer() -> None:
    model = Denoiser(Reader())
    clip_BL, t5_BL = model.reader.tokenize(["a red circle", "a blue ring"], CPU)
    prediction = model(torch.randn(2, 64, 64), torch.tensor([0.3, 0.9]), clip_BL, t5_BL, 8)
    assert prediction.velocity.shape == (2, 64, 64)
    assert prediction.colours.shape == (2, 64, 1 + len(COLOURS))
    assert prediction.shapes.shape == (2, 64, 1 + len(SHAPES))
    assert prediction.places.shape == (2, 64, 3)
    prediction.places.square().sum().backward()
    assert model.transformer.x_embedder.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.reader.parameters())


def test_guidance_learnt_settles_at_classifier_free_guidance() -> None:
    generator = torch.Generator().manual_seed(0)
    velocity, without_caption = torch.randn(2, 4, generator=generator)
    learnt = velocity
    for _ in range(50):
        learnt = velocity + guidance_of(2.0, learnt, without_caption)
    assert torch.allclose(learnt, without_caption + 2.0 * (velocity - without_caption), atol=1e-5)
    assert torch.equal(guidance_of(1.0, velocity, without_caption), torch.zeros(4))


def test_a_pipeline_restored_to_checkpoints_is_exported_as_it_was(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.pt" for name in ("vae", "text", "dit")]
    restore_checkpoints(BUNDLED_MODEL, *paths)
    export_pipeline(make_pipeline(paths[0], paths[2]), tmp_path / "pipeline")
    weights = sorted(path.relative_to(BUNDLED_MODEL) for path in BUNDLED_MODEL.rglob("*.safetensors"))
    assert len(weights) == 4
    for name in weights:
        assert (tmp_path / "pipeline" / name).read_bytes() == (BUNDLED_MODEL / name).read_bytes(), name


def test_objects_are_missed_by_where_their_tokens_put_them_and_of_none_nothing_is() -> None:
    predicted_BL3 = torch.zeros(2, 40, 3, requires_grad=True)
    spots = {(0, 3): np.full(3, 2.0, dtype=np.float32), (1, 7): np.zeros(3, dtype=np.float32)}
    assert spots_loss(predicted_BL3, spots).item() == 2.0
    spots_loss(predicted_BL3, {}).backward()
    assert predicted_BL3.grad is not None and not predicted_BL3.grad.any()
