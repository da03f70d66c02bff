"""experiments/: each patch is small, applies to its script as it is, trains, and its idea acts."""

import json
import re
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import PAIRS, ROOT, concept, run, slider_settings, small_config, write_config
from safetensors.torch import load_file

from utils import load_config, load_script

PATCHES = sorted((ROOT / "experiments").glob("*.patch"))
TWO_STEPS = {  # the flags that end a run of each script after two steps
    "train_qwen_edit.py": ["--train.max_train_steps=2"],
    "train_pairedit.py": ["--train_iteration=2"],
    "train_dreambooth_pairs.py": ["--max_train_steps=2"],
}


def header(patch):
    """{"script": ..., "try": ..., "what": ...} of the three lines that a patch begins with."""
    lines = patch.read_text().splitlines()[:4]
    assert all(line.startswith("# ") for line in lines[:3]) and lines[3].startswith("--- ")
    (first, script), (second, flags), _ = (line[2:].partition(": ")[::2] for line in lines[:3])
    assert (first, second) == ("script", "try")
    return {"script": script, "try": flags, "what": lines[2][2:]}


def settings(name, script, checkpoints, folder):
    """A quick run of a script, as a file for --config."""
    if script == "train_dreambooth_pairs.py":
        concept(folder / "data", stages=("before", "after"))
        sides = {f"{side}_data_dir": str(folder / "data" / side) for side in ("before", "after")}
        places = {"output_dir": str(folder / "out"), "cache_dir": str(folder / "cache")}
        base = {"pretrained_model_name_or_path": str(checkpoints["sd"]), "resolution": 64}
        return write_config(folder, {**base, **sides, **places, "use_image_pairs": True})
    if script == "train_pairedit.py":
        concept(folder / "datasets/age")
        return write_config(folder, slider_settings(checkpoints["flux"], folder))
    changes = {}
    if name == "loss_weight_column":
        rows = [
            {"target": f"{stem}_T.png", "references": [f"{stem}_R.png"], "prompt": "edit", **more}
            for stem, more in (("coffee0", {"loss_weight": 3}), ("hubble0", {}))
        ]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        dataset = {"train_data_dir": str(PAIRS), "resolution": 64}
        changes["data.dataset_configs"] = [dataset]
    return write_config(folder, small_config(checkpoints["2511"], folder, **changes))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_a_patch_is_small_applies_and_trains(patch, checkpoints, tmp_path, monkeypatch):
    """On a copy with only utils.py beside it, under a name of its own."""
    about = header(patch)
    script, fork = about["script"], tmp_path / f"{patch.stem}.py"
    changed = [line for line in patch.read_text().splitlines() if line[:1] in ("+", "-")]
    assert 0 < len(changed) - 2 <= 120  # +++ and --- name the file
    shutil.copy(ROOT / "utils.py", tmp_path)
    subprocess.run(["git", "apply", "--check", str(patch)], cwd=ROOT, check=True)
    subprocess.run(["patch", "-o", str(fork), str(ROOT / script), str(patch)], check=True)
    flags = ["--config", str(settings(patch.stem, script, checkpoints, tmp_path))]
    flags += shlex.split(about["try"])
    if "table" in about["try"]:  # another file is needed, and named
        said = run(fork, *flags, check=False, cwd=tmp_path).stderr
        assert f"no script {tmp_path}/tools/pair_rows.py" in said
        (tmp_path / "tools").mkdir()
        shutil.copy(ROOT / "tools/pair_rows.py", tmp_path / "tools")
    run(fork, *flags, *TWO_STEPS[script], cwd=tmp_path)
    files = [f for f in (tmp_path / "out").rglob("*.safetensors") if "checkpoint-" not in str(f)]
    assert any(tensor.abs().max() > 0 for file in files for tensor in load_file(file).values())
    monkeypatch.chdir(tmp_path)
    CHECKS[patch.stem](load_script(fork), fork, flags)


