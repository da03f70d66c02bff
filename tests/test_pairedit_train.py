"""train_pairedit.py end to end: whole runs, stops, caches, two processes, the user's document."""

import gc
import json
import os
import shutil
import signal
import sys
import weakref

import diffusers
import numpy as np
import pytest
import torch
from conftest import LAUNCH, ROOT, concept, run, slider_settings, write_config
from PIL import Image
from safetensors.torch import load_file

import cache_embeddings
import train_pairedit as script
from utils import UserError, load_config

SEEDS = ROOT / "tests" / "seeds"
SHORT = {"num_inference_steps": 4, "end_step": 3, "skips": [1], "scales": "0,1"}
SEVERAL = {"datasets": ["age", "smile"], "noise_scales": [1, 3], "checkpoints_total_limit": None}


def trainer_of(checkpoint, folder, **changes):
    """Audited as the command does it."""
    file = write_config(folder, slider_settings(checkpoint, folder, **(SHORT | changes)))
    config = load_config(script.Config, ["--config", str(file)], script.audit)
    return script.PairEditTrainer(config)


def fit(checkpoint, folder, **changes):
    trainer = trainer_of(checkpoint, folder, **changes)
    trainer.fit()
    return trainer


def loras(folder):
    """{path below folder: tensors} of every LoRA of the last step."""
    files = [f for f in folder.rglob("*_4epoch*.safetensors") if "earlier" not in str(f)]
    return {str(file.relative_to(folder)): load_file(file) for file in files}


