"""How much faster a still goes through the video VAE as 2-D convolutions.

    python benchmarks/vae_stills.py [--size_px 256] [--device cuda]

Full-size AutoencoderKLQwenImage with random weights; both ways in turn, one run. Prints the ratio
of the medians and the largest difference of the latents.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusers
import torch

import train_qwen_edit as script


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size_px", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    stock = diffusers.AutoencoderKLQwenImage().eval().to(args.device)
    flat = script.encode_stills_in_2d(copy.deepcopy(stock))
    pixels = torch.rand(1, 3, args.size_px, args.size_px, device=args.device) * 2 - 1
    seconds = {"video (3-D)": [], "still (2-D)": []}
    latents = {}
    for number in range(args.repeats + 1):
        for name, vae in zip(seconds, (stock, flat), strict=True):
            started = time.perf_counter()
            with torch.no_grad():
                latents[name] = vae.encode(pixels[:, :, None]).latent_dist.mode()
            if args.device != "cpu":
                torch.cuda.synchronize()
            seconds[name] += [time.perf_counter() - started] if number else []
    video, still = (statistics.median(times) for times in seconds.values())
    difference = (latents["video (3-D)"] - latents["still (2-D)"]).abs().max()
    print(f"{args.size_px} px on {args.device}, {torch.get_num_threads()} threads")
    print(f"video {video:.2f} s, still {still:.2f} s, ratio {video / still:.1f}")
    print(f"largest difference {difference:.1e} of {latents['video (3-D)'].abs().max():.1f}")


if __name__ == "__main__":
    main()
