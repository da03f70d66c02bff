"""Size, time and peak memory of loading the transformer in each precision.

    python benchmarks/load_quantized.py [--device cuda] [--full]

Random weights are written block by block into a temporary folder: 12 blocks of a third of the true
width, or with --full the true 20 billion parameters (41 GB of disk). Each precision is loaded in a
process of its own. Memory is what it has beyond its imports (and on CUDA the peak of the GPU), all
as ratios to the size of the bf16 weights; a block of them is given for comparison.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from safetensors.torch import save_file

import train_qwen_edit as script

PRECISIONS = ["no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb"]
SMALL = {"num_layers": 12, "num_attention_heads": 8, "joint_attention_dim": 256}
FULL = {"num_layers": 60, "num_attention_heads": 24, "joint_attention_dim": 3584}


def write_random_transformer(folder, settings):
    """transformer/ with a shard per block; one block at a time is in memory. Returns its bytes."""
    settings = {"in_channels": 64, "out_channels": 16, "zero_cond_t": True, **settings}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    shards = {}
    for name, tensor in script.empty_transformer(settings).state_dict().items():
        block = name.split(".")[1] if name.startswith("transformer_blocks.") else "other"
        shards.setdefault(f"diffusion_pytorch_model-{block}.safetensors", {})[name] = tensor.shape
    sizes = {}
    for file, shapes in shards.items():
        tensors = {n: torch.randn(s, dtype=torch.bfloat16) * 0.02 for n, s in shapes.items()}
        save_file(tensors, folder / file)
        sizes[file] = sum(t.numel() * 2 for t in tensors.values())
    return sum(sizes.values()), sizes["diffusion_pytorch_model-0.safetensors"]


def resident():
    """Memory of this process, bytes: VmRSS, that is its own pages and those of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def bytes_of(model):
    """What the weights take, quantised ones as they are stored."""
    total = []
    for tensor in (*model.parameters(), *model.buffers()):
        script.map_tensor(tensor, lambda t: total.append(t.numel() * t.element_size()) or t)
    return sum(total)


def measure(folder, precision, device):
    """Load once in this process -> seconds, bytes of the model, peaks beyond the start."""
    device = torch.device(device)
    with torch.no_grad():  # what the libraries import or allocate when first used is no weights
        block = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 64, device=device)})
        if precision != "no_change":
            script.quantize_block(block.to(torch.bfloat16), precision)
        del block
    gc.collect()
    before, peak, done = resident(), [0], threading.Event()

    def watch():
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    model = script.load_transformer(Path(folder), torch.bfloat16, precision, [device], 0)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"s": seconds, "size": bytes_of(model), "cpu": max(peak[0] - before, 0), "gpu": gpu}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--precision", nargs="*", default=PRECISIONS)
    parser.add_argument("--measure", help="(used by the script itself)")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.precision[0], args.device)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "transformer"
        whole, block = write_random_transformer(folder, FULL if args.full else SMALL)
        print(f"bf16 weights {whole / 2**20:.0f} MiB, one block {block / whole:.3f} of them")
        print("precision     size  seconds  CPU peak  GPU peak")
        for precision in args.precision:
            command = [sys.executable, __file__, "--precision", precision]
            command += ["--device", args.device, "--measure", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            now = json.loads(done.stdout.splitlines()[-1])
            size, cpu, gpu = (now[name] / whole for name in ("size", "cpu", "gpu"))
            print(f"{precision:12} {size:5.3f} {now['s']:8.1f} {cpu:9.3f} {gpu:9.3f}", flush=True)


if __name__ == "__main__":
    main()
