"""Few-step LoRAs beside the trained one: schedule, strength, in generate.py and in previews."""

import diffusers
import numpy as np
import pytest
import torch
from conftest import PAIRS, ROOT, run
from PIL import Image
from qwen import ready
from safetensors.torch import load_file, save_file

import train_qwen_edit as script
from utils import UserError

SIGMAS = {4: [1, 0.9, 0.75, 0.5], 8: [1, 0.955, 0.9, 0.833, 0.75, 0.643, 0.5, 0.3]}


def a_lora(file, width, seed):
    """A LoRA of rank 2 on the first block's image attention, in the file `file`."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in ("to_q", "to_v", "to_out.0"):
        name = f"transformer.transformer_blocks.0.attn.{layer}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(width, 2, generator=generator) * 0.3
    save_file(tensors, file)
    return file


def lightning(pipeline):
    """The scheduler of Qwen-Image-Lightning's own example."""
    return diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        pipeline.scheduler.config,
        base_shift=np.log(3),
        max_shift=np.log(3),
        shift_terminal=None,
        time_shift_type="exponential",
        use_dynamic_shifting=True,
    )


@pytest.mark.parametrize("steps", [4, 8])
def test_the_noise_levels_are_those_the_loras_were_made_for(steps, checkpoints):
    kind = diffusers.FlowMatchEulerDiscreteScheduler
    stock = kind.from_pretrained(checkpoints["2511"], subfolder="scheduler")
    scheduler = kind.from_config(stock.config, **script.SCHEDULES["lightning"])
    how = script.SamplingConfig(schedule="lightning", num_inference_steps=steps)
    flavour = script.PUBLISHED["Qwen/Qwen-Image-Edit-2511"]
    for tokens in (16, 4096):
        mu = script.model_mu(scheduler.config, tokens)
        scheduler.set_timesteps(sigmas=how.sigmas(flavour, ""), mu=mu)
        assert scheduler.sigmas[:-1].tolist() == pytest.approx(SIGMAS[steps], abs=6e-4)
    assert how.guidance(flavour) == 1 and script.SamplingConfig().guidance(flavour) == 4


@pytest.mark.parametrize("kind", ["2511", "2.1"])
def test_generate_draws_what_the_pipeline_does_with_both(kind, checkpoints, tmp_path):
    edit, fast = (a_lora(tmp_path / f"{n}.safetensors", 64, n) for n in (1, 2))
    image = PAIRS / "chelsea1_R.png"
    run(
        ROOT / "generate.py",
        *("--pretrained_model_name_or_path", checkpoints[kind], "--image", image, "--seed", 5),
        *("--lora", f"{edit}:0.8", "--fixed_lora", f"{fast}:0.7", "--scales", "0,0.5,1"),
        *("--schedule", "lightning", "--num_inference_steps", 4, "--width", 64, "--height", 64),
        *("--prompt", "make it blue", "--reference_area", 64 * 64, "--dtype", "fp32"),
        *("--output", tmp_path / "made.png"),
    )
    import generate

    folder = checkpoints[kind] / "processor"
    processor = "Qwen3VLProcessor" if kind == "2.1" else "Qwen2VLProcessor"
    processor = script.load_processor(folder, processor)
    how = {"processor": processor, "dtype": torch.float32}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(checkpoints[kind], **how)
    pipeline.scheduler = lightning(pipeline)
    pipeline.load_lora_weights(str(edit), adapter_name="edit")
    pipeline.load_lora_weights(str(fast), adapter_name="fast")
    references = [Image.open(image).convert("RGBA" if kind == "2.1" else "RGB")]
    drawn = []
    for scale in (0, 0.5, 1):
        names, weights = ["fast", "edit"], [0.7, 0.8 * scale]
        pipeline.set_adapters(names[: 1 + (scale > 0)], weights[: 1 + (scale > 0)])
        with generate.reference_sizes(pipeline, 64 * 64, None):
            how = {"num_inference_steps": 4, "width": 64, "height": 64, "true_cfg_scale": 1}
            how["generator"] = torch.Generator().manual_seed(5)
            drawn.append(pipeline(image=references, prompt="make it blue", **how).images[0])
    files = [tmp_path / f"made_scale{scale}.png" for scale in ("0", "0.5", "1")]
    for file, expected in zip(files, drawn, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(expected), file.name)
    assert np.abs(np.asarray(drawn[0], int) - np.asarray(drawn[2], int)).mean() > 1


