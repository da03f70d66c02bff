"""Commands in forked children of a process that has imported the libraries: they start at once.

python tests/zygote.py reads one request per line, {"argv", "cwd", "env", "processes", "out", "err",
"timeout"}, and answers with its exit code. Nothing of the project is imported before the fork.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback

LIBRARIES = {
    "torch": ["utils.data", "optim.swa_utils", "distributed", "nn.parallel"],
    "diffusers": [
        "AutoencoderKL",
        "AutoencoderKLQwenImage",
        "FlowMatchEulerDiscreteScheduler",
        "FluxPipeline",
        "FluxTransformer2DModel",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageTransformer2DModel",
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        "optimization",
        "training_utils",
    ],
    "transformers": ["CLIPTextModel", "Qwen2_5_VLForConditionalGeneration", "T5EncoderModel"],
    "peft": ["LoraConfig", "LoKrConfig"],
    "accelerate": ["Accelerator", "utils"],
}


def preload():
    """Import what the scripts import, and compute nothing: a pool of threads would not survive."""
    for library, names in LIBRARIES.items():
        module = importlib.import_module(library)
        for name in names:
            try:
                importlib.import_module(f"{library}.{name}")
            except ImportError:
                getattr(module, name)
    gc.freeze()  # unload() collects garbage: not among what is imported


def become(request, rank, port):
    """Run the script of a request as `python script.py ...` would; never returns."""
    import torch

    os.environ.clear()
    os.environ.update(request["env"])
    importlib.reload(sys.modules["huggingface_hub.constants"])  # which the environment decides
    if request["processes"] > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        values = (rank, rank, request["processes"], request["processes"])
        os.environ.update({name: str(v) for name, v in zip(names, values, strict=True)})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    os.chdir(request["cwd"])
    for stream, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    script = os.path.abspath(request["argv"][0])  # noqa: PTH100
    sys.argv, sys.path[0] = request["argv"], os.path.dirname(script)  # noqa: PTH120
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def serve(request):
    """Fork a child per process of a request; return the exit code of the first that fails, or 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = set()
    for rank in range(request["processes"]):
        if not (child := os.fork()):
            os.setpgid(0, 0)
            become(request, rank, port)
        children.add(child)
    code, end = 0, time.monotonic() + request["timeout"]
    while children:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            children.discard(done)
            code = code or os.waitstatus_to_exitcode(status)
            if code:
                end = min(end, time.monotonic() + 10)  # as a launcher: the others go, too
        elif time.monotonic() > end:
            code = code or 124
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return code


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    preload()
    for line in sys.stdin:
        print(serve(json.loads(line)), file=answers, flush=True)
