"""train_pairedit.py end to end: whole runs, stops, caches, two processes, the user's document."""

import gc
import json
import os
import shutil
import signal
import sys
import weakref
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, concept, run, slider_settings, write_config
from PIL import Image
from safetensors.torch import load_file

import cache_embeddings
import train_pairedit as script
from utils import Checkpoints, UserError, load_config

SEEDS = ROOT / "tests" / "seeds"
SHORT = {"num_inference_steps": 4, "end_step": 3, "skips": [1], "scales": "0,1"}
SEVERAL = {"datasets": ["age", "smile"], "noise_scales": [1, 3], "checkpoints_total_limit": None}


def trainer_of(checkpoint, folder, **changes):
    """Audited as the command does it."""
    file = write_config(folder, slider_settings(checkpoint, folder, **(SHORT | changes)))
    config = load_config(script.Config, ["--config", str(file)], script.audit)
    return script.PairEditTrainer(config)


def loras(folder):
    """{path below folder: tensors} of every LoRA of the last step."""
    files = [f for f in folder.rglob("*_4epoch*.safetensors") if "earlier" not in str(f)]
    return {str(file.relative_to(folder)): load_file(file) for file in files}


def assert_same(ours, theirs, **tolerance):
    """Equal files; of theirs only those that ours has, too."""
    assert ours
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


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def straight(checkpoints, tmp_path_factory):
    """Two data sets at two noise scales, four steps each, without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    concept(folder / "datasets/age")
    concept(folder / "datasets/smile", ("1", "2"), (96, 64))
    trainer_of(checkpoints["flux"], folder, **SEVERAL, preview=True, log_every=1).fit()
    return folder


@pytest.fixture
def again(straight, checkpoints, tmp_path):
    """again(**changes) -> a trainer of the same runs, into tmp_path, on the same cache."""
    places = {"datasets_folder": str(straight / "datasets"), "cache_dir": str(straight / "cache")}

    def make(folder=tmp_path, **changes):
        folder.mkdir(exist_ok=True)
        return trainer_of(checkpoints["flux"], folder, **(SEVERAL | places | changes))

    return make


# --- what a run leaves ----------------------------------------------------------------------------


def test_every_run_leaves_what_the_house_promises(straight):
    folders = run_folders(straight, datasets=["age", "smile"], noise_scales=[1, 3])
    assert [f.name for f in folders] == [
        f"{dataset}_vtrain_image_4.0eta_{beta}ns_full_base_v1"
        for dataset in ("age", "smile")
        for beta in ("1.0", "3.0")
    ]
    ups = []
    for folder in folders:
        dataset, beta = folder.parent.name, "3.0" if "3.0ns" in folder.name else "1.0"
        files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        expected = {"run.json", "config.yaml", "README.md", "metrics.jsonl", "samples/pairs.png"}
        expected |= {"train_pairedit.py", "utils.py", "report.html"}
        for step in (2, 4):
            expected |= {f"samples/step-{step:06d}.png"}
            expected |= {f"checkpoint-{step}/{n}" for n in ("state.json", "training_state.pt")}
            stem = f"{dataset}_4.0eta_{beta}ns_4inf_{step}epoch"
            ends = (".safetensors", "_0.safetensors", ".pt", "_0.pt")
            expected |= {f"{stem}{end}" for end in ends}
        assert files - {".lock", ".writer"} == expected
        assert [row["step"] for row in rows_of(folder)] == [1, 2, 3, 4]
        for row in rows_of(folder):
            assert row["loss"] == pytest.approx(row["loss_content"] + row["loss_semantic"])
            assert np.isfinite(row["loss"]) and row["loss_content"] > 0 and row["lr"] == 0.002
            assert row["seconds_per_step"] > 0 and row["memory_gb"] > 0
        assert json.loads((folder / "run.json").read_text())["config"]["rank"] == 16
        assert f"{dataset}_4.0eta_{beta}ns_4inf_4epoch" in (folder / "README.md").read_text()
        for end in ("", "_0"):
            file = folder / f"{dataset}_4.0eta_{beta}ns_4inf_4epoch{end}.safetensors"
            ups.append(load_file(file)["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"])
    for number, up in enumerate(ups):  # content and semantic, and each run, learn something else
        assert up.any() and not any(torch.equal(up, other) for other in ups[:number])


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


def test_the_preview_is_what_the_pipeline_draws(straight, again, checkpoints, monkeypatch):
    """Scale 1, skip 1 of 4 steps: two steps of the base, two with the LoRA."""
    trainer = again(datasets=["age"], noise_scales=[3], preview=True, train_iteration=5)
    source, drawn = run_folders(straight, noise_scales=[3])[0], []
    shutil.copytree(source, run_folders(trainer.config.output_folder.parent, noise_scales=[3])[0])
    unpack = script.unpack_tokens
    monkeypatch.setattr(
        script, "unpack_tokens", lambda x, grid: (drawn.append(x), unpack(x, grid))[1]
    )
    monkeypatch.setattr(script, "train_step", lambda trainer: pytest.fail("no step is left"))
    trainer.setup_accelerator()
    trainer.find_data()
    (run_,) = script.all_runs(trainer.config)
    trainer.start_run(run_)
    state = torch.load(source / "checkpoint-4/training_state.pt", weights_only=True)
    for parameter, value in zip(trainer.trained, state["adapters"], strict=True):
        parameter.data.copy_(value)
    script.validate(trainer, script.RunLog(trainer.accelerator, source, trainer.config, 4))
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


def test_a_run_alone_is_the_same_as_among_others_and_versions_differ(straight, again, tmp_path):
    trainer = again(datasets=["age"], noise_scales=[3], train_count=2)
    trainer.fit()
    files = loras(tmp_path / "out")
    first = {name: tensors for name, tensors in files.items() if "_v1/" in name}
    assert len(files) == 4 and len(first) == 2
    assert_same(first, loras(straight / "out"))
    for name, tensors in first.items():
        other = files[name.replace("_v1/", "_v2/")]
        assert not any(torch.equal(tensors[n], other[n]) for n in tensors)


def test_gradient_checkpointing_learns_the_same(straight, again, tmp_path):
    again(datasets=["smile"], noise_scales=[3], gradient_checkpointing=True).fit()
    assert_same(loras(tmp_path / "out"), loras(straight / "out"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["full", "xattn", "xattn-strict"])
@pytest.mark.parametrize("objective", list(script.LOSSES))
def test_every_objective_trains_and_saves_with_every_train_method(
    objective, method, again, tmp_path
):
    """Two steps in bf16; with the full method the preview is drawn, too."""
    changes = {"python_name": objective, "train_method": method, "mixed_precision": "bf16"}
    changes |= {"datasets": ["age"], "noise_scales": [1], "batch_size": 2, "train_iteration": 2}
    changes |= {"preview": method == "full", "gradient_checkpointing": method == "full"}
    if objective == "train_image_real":
        changes["image_ids"] = ["7002"]
    trainer = again(**changes)
    trainer.fit()
    files = list((tmp_path / "out").rglob("*_2epoch*.safetensors"))
    assert len(files) == len(script.adapters_of(objective))
    assert {p.dtype for p in trainer.trained} == {torch.float32}
    for file in files:
        tensors = load_file(file)
        assert all(t.isfinite().all() and t.any() for t in tensors.values())
        assert torch.load(file.with_suffix(".pt"), weights_only=True)
    assert len(list((tmp_path / "out").rglob("step-000002.png"))) == (method == "full")


def test_a_tiny_model_overfits_one_photo(again, tmp_path):
    """One noise and one sigma: a random model of four blocks learns no more by attention alone."""
    changes = {"python_name": "train_image_real", "image_ids": [7000], "datasets": ["age"]}
    changes |= {"noise_scales": [1], "train_iteration": 60, "save_per_steps": 100, "log_every": 1}
    changes |= {"num_noise_seeds": 1, "start_step": 2, "end_step": 2}
    changes |= {"rank": 32, "alpha": 32.0, "learning_rate": 0.01, "batch_size": 4}
    again(**changes).fit()
    (folder,) = (tmp_path / "out/age").iterdir()
    assert folder.name == "age_7000_vtrain_image_real_base_v1"
    assert (folder / "age_7000_4inf_60epoch.pt").exists()
    losses = [row["loss_content"] for row in rows_of(folder)]
    assert np.mean(losses[-5:]) < 0.5 * losses[0], losses


# --- stops, checkpoints, resume -------------------------------------------------------------------

STOPPED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_pairedit as script
step = script.train_step
def interrupted(trainer):
    if trainer.run[:3] == {run!r} and trainer.global_step == 2 and {rank!r} in (
        None, os.environ.get("RANK")):
        os.kill(os.getpid(), {signal})
    return step(trainer)
script.train_step = interrupted
sys.argv = ["train_pairedit.py", "--config", {config!r}]
script.utils.run_script(script.main)
"""