def test_previews_are_drawn_with_it_and_training_is_not_changed(make_trainer, tmp_path):
    fast = a_lora(tmp_path / "fast.safetensors", 64, 2)
    settings = {"validation.steps": 1, "validation.fixed_lora": f"{fast}:0.7"}
    settings |= {"validation.schedule": "lightning", "validation.num_inference_steps": 4}
    settings |= {"validation.resolution": 64}
    settings["validation.samples"] = [{"prompt": "x", "images": [str(PAIRS / "chelsea1_R.png")]}]
    plain, trainer = (ready(make_trainer(**s)) for s in ({}, settings))
    script.copy_into(trainer.trainable(), plain.trainable())
    names = [n for n, p in trainer.transformer.named_parameters() if p.requires_grad]
    assert names == [n for n, p in plain.transformer.named_parameters() if p.requires_grad]
    [(example, _)] = script.validation_edits(trainer)
    both, base = script.draw_edits(trainer, [example]), script.draw_edits(trainer, [example], False)
    assert names == [n for n, p in trainer.transformer.named_parameters() if p.requires_grad]
    losses = []
    for each in (plain, trainer):
        batch = trainer.data.batch([script.Draw(0, 0)])
        loss = script.compute_loss(each, batch)
        loss.sum().backward()
        gradients = [p.grad for p in each.trainable()]
        losses.append((loss, torch.stack([g.norm() for g in gradients])))
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))

    trainer.load_model()
    parts = ("vae", "tokenizer", "processor", "transformer", "scheduler")
    parts = {name: getattr(trainer, name) for name in parts}
    pipeline = diffusers.QwenImageEditPlusPipeline(text_encoder=trainer.qwen_vl, **parts)
    pipeline.scheduler = lightning(pipeline)
    trainer.transformer.eval()
    for drawn, adapters in ((both, {"default": 1.0, "fixed": 0.7}), (base, {"fixed": 0.7})):
        trainer.transformer.enable_adapters()
        trainer.transformer.set_adapters([*adapters], [*adapters.values()])
        latents = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(42))
        embeds = [trainer.encode(job) for job in script.jobs_of(example)["prompt_embed"]]
        control = trainer.encode(script.jobs_of(example)["control_latent"][0])[None]
        pipeline.scheduler.set_timesteps(
            sigmas=[1, 0.75, 0.5, 0.25], mu=script.model_mu(pipeline.scheduler.config, 16)
        )
        for t in pipeline.scheduler.timesteps:
            batch = {"prompt_embed": embeds[0][None], "control_latent": [control]}
            with torch.no_grad():
                velocity = script.predict_velocity(
                    trainer.transformer, latents, t.expand(1) / 1000, batch
                )
            latents = pipeline.scheduler.step(velocity, t, latents, return_dict=False)[0]
        expected = trainer.decode_vae_latent(latents)[0]
        np.testing.assert_array_equal(np.asarray(drawn[0]), expected)


@pytest.mark.parametrize(
    ("end", "said"), [(":0", "scale 0"), (":1.2.3", "1.2.3"), ("x", "no file")]
)
def test_a_fixed_lora_that_means_nothing_is_named_before_training(
    end, said, make_trainer, tmp_path
):
    file = a_lora(tmp_path / "fast.safetensors", 64, 2)
    trainer = make_trainer(**{"validation.fixed_lora": f"{file}{end}"})
    trainer.setup_accelerator()
    with pytest.raises(UserError, match=f"fixed_lora .*{said}"):
        trainer.preflight()


def test_a_fixed_lora_of_another_trainer_has_its_strength(make_trainer, tmp_path):
    """Lightning's own names: no prefix, alpha beside the factors (here half of the rank)."""
    ours, layers = a_lora(tmp_path / "fast.safetensors", 64, 2), {}
    for name, tensor in load_file(ours).items():
        layer = name.removeprefix("transformer.").rpartition(".lora_")[0]
        layers[f"{layer}.lora_{'down' if '.lora_A.' in name else 'up'}.weight"] = tensor
        layers[f"{layer}.alpha"] = torch.tensor(1.0)
    save_file(layers, tmp_path / "theirs.safetensors")
    changes = []
    for file in (ours, tmp_path / "theirs.safetensors"):
        trainer = make_trainer(**{"validation.fixed_lora": str(file)})
        trainer.set_lora()
        layer = trainer.transformer.transformer_blocks[0].attn.to_q
        changes.append(layer.get_delta_weight("fixed"))
    torch.testing.assert_close(changes[0] / 2, changes[1])
    assert changes[0].abs().max() > 0.1


def test_a_fixed_lora_of_another_model_is_named_before_training(make_trainer, tmp_path):
    names = {"transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight": torch.ones(2, 4)}
    save_file(names, tmp_path / "flux.safetensors")
    trainer = make_trainer(**{"validation.fixed_lora": str(tmp_path / "flux.safetensors")})
    trainer.setup_accelerator()
    with pytest.raises(UserError, match=r"fixed_lora .*flux.*no part of a LoRA"):
        trainer.preflight()
