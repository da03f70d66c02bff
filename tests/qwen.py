"""What the tests of train_qwen_edit.py share."""

import functools
import json

import torch
from conftest import with_lora_noise
from safetensors.torch import load_file

import train_qwen_edit as script


def a_batch(n=2, k=1, text=6, seed=0):
    """A cached batch of n samples with k references, its noise and noise levels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "pixel_latent": normal(n, 16, 1, 8, 8),
        "control_latent": [normal(n, 16, 1, 8, 8) for _ in range(k)],
        "prompt_embed": normal(n, text, 64),
        "noise": normal(n, 16, 1, 8, 8),
        "sigma": torch.tensor([0.3, 0.7, 0.5][:n]),
    }


def ready(trainer):
    """The trainer with its data found, its cache filled and an adapter that does something."""
    trainer.setup_accelerator()
    trainer.find_data()
    if trainer.use_cache:
        trainer.cache_embeddings()
    trainer.set_lora()
    with_lora_noise(trainer.transformer)
    return trainer


def curve(folder, name):
    """{step: value} of a figure in metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


def assert_same(ours, theirs, atol=0.0):
    """The tensors, to the bit or nearly."""
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for name, tensor in ours.items():
        why = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=atol, msg=why)


def assert_same_files(ours, theirs, atol=0.0, names=(script.LORA_FILE, script.EMA_FILE)):
    """The LoRA, and its average, in two output folders; both have learned something."""
    for name in names:
        first, second = load_file(ours / name), load_file(theirs / name)
        assert any(tensor.abs().max() > 1e-3 for key, tensor in first.items() if "lora_B" in key)
        assert_same(first, second, atol)