def stopped(config, run_, number=signal.SIGTERM, rank=None):
    """A program that gets a signal in the third step of a run."""
    return STOPPED.format(root=str(ROOT), run=run_, signal=int(number), config=config, rank=rank)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_run_goes_on_bit_for_bit_and_the_later_ones_follow(
    number, straight, again, tmp_path, monkeypatch
):
    """A signal in the third step of the second of four runs."""
    again()
    run("-c", stopped(str(tmp_path / "config.yaml"), ("age", 1, 3.0), number))
    folders = run_folders(tmp_path, datasets=["age", "smile"], noise_scales=[1, 3])
    steps = [[c.name for c in Checkpoints(folder).folders()] for folder in folders]
    assert steps == [["checkpoint-2", "checkpoint-4"], ["checkpoint-2", "checkpoint-3"], [], []]
    begun = []
    start_run = script.PairEditTrainer.start_run
    monkeypatch.setattr(
        script.PairEditTrainer, "start_run", lambda self, r: (begun.append(r), start_run(self, r))
    )
    again(resume_from_checkpoint="latest").fit()
    assert [(r.dataset, r.noise_scale) for r in begun] == [("age", 3), ("smile", 1), ("smile", 3)]
    assert len(loras(tmp_path / "out")) == 8
    assert_same(loras(tmp_path / "out"), loras(straight / "out"))
    for folder in folders:
        rows = rows_of(folder)
        assert rows[-1]["step"] == 4 and len({row["step"] for row in rows}) == len(rows)