def trainer_of(script, flags):
    """A trainer whose cache the run has filled, with its adapter as it starts."""
    trainer = script.QwenImageEditTrainer(load_config(script.Config, flags, script.audit))
    trainer.setup_accelerator()
    trainer.find_data()
    trainer.set_lora()
    return trainer


def logged(fork):
    """Names and last values of a run's figures."""
    [file] = (fork.parent / "out").rglob("metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {name: value for line in lines for name, value in line.items()}


def check_l1_bands(script, fork, flags):
    """A constant error is all in the lowest band, a checkerboard all in the highest."""
    low = torch.ones(2, 16, 1, 8, 12)
    high = low * (-1.0) ** (torch.arange(8)[:, None] + torch.arange(12))
    for error, weights, expected in (
        (torch.randn(low.shape), [1.0], None),
        (low, [1.0, 10.0, 100.0], 1.0),
        (high, [1.0, 10.0, 100.0], 100.0),
    ):
        loss = script.LossConfig(loss_type="l1_bands", band_weights=weights)
        found = script.l1_bands(error, torch.zeros_like(error), loss)
        wanted = error.abs() if expected is None else torch.full_like(error, expected)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def check_both_ways(script, fork, flags):
    """The way back is the way forth, turned round, from the other picture."""
    draw = torch.Generator().manual_seed(0)
    before, after, noise = (torch.randn(1, 4, 64, generator=draw) for _ in range(3))
    batch = script.PairBatch(before, after, noise, torch.full((1, 1, 1), 0.5), 1.0, 4.0)
    *_, forth, back = script.LOSSES["train_image_both_ways"](batch)
    torch.testing.assert_close(forth.target - noise, noise - back.target)
    torch.testing.assert_close(forth.noisy - back.noisy, before - after)
    assert (forth.active[-1].scale, back.active[-1].scale) == (1.0, -1.0)
    assert script.adapters_of("train_image_both_ways") == ["content", "semantic"]
    assert {"loss_forth", "loss_back"} <= logged(fork).keys()


def check_pissa(script, fork, flags):
    """Starts as the base model, with its principal part trained; its file is a LoRA of it."""
    import diffusers

    trainer = trainer_of(script, flags)
    folder = trainer.checkpoint("transformer") / "transformer"
    base = diffusers.QwenImageTransformer2DModel.from_pretrained(folder)
    batch = trainer.to_device(trainer.data.batch([script.Draw(0, 0)]))

    @torch.no_grad()
    def velocity(model):
        return script.predict_velocity(model, batch["noise"], batch["sigma"], batch)

    torch.testing.assert_close(velocity(trainer.transformer), velocity(base), atol=1e-5, rtol=1e-4)
    name = "transformer_blocks.0.attn.to_q"
    layer, whole = trainer.transformer.get_submodule(name), base.get_submodule(name).weight
    u, s, v = torch.linalg.svd(whole.detach(), full_matrices=False)
    part = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(part.detach(), (u[:, :4] * s[:4]) @ v[:4], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.base_layer.weight + part, whole, atol=1e-5, rtol=1e-4)
    for parameter in trainer.trainable():
        parameter.data += 0.1 * torch.randn_like(parameter)
    trained = velocity(trainer.transformer)
    assert (trained - velocity(base)).abs().max() > 1e-2
    file = trainer.save_lora(fork.parent / "moved.safetensors")
    kind = diffusers.QwenImageEditPlusPipeline  # what a loader does, from a base as it was
    tensors, told = kind.lora_state_dict(str(file), return_lora_metadata=True)
    base.load_lora_adapter(tensors, metadata=told)
    torch.testing.assert_close(velocity(base), trained, atol=1e-4, rtol=1e-3)
    trainer.load_lora(file)
    torch.testing.assert_close(velocity(trainer.transformer), trained, atol=1e-4, rtol=1e-3)


def check_weight_column(script, fork, flags):
    """A row's number reaches the loss of its sample; a row without one counts 1."""
    trainer = trainer_of(script, flags)
    batch = trainer.data.batch([script.Draw(0, number) for number in (0, 1)])
    assert dict(zip(batch["names"], batch["loss_weight"].tolist(), strict=True)) == {
        "coffee0_T": 3.0,
        "hubble0_T": 1.0,
    }
    table = fork.parent / "pairs.jsonl"
    table.write_text(table.read_text().replace("3}", "-3}"))
    assert run(fork, *flags, check=False, cwd=fork.parent).returncode == 2


def check_learned_density(script, fork, flags):
    """Density as the mean losses, which a resumed run has, too."""
    density = script.LearnedDensity(0.5, bins=2)
    density.losses = torch.tensor([1.0, 3.0])
    bent = density.bend(torch.tensor([0.125, 0.25, 0.625]))
    torch.testing.assert_close(bent, torch.tensor([0.25, 0.5, 0.75]))
    density.add(torch.tensor([0.2, 0.3]), torch.tensor([2.0, 4.0]))
    density.update(SimpleNamespace(reduce=lambda tensor, how: tensor))
    assert density.losses.tolist() == [2.0, 3.0]
    out = fork.parent / "out"
    saved = torch.load(out / "checkpoint-2/training_state.pt", weights_only=True)["density"]
    assert len(saved) == 20 and 1 <= (saved != 1).sum() <= 4
    more = [*flags, "--train.max_train_steps=4"]
    run(fork, *more, "--train.resume_from_checkpoint=latest", cwd=fork.parent)
    run(fork, *more, "--logging.output_dir=straight", cwd=fork.parent)
    name = "pytorch_lora_weights.safetensors"
    resumed, straight = (load_file(place / name) for place in (out, fork.parent / "straight"))
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


def check_rollout(script, fork, flags):
    """With a model that knows the way the rollout stays on it; else it leaves it."""
    trainer = trainer_of(script, flags)
    batch = trainer.to_device(trainer.data.batch([script.Draw(0, 0)]))
    x0, noise, sigma = batch["pixel_latent"], batch["noise"], torch.tensor([0.5])
    wanted = script.add_noise(x0, noise, sigma)
    assert (script.roll_out(trainer, batch, sigma) - wanted).abs().max() > 1e-3
    losses = [script.compute_loss(trainer, batch | {"rollout_chance": [c]}) for c in (0.0, 1.0)]
    del batch["rollout_chance"]
    assert losses[0] != losses[1] == script.compute_loss(trainer, batch)  # 1.0: not rolled out
    script.predict_velocity = lambda *args: noise - x0
    torch.testing.assert_close(script.roll_out(trainer, batch, sigma), wanted)


def check_copier(script, fork, flags):
    """First the copier learns the before, then, frozen, it lies under the change."""
    x = torch.zeros(1, 4, 8, 8)
    first, then = (script.copier(script.Noised(x, x, x, x, x, None, p)) for p in (0.0, 0.5))
    assert first[0].active == (script.Active("copied"),)
    assert [(a.adapter, a.frozen) for a in then[0].active] == [("copied", True), ("change", False)]


CHECKS = {
    "dreambooth_copier": check_copier,
    "l1_bands": check_l1_bands,
    "learned_density": check_learned_density,
    "loss_weight_column": check_weight_column,
    "pairedit_both_ways": check_both_ways,
    "pissa": check_pissa,
    "rollout": check_rollout,
}


def test_the_table_lists_every_patch_with_its_words():
    rows = re.findall(
        r"\| `(\w+)\.patch` \| `([\w.]+)` \| `(.*?)` \| (.*?) \| (\d+) \|",
        (ROOT / "experiments/README.md").read_text(),
    )
    wanted = []
    for patch in PATCHES:
        about, text = header(patch), patch.read_text().splitlines()
        changed = sum(line[:1] in ("+", "-") for line in text) - 2
        wanted.append((patch.stem, about["script"], about["try"], about["what"], str(changed)))
    assert rows == wanted