def assert_same(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys() and ours
    for file, tensors in ours.items():
        assert tensors.keys() == theirs[file].keys()
        for name, tensor in tensors.items():
            if tolerance:
                torch.testing.assert_close(tensor, theirs[file][name], **tolerance)
            else:
                assert torch.equal(tensor, theirs[file][name]), f"{file}: {name}"


def run_folders(folder, **changes):
    config = script.Config(output_folder=folder / "out", **changes)
    return [script.run_folder(config, run) for run in script.all_runs(config)]


@pytest.fixture(scope="module")
def straight(checkpoints, tmp_path_factory):
    """Two data sets at two noise scales, four steps each, without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    concept(folder / "datasets/age")
    concept(folder / "datasets/smile", ("1", "2"), (96, 64))
    fit(checkpoints["flux"], folder, **SEVERAL, preview=True, log_every=1)
    return folder


def again(straight, checkpoints, folder, **changes):
    """The same runs into another folder, on the same pictures and cache."""
    places = {"datasets_folder": str(straight / "datasets"), "cache_dir": str(straight / "cache")}
    return trainer_of(checkpoints["flux"], folder, **(SEVERAL | places | changes))


# --- what a run leaves ----------------------------------------------------------------------------


def test_every_run_leaves_what_the_house_promises(straight):
    folders = run_folders(straight, datasets=["age", "smile"], noise_scales=[1, 3])
    assert [f.name for f in folders] == [
        f"{dataset}_vtrain_image_4.0eta_{beta}ns_full_base_v1"
        for dataset in ("age", "smile")
        for beta in ("1.0", "3.0")
    ]
    for folder in folders:
        dataset, beta = folder.parent.name, "3.0" if "3.0ns" in folder.name else "1.0"
        files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        expected = {"run.json", "config.yaml", "README.md", "metrics.jsonl", "samples/pairs.png"}
        expected |= {"train_pairedit.py", "utils.py", "report.html"}
        for step in (2, 4):
            expected |= {f"samples/step-{step:06d}.png"}
            expected |= {f"checkpoint-{step}/{n}" for n in ("state.json", "training_state.pt")}
            stem = f"{dataset}_4.0eta_{beta}ns_4inf_{step}epoch"
            expected |= {
                f"{stem}{end}" for end in (".safetensors", "_0.safetensors", ".pt", "_0.pt")
            }
        assert files == expected
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        for row in rows:
            assert row["loss"] == pytest.approx(row["loss_content"] + row["loss_semantic"])
            assert np.isfinite(row["loss"]) and row["loss_content"] > 0
        assert json.loads((folder / "run.json").read_text())["config"]["rank"] == 16
        assert (
            f"{dataset}_4.0eta_{beta}ns_4inf_4epoch.safetensors"
            in (folder / "README.md").read_text()
        )
        assert "--skip 1 --num_inference_steps 4" in (folder / "README.md").read_text()


def test_the_files_hold_content_and_semantic_and_the_runs_differ(straight):
    files = loras(straight / "out")
    assert len(files) == 8
    semantic = [t for name, t in files.items() if not name.endswith("_0.safetensors")]
    name = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    ups = [tensors[name] for tensors in files.values()]
    for number, up in enumerate(ups):
        assert up.any() and not any(torch.equal(up, other) for other in ups[:number])
    assert len(semantic) == 4


def test_pictures_show_the_pairs_and_the_slider(straight):
    folder = run_folders(straight, noise_scales=[3])[0]
    strip = np.asarray(Image.open(folder / "samples/step-000004.png").convert("RGB")).astype(int)
    cells = strip[24:280, 8:264], strip[24:280, 272:528]
    assert all(cell.std() > 5 for cell in cells)
    assert abs(cells[0] - cells[1]).max() > 0  # scale 0 and scale 1
    first = np.asarray(Image.open(folder / "samples/step-000002.png").convert("RGB")).astype(int)
    assert np.array_equal(first[24:280, 8:264], cells[0])  # the base does not change
    pairs = Image.open(folder / "samples/pairs.png")
    assert pairs.width == 8 + 2 * 264 and pairs.height > 3 * 256


def test_the_preview_is_what_the_pipeline_draws(straight, checkpoints, tmp_path):
    """Scale 1, skip 1 of 4 steps: two steps of the base, two with the LoRA."""
    trainer = again(
        straight, checkpoints, tmp_path, datasets=["age"], noise_scales=[3], preview=True
    )
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.load_transformer()
    run_ = script.all_runs(trainer.config)[0]
    trainer.begin(run_)
    source = run_folders(straight, noise_scales=[3])[0]
    trainer._restore(source / "checkpoint-4", {"step": 4})
    drawn = []
    original = script.unpack_tokens
    script.unpack_tokens = lambda tokens, grid: (drawn.append(tokens), original(tokens, grid))[1]
    try:
        trainer.preview(run_)
    finally:
        script.unpack_tokens = original
    pipeline = diffusers.FluxPipeline.from_pretrained(checkpoints["flux"])
    pipeline.load_lora_weights(str(next(source.glob("*_4epoch.safetensors"))))

    def switch(pipe, i, t, kwargs):
        (pipe.enable_lora if i >= 1 else pipe.disable_lora)()
        return {}

    pipeline.disable_lora()
    options = {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 16}
    theirs = pipeline(
        "image of a person",
        generator=torch.Generator().manual_seed(6666),
        guidance_scale=3.5,
        output_type="latent",
        callback_on_step_end=switch,
        **options,
    ).images
    torch.testing.assert_close(drawn[0][1:], theirs, rtol=1e-4, atol=1e-4)
    assert (drawn[0][0] - drawn[0][1]).abs().max() > 1e-3


def test_a_run_alone_is_the_same_as_among_others(straight, checkpoints, tmp_path):
    again(straight, checkpoints, tmp_path, datasets=["smile"], noise_scales=[3]).fit()
    alone = loras(tmp_path / "out")
    assert len(alone) == 2
    theirs = loras(straight / "out")
    assert_same(alone, {name: theirs[name] for name in alone})


def test_versions_are_repeats_with_other_draws(straight, checkpoints, tmp_path):
    one = {"datasets": ["age"], "noise_scales": [3]}
    trainer = again(straight, checkpoints, tmp_path, **one, train_start=1, train_count=2)
    trainer.fit()
    files = loras(tmp_path / "out")
    starts = []
    for run_ in script.all_runs(trainer.config):
        trainer.begin(run_)
        starts.append([p.detach().clone() for p in trainer.trained if p.any()])
    assert len(starts[0]) > 0 and not any(map(torch.equal, *starts))
    assert {name.split("_v")[-1].split("/")[0] for name in files} == {"1", "2"}
    theirs = loras(straight / "out")
    first = {name: tensors for name, tensors in files.items() if "_v1/" in name}
    assert_same(first, {name: theirs[name] for name in first})
    for name, tensors in first.items():
        other = files[name.replace("_v1/", "_v2/")]
        assert not any(torch.equal(tensors[n], other[n]) for n in tensors)


def test_gradient_checkpointing_learns_the_same(straight, checkpoints, tmp_path):
    changes = {"datasets": ["smile"], "noise_scales": [3], "gradient_checkpointing": True}
    again(straight, checkpoints, tmp_path, **changes).fit()
    alone, theirs = loras(tmp_path / "out"), loras(straight / "out")
    assert_same(alone, {name: theirs[name] for name in alone}, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", list(script.LOSSES))
def test_every_variant_trains_in_bf16(variant, straight, checkpoints, tmp_path):
    changes = {"python_name": variant, "mixed_precision": "bf16", "gradient_checkpointing": True}
    changes |= {"datasets": ["age"], "noise_scales": [1], "batch_size": 2, "preview": True}
    if variant == "train_image_real":
        changes["image_ids"] = ["7002"]
    trainer = again(straight, checkpoints, tmp_path, **changes)
    trainer.fit()
    names = script.adapters_of(variant)
    files = loras(tmp_path / "out")
    assert len(files) == len(names)
    assert {p.dtype for p in trainer.trained} == {torch.float32}
    for tensors in files.values():
        assert all(t.isfinite().all() for t in tensors.values())
        assert all(t.any() for n, t in tensors.items() if "lora_B" in n)
    assert len(list((tmp_path / "out").rglob("step-000004.png"))) == 1


def test_a_tiny_model_overfits_one_photo(straight, checkpoints, tmp_path):
    """One noise and one sigma: a random model of four blocks learns no more by attention alone."""
    changes = {"python_name": "train_image_real", "image_ids": [7000], "datasets": ["age"]}
    changes |= {"noise_scales": [1], "train_iteration": 60, "save_per_steps": 100, "log_every": 1}
    changes |= {"num_noise_seeds": 1, "start_step": 2, "end_step": 2}
    changes |= {"rank": 32, "alpha": 32.0, "learning_rate": 0.01, "batch_size": 4}
    again(straight, checkpoints, tmp_path, **changes).fit()
    (folder,) = (tmp_path / "out/age").iterdir()
    assert folder.name == "age_7000_vtrain_image_real_base_v1"
    assert (folder / "age_7000_4inf_60epoch.pt").exists()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss_content"] for row in rows]
    assert np.mean(losses[-5:]) < 0.5 * losses[0], losses


# --- stops, checkpoints, resume -------------------------------------------------------------------

STOPPED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_pairedit as script
loss = script.PairEditTrainer.training_loss
def interrupted(self, visits):
    if self.run.dataset == "age" and self.run.noise_scale == 3 and self.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return loss(self, visits)
script.PairEditTrainer.training_loss = interrupted
sys.argv = ["train_pairedit.py", "--config", {config!r}]
script.run_script(script.main)
"""


def test_a_stopped_run_goes_on_bit_for_bit_and_the_later_ones_follow(
    straight, checkpoints, tmp_path, caplog, monkeypatch
):
    """SIGTERM in the third step of the second of four runs."""
    again(straight, checkpoints, tmp_path)
    config = tmp_path / "config.yaml"
    done = run("-c", STOPPED.format(root=str(ROOT), config=str(config)))
    assert "SIGTERM: finishing this step, then saving" in done.stderr
    assert "stopped at step 3; --resume_from_checkpoint latest" in done.stderr
    folders = run_folders(tmp_path, datasets=["age", "smile"], noise_scales=[1, 3])
    steps = [[c.name for c in script.list_checkpoints(folder)] for folder in folders]
    assert steps == [["checkpoint-2", "checkpoint-4"], ["checkpoint-2", "checkpoint-3"], [], []]
    begun = []
    begin = script.PairEditTrainer.begin
    monkeypatch.setattr(
        script.PairEditTrainer, "begin", lambda self, run: (begun.append(run), begin(self, run))
    )
    again(straight, checkpoints, tmp_path, resume_from_checkpoint="latest").fit()
    assert [(r.dataset, r.noise_scale) for r in begun] == [("age", 3), ("smile", 1), ("smile", 3)]
    assert "it is finished (step 4)" in caplog.text
    assert f"resumed from {folders[1] / 'checkpoint-3'} (step 3)" in caplog.text
    assert_same(loras(tmp_path / "out"), loras(straight / "out"))
    for ours in folders:
        theirs = straight / ours.relative_to(tmp_path)
        rows = [json.loads(r) for r in (ours / "metrics.jsonl").read_text().splitlines()]
        expected = [json.loads(r) for r in (theirs / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["step"] == expected[-1]["step"] == 4
        assert len({row["step"] for row in rows}) == len(rows)


@pytest.fixture
def finished(straight, checkpoints, tmp_path):
    """A copy of one finished run of four steps; resume(**changes) goes on with it."""
    one = {"datasets": ["age"], "noise_scales": [3], "resume_from_checkpoint": "latest"}
    folder = run_folders(straight, noise_scales=[3])[0]
    copy = tmp_path / folder.relative_to(straight)
    shutil.copytree(folder, copy)

    def resume(**changes):
        trainer = again(straight, checkpoints, tmp_path, **(one | changes))
        trainer.fit()
        return trainer

    return copy, resume


def test_finished_runs_load_nothing(finished, monkeypatch):
    folder, resume = finished
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    for loader in ("load_flux", "load_vae", "load_text_encoders"):
        monkeypatch.setattr(script, loader, lambda *args: pytest.fail("a model was loaded"))
    resume()
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learning_rate": 0.5}, "learning_rate: was 0.002, is 0.5"),
        ({"cfg_eta": 4.0, "rank": 8}, "rank: was 16, is 8"),
        ({"batch_size": 2}, "batch_size x processes: was 1, is 2"),
        ({"resolution": 96}, "resolution: was 64, is 96"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(changes, says, finished):
    folder, resume = finished
    with pytest.raises(UserError, match="was trained with other settings") as error:
        resume(**changes)
    assert says in str(error.value) and str(folder / "checkpoint-4") in str(error.value)


def test_other_pictures_are_other_settings(finished, straight, checkpoints, tmp_path):
    _, resume = finished
    shutil.copytree(straight / "datasets", tmp_path / "datasets")
    with Image.open(tmp_path / "datasets/age/target/7001.png") as image:
        image.transpose(Image.Transpose.ROTATE_180).save(tmp_path / "datasets/age/target/7001.png")
    with pytest.raises(UserError, match="pictures: was"):
        resume(datasets_folder=str(tmp_path / "datasets"))


@pytest.mark.parametrize("limit", [None, 1])
def test_a_damaged_checkpoint_is_passed_over(limit, finished, straight, caplog):
    folder, resume = finished
    state = folder / "checkpoint-4/training_state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    resume(save_per_steps=1, checkpoints_total_limit=limit)
    assert "checkpoint-4 is damaged; looking for an older one" in caplog.text
    assert f"resumed from {folder / 'checkpoint-2'}" in caplog.text
    names = [c.name for c in script.list_checkpoints(folder)]
    assert names == (["checkpoint-4"] if limit else [f"checkpoint-{n}" for n in (2, 3, 4)])
    assert all(script.valid_checkpoint(c) for c in script.list_checkpoints(folder))
    theirs = {
        n: t for n, t in loras(straight / "out").items() if n.startswith(f"age/{folder.name}")
    }
    ours = {f"age/{folder.name}/{n}": t for n, t in loras(folder).items()}
    assert_same(ours, theirs)


def test_a_new_checkpoint_is_not_pruned_in_favour_of_a_damaged_later_one(finished):
    folder, resume = finished
    (folder / "checkpoint-4").rename(folder / "checkpoint-9")
    (folder / "checkpoint-9/training_state.pt").write_bytes(b"")
    resume(save_per_steps=3, checkpoints_total_limit=1, train_iteration=3)
    kept = [c for c in script.list_checkpoints(folder) if script.valid_checkpoint(c)]
    assert [c.name for c in kept] == ["checkpoint-3"]


def test_a_finished_run_can_be_made_longer(finished, caplog):
    folder, resume = finished
    resume(train_iteration=5, checkpoints_total_limit=1)
    assert [c.name for c in script.list_checkpoints(folder)] == ["checkpoint-5"]
    assert list(folder.glob("*_5epoch.safetensors")) and list(folder.glob("*_4epoch.safetensors"))


def test_without_resume_an_earlier_run_is_set_aside(finished, caplog):
    folder, resume = finished
    resume(resume_from_checkpoint=None, train_iteration=2)
    assert "holds an earlier run" in caplog.text
    assert [c.name for c in script.list_checkpoints(folder)] == ["checkpoint-2"]
    assert len(list((folder / "earlier-1").glob("*epoch*"))) == 8
    assert script.valid_checkpoint(folder / "earlier-1/checkpoint-4")
    (folder / "earlier-1").rename(folder / "earlier-2")  # a user tidied up
    script.set_earlier_aside(folder)
    assert script.valid_checkpoint(folder / "earlier-1/checkpoint-2")


def test_a_loss_that_is_no_number_stops_with_the_pair_and_keeps_the_checkpoint(
    straight, checkpoints, tmp_path
):
    changes = {"datasets": ["age"], "noise_scales": [1], "learning_rate": 1e30}
    trainer = again(straight, checkpoints, tmp_path, **changes, save_per_steps=1)
    with pytest.raises(UserError, match="the loss of step 2 is") as error:
        trainer.fit()
    (visit,) = script.draw_visits(trainer.config, 1, 1, trainer.groups, 1)
    assert f"pairs of this process: {trainer.names[visit.pair]}." in str(error.value)
    assert "Nothing was saved since checkpoint-1" in str(error.value)
    (kept,) = script.list_checkpoints(run_folders(tmp_path)[0])
    assert kept.name == "checkpoint-1" and script.valid_checkpoint(kept)


def test_a_signal_during_the_last_preview_does_not_start_the_next_run(
    straight, checkpoints, tmp_path, monkeypatch
):
    trainer = again(straight, checkpoints, tmp_path, noise_scales=[1], preview=True)
    shown = []

    def stopped(self, run_):
        shown.append(run_.dataset)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(script.PairEditTrainer, "preview", stopped)
    trainer.fit()
    assert shown == ["age"] and len(run_folders(tmp_path)) == 1


def test_weights_that_are_no_numbers_are_not_saved(straight, checkpoints, tmp_path):
    trainer = again(straight, checkpoints, tmp_path, datasets=["age"], noise_scales=[1])
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.load_transformer()
    (run_,) = script.all_runs(trainer.config)[:1]
    trainer.begin(run_)
    trainer.trained[3].data[0] = float("nan")
    with pytest.raises(UserError, match="the weights of step 0 are not finite"):
        trainer.save(run_)
    assert not list(tmp_path.rglob("*epoch*"))


# --- several processes ----------------------------------------------------------------------------

WATCHED = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import train_pairedit as script
fit = script.PairEditTrainer.fit
def watched(self):
    fit(self)
    torch.save([p.detach() for p in self.trained], {folder!r} + "/rank" + os.environ["RANK"])
script.PairEditTrainer.fit = watched
script.run_script(script.main)
"""


@pytest.mark.slow
def test_a_stop_signal_to_one_of_two_processes_saves_and_ends_both(straight, checkpoints, tmp_path):
    """Although no log line is due for long."""
    settings = {"datasets": ["smile"], "noise_scales": [3], "log_every": 10**6}
    settings |= {"train_iteration": 10**6, "save_per_steps": 10**6}
    again(straight, checkpoints, tmp_path, **settings)
    code = STOPPED.replace('"age"', '"smile"').replace("self.step == 2", "RANK1 and self.step == 2")
    code = code.replace("RANK1", 'os.environ["RANK"] == "1"')
    config = str(tmp_path / "config.yaml")
    (tmp_path / "both.py").write_text(code.format(root=str(ROOT), config=config))
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2"]
    run(tmp_path / "both.py", launch=launch, env={"CUDA_VISIBLE_DEVICES": ""}, timeout=60)
    (folder,) = run_folders(tmp_path, datasets=["smile"], noise_scales=[3])
    (saved,) = script.list_checkpoints(folder)
    assert script.valid_checkpoint(saved) and int(saved.name.split("-")[1]) <= 200


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_with_twice_the_batch(straight, checkpoints, tmp_path):
    one = {"datasets": ["smile"], "noise_scales": [3], "num_noise_seeds": None}
    both = tmp_path / "both"
    both.mkdir()
    again(straight, checkpoints, both, **one, cache_dir=str(tmp_path / "cache"))
    (tmp_path / "both.py").write_text(WATCHED.format(root=str(ROOT), folder=str(tmp_path)))
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2"]
    config = ["--config", both / "config.yaml"]
    run(tmp_path / "both.py", *config, launch=launch, env={"CUDA_VISIBLE_DEVICES": ""})
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in "01"]
    assert len(ranks[0]) > 0 and all(map(torch.equal, *ranks))
    single = again(straight, checkpoints, tmp_path / "both", **one, batch_size=2)
    shutil.move(both / "out", tmp_path / "two")
    single.fit()
    assert_same(loras(tmp_path / "two"), loras(both / "out"), rtol=0, atol=1e-5)


# --- cache ----------------------------------------------------------------------------------------


def encoded(trainer):
    """How many entries a start encodes; with none it must load nothing."""
    with pytest.MonkeyPatch.context() as patch:
        count = len([key for key in jobs_of(trainer) if not trainer._intact(key)])
        if not count:
            for loader in ("load_vae", "load_text_encoders"):
                patch.setattr(script, loader, lambda *args: pytest.fail("a model was loaded"))
        assert trainer.cache_embeddings() == count
    return count


def jobs_of(trainer):
    trainer.setup_accelerator()
    trainer.find_data()
    return trainer.cache_jobs()


def test_a_cache_is_built_again_only_where_something_changed(make_slider, tmp_path):
    assert encoded(make_slider()) == 7  # 6 pictures, the empty prompt
    assert encoded(make_slider()) == 0
    picture = tmp_path / "datasets/age/target/7001.png"
    picture.write_bytes(picture.read_bytes() + b"0")
    assert encoded(make_slider()) == 1
    assert encoded(make_slider(resolution=96)) == 6
    assert encoded(make_slider(train_prompt="a person")) == 1
    assert encoded(make_slider(max_sequence_length=24)) == 1
    assert encoded(make_slider(preview=True)) == 1
    assert encoded(make_slider(preview=True, python_name="slider_text")) == 3
    assert encoded(make_slider(python_name="train_image_wocfg", noise_scales=[2], rank=4)) == 0
    assert encoded(make_slider(python_name="train_image_real", image_ids=["7001"])) == 0
    assert encoded(make_slider(mixed_precision="bf16")) == 1  # prompts in the model's own dtype
    assert encoded(make_slider()) == 0


def test_a_changed_encoder_makes_new_entries(make_slider, checkpoints, tmp_path):
    assert encoded(make_slider()) == 7
    model = tmp_path / "flux"
    shutil.copytree(checkpoints["flux"], model)
    settings = {"pretrained_model_name_or_path": str(model)}
    assert encoded(make_slider(**settings)) == 0
    config = json.loads((model / "vae/config.json").read_text())
    (model / "vae/config.json").write_text(json.dumps(config | {"shift_factor": 0.2}))
    assert encoded(make_slider(**settings)) == 6


def test_what_is_trained_on_is_the_picture_the_vae_sees(make_slider):
    trainer = make_slider()
    jobs_of(trainer)
    trainer.cache_embeddings()
    trainer.load_transformer()
    trainer.begin(script.all_runs(trainer.config)[0])
    vae = script.load_vae(trainer.folder, torch.device("cpu"))
    for pair, tokens in zip(trainer.photos(trainer.run), trainer.tokens, strict=True):
        for file, token in zip(pair.files, tokens, strict=True):
            pixels = np.asarray(Image.open(file).convert("RGB"), np.float32) / 127.5 - 1
            x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
            latent = script.encode_pixels(vae, x)
            torch.testing.assert_close(script.pack_tokens(latent)[0], token, rtol=1e-4, atol=1e-5)


def test_cache_embeddings_fills_counts_mends_and_prunes(make_slider, tmp_path, monkeypatch, capsys):
    make_slider()
    monkeypatch.setitem(sys.modules, "train_pairedit", script)  # and back afterwards

    def command(*flags):
        argv = ["cache_embeddings.py", "--script", script.__file__]
        argv += ["--config", str(tmp_path / "config.yaml"), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        cache_embeddings.main()
        return capsys.readouterr().out

    assert "process 0: 7 entries encoded" in command()
    assert "missing: 0 of 7" in command("--stats")
    entry = cache_embeddings.entry_files(tmp_path / "cache")[3]
    entry.write_bytes(entry.read_bytes()[:-8])
    out = command("--verify")
    assert "verified: 1 damaged" in out and "1 entries encoded" in out
    assert "pruned: 0 entries" in command("--prune")
    out = command("--prune", "--stats", "--resolution", "96")
    assert "pruned: 6 entries" in out and "missing: 6 of 7" in out
    (tmp_path / "configs").mkdir()
    (tmp_path / "config.yaml").rename(tmp_path / "configs/mine.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*sys.argv[:3], "--c", "mine", "--stats"])
    cache_embeddings.main()
    assert "missing: 6 of 7" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_encoders_and_transformer_are_never_in_memory_together(make_slider, monkeypatch):
    alive, seen = weakref.WeakSet(), []

    def watch(name):
        original = getattr(script, name)

        def load(*args):
            loaded = original(*args)
            parts = [loaded]
            if name == "load_text_encoders":
                parts = [loaded.text_encoder, loaded.text_encoder_2]
            gc.collect()
            seen.append((name, sorted(type(model).__name__ for model in alive)))
            alive.update(parts)
            return loaded

        monkeypatch.setattr(script, name, load)

    for name in ("load_vae", "load_text_encoders", "load_flux"):
        watch(name)
    make_slider(train_iteration=1).fit()
    assert seen == [("load_vae", []), ("load_text_encoders", []), ("load_flux", [])]


# --- the user's document --------------------------------------------------------------------------


def document(name, folder, checkpoint):
    """A YAML file of the document; only paths, device, resolution and steps are replaced."""
    text = (SEEDS / name).read_text()
    for ours, theirs in (
        (str(checkpoint), "/home/haoguang/model/black-forest-labs/FLUX.1-dev"),
        ("device: cpu", "device: 1"),
        (f"datasets_folder: {folder}/datasets", "datasets_folder: datasets"),
        ("train_iteration: 4", "train_iteration: 500"),
        ("save_per_steps: 2", "save_per_steps: 200"),
    ):
        assert text.count(theirs) == 1, theirs
        text = text.replace(theirs, ours)
    return text


def test_the_documents_training_runs_as_written(checkpoints, tmp_path):
    """`--c=train_image`, and the output path that the document names."""
    concept(tmp_path / "datasets/age")
    concept(tmp_path / "datasets/smile")
    (tmp_path / "configs").mkdir()
    text = document("001_train_image.yaml", tmp_path, checkpoints["flux"])
    (tmp_path / "configs/train_image.yaml").write_text(text)
    hidden = ["--resolution", 64, "--mixed_precision", "no", "--max_sequence_length", 16]
    run(ROOT / "train_pairedit.py", "--c=train_image", *hidden, cwd=tmp_path)
    for dataset in ("age", "smile"):
        folder = tmp_path / f"output/models/image/{dataset}"
        folder /= f"{dataset}_vtrain_image_fm_4.0eta_1.0ns_full_base_v1"
        for step in (2, 4):
            for end in (".pt", "_0.pt", ".safetensors", "_0.safetensors"):
                file = folder / f"{dataset}_4.0eta_1.0ns_28inf_{step}epoch{end}"
                assert file.stat().st_size > 0
        assert (folder / "samples/step-000004.png").exists()
    config = load_config(script.Config, ["--config", str(folder / "config.yaml")])
    assert config.scales == [0, 0.8, 1.0, 1.2] and config.skips == [10]


def test_the_documents_example_path():
    config = script.Config(noise_scales=[3], datasets=["pixel"])
    (run_,) = script.all_runs(config)
    file = script.run_folder(config, run_) / f"{script.lora_stem(config, run_, 500)}.pt"
    line = "output/models/image/pixel/pixel_vtrain_image_4.0eta_3.0ns_full_base_v1/"
    assert str(file) == f"{line}pixel_4.0eta_3.0ns_28inf_500epoch.pt"


def test_the_documents_real_images_each_get_a_lora(checkpoints, tmp_path):
    """The document's real-image file is its other file plus these lines."""
    concept(tmp_path / "datasets/real_person", ("610", "1743", "61907"), (96, 64), ("source",))
    text = document("001_train_image.yaml", tmp_path, checkpoints["flux"])
    text = text.replace("  - age\n  - smile", "  - real_person")
    text = text.replace("python_name: train_image_fm", "python_name: train_image_real")
    (tmp_path / "real.yaml").write_text(text + (SEEDS / "001_train_image_real.yaml").read_text())
    argv = ["--config", str(tmp_path / "real.yaml"), "--output_folder", str(tmp_path / "out")]
    argv += ["--cache_dir", str(tmp_path / "cache"), "--resolution", "64", "--preview", "false"]
    argv += ["--mixed_precision", "no", "--max_sequence_length", "16"]
    trainer = script.PairEditTrainer(load_config(script.Config, argv, script.audit))
    trainer.fit()
    assert [pair.name for pair in trainer.pairs["real_person"]] == ["610", "1743"]
    for name in ("610", "1743"):
        folder = tmp_path / f"out/real_person/real_person_{name}_vtrain_image_real_base_v1"
        tensors = torch.load(folder / f"real_person_{name}_28inf_4epoch.pt", weights_only=True)
        assert tensors["lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight"].any()
        assert not list(folder.glob("*_0.*"))
    assert (trainer.config.semantic_cfg_scale, trainer.grids) == (0.75, [(3, 5)])


def test_the_documents_words_stand_in_our_files_unchanged():
    """`use_trained_lora_path: 0` and the rest are read with the document's own types."""
    config = load_config(script.Config, ["--config", str(SEEDS / "001_train_image.yaml")])
    assert config.device == 1 and config.python_name == "train_image_fm"
    assert config.use_trained_lora_path is False and config.use_random_seed is False
    assert config.trained_lora_path == "output/models/pretrained/elf.pt"
    assert config.prompts_file == ["prompts-person.yaml"] and config.count_gen == 20
    assert config.noise_scales == [1.0] and config.start_seed_gen == 6000
