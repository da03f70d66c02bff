"""What other trainers of this kind promise and break; each test fails on one of them."""

import numpy as np
import torch
from conftest import copy_pairs, suffix_dataset
from PIL import Image
from qwen import ready

import train_qwen_edit as script


def test_each_of_three_references_changes_the_loss_and_the_validation_picture(
    make_trainer, tmp_path
):
    names, rng = ("coffee0", "hubble0"), np.random.default_rng(0)
    folder = copy_pairs(tmp_path / "data", names)
    for file in (folder / f"{name}_{end}.png" for name in names for end in "RDM"):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(file)
    dataset = suffix_dataset(folder, holdout=["hubble0"])
    dataset["image_configs"] |= {"second": {"suffix": "_D"}, "third": {"suffix": "_M"}}
    items = [{"image": role} for role in ("before", "second", "third")]
    dataset["reference_configs"]["before"] = items
    changes = {"data.dataset_configs": [dataset], "validation.steps": 1}

    def look():
        trainer = ready(make_trainer(**changes, **{"validation.num_inference_steps": 2}))
        with torch.no_grad():
            loss = trainer.training_step(trainer.data.batch([script.Draw(0, 0)])).item()
        [(example, _)] = script.validation_edits(trainer)
        [picture] = script.draw_edits(trainer, [example])
        return loss, picture.tobytes()

    before = look()
    assert look() == before
    for end in "RDM":
        for name in names:
            file = folder / f"{name}_{end}.png"
            Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file)
        after = look()
        assert after[0] != before[0] and after[1] != before[1]
        before = after


def test_a_step_of_mixed_shapes_is_the_mean_of_its_samples(make_trainer, tmp_path):
    """Loss and gradient; shapes, text lengths and numbers of references differ."""
    folder = copy_pairs(tmp_path / "data", ("coffee0", "hubble0", "chelsea0"))
    for end, colour in (("T", "red"), ("R", "blue"), ("D", "green")):
        Image.new("RGB", (120, 60), colour).save(folder / f"coffee0_{end}.png")
    one, both = copy_pairs(tmp_path / "one", ("hubble1",)), suffix_dataset(folder)
    both["image_configs"]["tones"] = {"suffix": "_D"}
    both["reference_configs"]["before"].append({"image": "tones"})
    changes = {"data.dataset_configs": [both, suffix_dataset(one)], "data.batch_size": 4}
    trainer = ready(make_trainer(**changes))
    step = next(iter(trainer.step_plan()))
    assert len(step) >= 3 and sum(map(len, step)) == 4
    found = []
    for groups in (step, [[draw] for draws in step for draw in draws]):
        batches = [trainer.data.batch(draws) for draws in groups]
        losses = [trainer.training_step(b) * script.batch_size(b) / 4 for b in batches]
        sum(losses).backward()
        found.append([sum(losses).detach(), *(p.grad.clone() for p in trainer.trainable())])
        trainer.transformer.zero_grad()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