@pytest.fixture
def finished(straight, again, tmp_path):
    """A copy of one finished run of four steps; resume(**changes) goes on with it."""
    one = {"datasets": ["age"], "noise_scales": [3], "resume_from_checkpoint": "latest"}
    folder = run_folders(straight, noise_scales=[3])[0]
    copy = tmp_path / folder.relative_to(straight)
    shutil.copytree(folder, copy)
    return copy, lambda **changes: again(**(one | changes)).fit()


def test_finished_runs_load_nothing(finished, monkeypatch):
    folder, resume = finished
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    for loader in ("load_flux", "load_vae", "encode_texts"):
        monkeypatch.setattr(script, loader, lambda *args: pytest.fail("a model was loaded"))
    resume()
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_a_checkpoint_of_the_fused_kernel_goes_on_without_a_gpu(straight, again, monkeypatch):
    """AdamW in one kernel, as on a GPU, learns the same."""
    adam, one = torch.optim.AdamW, {"datasets": ["age"], "noise_scales": [3]}

    def fused(*args, **how):
        return adam(*args, **(how | {"fused": True}))

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", fused)
        again(**one).fit()
    [folder] = run_folders(again(**one).config.output_folder.parent, noise_scales=[3])
    whole = loras(folder)
    shutil.rmtree(folder / "checkpoint-4")
    again(**one, resume_from_checkpoint="latest").fit()
    assert_same(loras(folder), whole)
    assert_same(whole, loras(run_folders(straight, noise_scales=[3])[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"learning_rate": 0.5}, "learning_rate: was 0.002, is 0.5"),
        ({"rank": 8}, "rank: was 16, is 8"),
        ({"batch_size": 2}, "batch_size x processes: was 1, is 2"),
        ({"seed": 1}, "seed: was 0, is 1"),
        ({"train_prompt": "a"}, "train_prompt"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(changes, name, finished, monkeypatch):
    folder, resume = finished
    monkeypatch.setattr(script, "encode_texts", lambda *args: pytest.fail("too late"))
    with pytest.raises(UserError) as error:
        resume(**changes)
    assert name in str(error.value) and str(folder / "checkpoint-4") in str(error.value)


def test_other_pictures_are_other_settings_and_other_places_are_not(finished, straight, tmp_path):
    _, resume = finished
    shutil.copytree(straight / "datasets", tmp_path / "elsewhere")
    resume(datasets_folder=str(tmp_path / "elsewhere"), log_every=7)
    picture = tmp_path / "elsewhere/age/target/7001.png"
    with Image.open(picture) as image:
        image.transpose(Image.Transpose.ROTATE_180).save(picture)
    with pytest.raises(UserError, match="pictures"):
        resume(datasets_folder=str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("limit", [None, 1])
def test_a_damaged_checkpoint_is_passed_over(limit, finished, straight):
    folder, resume = finished
    state = folder / "checkpoint-4/training_state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    resume(save_per_steps=1, checkpoints_total_limit=limit)
    names = [c.name for c in Checkpoints(folder).folders()]
    assert names == (["checkpoint-4"] if limit else [f"checkpoint-{n}" for n in (2, 3, 4)])
    assert all(Checkpoints.state(c) for c in Checkpoints(folder).folders())
    ours = {f"age/{folder.name}/{n}": t for n, t in loras(folder).items()}
    assert_same(ours, loras(straight / "out"))


def test_a_finished_run_can_be_made_longer_or_be_set_aside(finished):
    folder, resume = finished
    resume(train_iteration=5, checkpoints_total_limit=1)
    assert [c.name for c in Checkpoints(folder).folders()] == ["checkpoint-5"]
    assert list(folder.glob("*_5epoch.safetensors")) and list(folder.glob("*_4epoch.safetensors"))
    resume(resume_from_checkpoint=None, train_iteration=2)
    assert [c.name for c in Checkpoints(folder).folders()] == ["checkpoint-2"]
    assert len(list((folder / "earlier-1").glob("*epoch*"))) == 12
    assert Checkpoints.state(folder / "earlier-1/checkpoint-5")


def test_one_run_at_a_time_writes_into_a_folder(finished):
    folder, resume = finished
    with Checkpoints(folder).only_run(), pytest.raises(UserError, match="another run"):
        resume(train_iteration=5)
    assert [c.name for c in Checkpoints(folder).folders()] == ["checkpoint-2", "checkpoint-4"]


def test_a_loss_that_is_no_number_stops_with_the_pair_and_keeps_the_checkpoint(again, tmp_path):
    changes = {"datasets": ["age"], "noise_scales": [1], "learning_rate": 1e30}
    trainer = again(**changes, save_per_steps=1)
    with pytest.raises(UserError, match="step 2") as error:
        trainer.fit()
    trainer.global_step = 1
    ((sample,), _) = script.next_batch(trainer)
    assert sample.name in str(error.value)
    (kept,) = Checkpoints(run_folders(tmp_path)[0]).folders()
    assert kept.name == "checkpoint-1" and Checkpoints.state(kept)
    trainer.trained[3].data[0] = float("nan")  # nor are weights saved that are no numbers
    with pytest.raises(UserError, match="not finite"):
        script.save_run(trainer)
    assert len(list(tmp_path.rglob("*epoch.safetensors"))) == 1


def test_a_full_disk_is_explained_and_keeps_what_was_saved(again, tmp_path, monkeypatch):
    trainer = again(datasets=["age"], noise_scales=[1])
    save = script.save_original

    def full(path, *args):
        if "_4epoch" in path.name:
            raise OSError(28, "No space left on device", str(path))
        save(path, *args)

    monkeypatch.setattr(script, "save_original", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    assert [c.name for c in trainer.checkpoints.folders()] == ["checkpoint-2"]
    assert Checkpoints.state(trainer.checkpoints.folders()[0])


def test_a_signal_during_the_last_preview_does_not_start_the_next_run(again, monkeypatch):
    shown = []

    def signalled(trainer, run_log):
        shown.append(trainer.run.dataset)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(script, "validate", signalled)
    again(noise_scales=[1], preview=True, save_per_steps=4).fit()
    assert shown == ["age"]


# --- several processes ----------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_with_twice_the_batch(again, tmp_path):
    """A signal to one of them saves and ends both; then they go on."""
    one = {"datasets": ["smile"], "noise_scales": [3], "num_noise_seeds": None, "log_every": 3}
    again(tmp_path / "two", **one, cache_dir=str(tmp_path / "cache"))
    config = tmp_path / "two/config.yaml"
    code = tmp_path / "both.py"
    code.write_text(stopped(str(config), ("smile", 1, 3.0), rank="1"))
    run(code, processes=2)
    (folder,) = run_folders(tmp_path / "two", datasets=["smile"], noise_scales=[3])
    assert [c.name for c in Checkpoints(folder).folders()] == ["checkpoint-2", "checkpoint-3"]
    resume = ["--resume_from_checkpoint", "latest"]
    run(ROOT / "train_pairedit.py", "--config", config, *resume, processes=2)
    again(tmp_path / "one", **one, batch_size=2).fit()
    ours, theirs = loras(tmp_path / "two/out"), loras(tmp_path / "one/out")
    assert_same(ours, theirs, rtol=0, atol=1e-5)


# --- cache ----------------------------------------------------------------------------------------


def encoded(trainer, monkeypatch):
    """How many entries a start encodes; with none it must load nothing."""
    trainer.setup_accelerator()
    trainer.find_data()
    wanted = {script.utils.entry_path(trainer.cache_dir, key) for key in trainer.cache_jobs()}
    with monkeypatch.context() as patch:
        if all(path.exists() for path in wanted):
            for loader in ("load_vae", "encode_texts"):
                patch.setattr(script, loader, lambda *args: pytest.fail("a model was loaded"))
        return trainer.cache_embeddings()


def test_a_cache_is_built_again_only_where_something_changed(
    make_slider, checkpoints, tmp_path, monkeypatch
):
    def count(**changes):
        return encoded(make_slider(**changes), monkeypatch)

    assert count() == 4 and count() == 0  # 3 pairs, the empty prompt
    picture = tmp_path / "datasets/age/target/7001.png"
    picture.write_bytes(picture.read_bytes() + b"0")
    assert count() == 1
    assert count(resolution=96) == 3
    assert count(train_prompt="a person") == 1
    assert count(max_sequence_length=24) == 1
    assert count(preview=True) == 1
    assert count(preview=True, python_name="slider_text") == 3
    assert count(python_name="train_image_wocfg", noise_scales=[2], rank=4) == 0
    assert count(python_name="train_image_real", image_ids=["7001"]) == 1
    assert count(mixed_precision="bf16") == 1  # prompts in the model's own dtype
    model = tmp_path / "flux"
    shutil.copytree(checkpoints["flux"], model)
    assert count(pretrained_model_name_or_path=str(model)) == 0
    config = json.loads((model / "vae/config.json").read_text())
    (model / "vae/config.json").write_text(json.dumps(config | {"shift_factor": 0.2}))
    assert count(pretrained_model_name_or_path=str(model)) == 3
    assert count() == 0


def test_what_is_trained_on_is_the_picture_the_vae_sees(make_slider):
    trainer = make_slider()
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.cache_embeddings()
    trainer.start_run(script.all_runs(trainer.config)[0])
    vae = script.load_vae(trainer.folder, torch.device("cpu"))
    for sample in trainer.samples:
        for file, tokens in zip(sample.files, trainer.tokens[sample], strict=True):
            pixels = np.asarray(Image.open(file).convert("RGB"), np.float32) / 127.5 - 1
            x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
            latent = script.encode_pixels(vae, x)
            torch.testing.assert_close(script.pack_tokens(latent)[0], tokens, rtol=1e-4, atol=1e-5)


def test_cache_embeddings_fills_counts_mends_and_prunes(make_slider, tmp_path, monkeypatch, capsys):
    make_slider()
    monkeypatch.setitem(sys.modules, "train_pairedit", script)  # and back afterwards

    def command(*flags, config=("--config", str(tmp_path / "config.yaml"))):
        argv = ["cache_embeddings.py", "--script", script.__file__, *config, *flags]
        monkeypatch.setattr(sys, "argv", argv)
        cache_embeddings.main()
        return capsys.readouterr().out

    assert "process 0: 4 entries encoded" in command()
    assert "missing: 0 of 4" in command("--stats")
    entry = cache_embeddings.entry_files(tmp_path / "cache")[3]
    entry.write_bytes(entry.read_bytes()[:-8])
    out = command("--verify")
    assert "verified: 1 damaged" in out and "1 entries encoded" in out
    assert "pruned: 0 entries" in command("--prune")
    out = command("--prune", "--stats", "--resolution", "96")
    assert "pruned: 3 entries" in out and "missing: 3 of 4" in out
    (tmp_path / "configs").mkdir()
    (tmp_path / "config.yaml").rename(tmp_path / "configs/mine.yaml")
    monkeypatch.chdir(tmp_path)
    assert "missing: 3 of 4" in command("--stats", config=("--c", "mine"))


def test_a_damaged_entry_is_built_again_and_models_are_loaded_one_by_one(
    make_slider, tmp_path, monkeypatch
):
    """Never an encoder together with the transformer."""
    alive, seen = weakref.WeakSet(), []

    def watch(name):
        original = getattr(script, name)

        def load(*args):
            gc.collect()
            seen.append((name, sorted(type(model).__name__ for model in alive)))
            loaded = original(*args)
            if name != "encode_texts":  # that one keeps nothing
                alive.add(loaded)
            return loaded

        monkeypatch.setattr(script, name, load)

    for name in ("load_vae", "encode_texts", "load_flux"):
        watch(name)
    encoders = [x for x in gc.get_objects() if type(x).__name__ == "T5EncoderModel"]
    known = {*map(id, encoders)}  # another test's
    make_slider(train_iteration=1).fit()
    assert seen == [("load_vae", []), ("encode_texts", []), ("load_flux", [])]
    found = [x for x in gc.get_objects() if type(x).__name__ == "T5EncoderModel"]
    assert not [x for x in found if id(x) not in known]
    before = {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*.safetensors")}
    for file, data in before.items():
        file.write_bytes(data[:-8])
    make_slider(train_iteration=1).fit()
    assert len(before) == 4 and all(file.read_bytes() == data for file, data in before.items())


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


@pytest.mark.slow
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


def test_the_documents_words_stand_in_our_files_unchanged():
    """Its example path; `device: 1` and the rest are read as they stand."""
    config = load_config(script.Config, ["--config", str(SEEDS / "001_train_image.yaml")])
    assert config.device == "cuda:1" and config.python_name == "train_image_fm"
    assert config.noise_scales == [1.0] and config.start_seed_gen == 6000
    config = script.Config(noise_scales=[3], datasets=["pixel"])
    (run_,) = script.all_runs(config)
    file = script.run_folder(config, run_) / f"{script.lora_stem(config, run_, 500)}.pt"
    folder = Path("output/models/image/pixel/pixel_vtrain_image_4.0eta_3.0ns_full_base_v1")
    assert file == folder / "pixel_4.0eta_3.0ns_28inf_500epoch.pt"


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
    for name in ("610", "1743"):
        folder = tmp_path / f"out/real_person/real_person_{name}_vtrain_image_real_base_v1"
        tensors = torch.load(folder / f"real_person_{name}_28inf_4epoch.pt", weights_only=True)
        assert tensors["lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight"].any()
        assert not list(folder.glob("*_0.*"))
    assert {sample.size for sample in trainer.data["real_person"]} == {(80, 48)}
