"""Every command in README and docs runs; settings pages, names and links are true."""

import ast
import functools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny
from conftest import FSDP, run

import train_dreambooth_pairs
import train_pairedit
import train_qwen_edit
from utils import UserError, load_config, load_script, load_tool, settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PAGES.append(ROOT / "experiments/README.md")
CHINESE = [page for page in PAGES if page.name.endswith(".zh.md")]


def commands():
    """(page, command) of every bash block; a block is one command per line.

    Commands of Chinese pages are those of the English ones, which another test sees to.
    """
    for page in (page for page in PAGES if page not in CHINESE):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip():
                    yield page.name, line.strip()


# the demo and the tests are README's first two commands: .ci/run runs them as they stand
WHOLE = ("demo.py", "-m pytest", "--machine_rank")  # that: test_several.py


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, checkpoints):
    """A copy of the project in which the documents' commands run on tiny models."""
    place = tmp_path_factory.mktemp("docs")
    for name in ("data", "configs", "tools", "tests/seeds", "experiments"):
        shutil.copytree(ROOT / name, place / name)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, place)
    shutil.copytree(checkpoints["2511"], place / "demo" / "qwen_edit_base")
    for name in ("flux_slider_base", "slider_pairs", "sd_pairs_base", "hair_pairs"):
        shutil.copytree(ROOT / "demo" / name, place / "demo" / name)
    for name in ("age", "smile"):
        tiny.save_sliders(place / "demo/flux_slider_base", place / name)
        shutil.copytree(ROOT / "demo/slider_pairs/age", place / "datasets" / name)
    tiny.save_sd_lora(checkpoints["sd"], place / "change.safetensors")
    patch = "patch -o my_experiment.py train_qwen_edit.py experiments/l1_bands.patch"
    subprocess.run(shlex.split(patch), cwd=place, check=True)
    with Image.open(place / "data/photo_pairs/astronaut0_R.png") as photo:
        Image.new("L", photo.size, 255).save(place / "mask.png")
    photos = place / "data" / "my_pairs"
    for name in ("before", "after"):
        (photos / name).mkdir(parents=True)
    for end, file in (("R", "before/a.png"), ("T", "after/a.png")):
        shutil.copy(place / f"data/photo_pairs/coffee0_{end}.png", photos / file)
    shutil.copy(place / "data/photo_pairs/coffee0_T.txt", photos / "after/a.txt")
    for name in ("coffee0", "hubble0"):  # the results that evaluate.md compares
        for k, (end, model) in enumerate((("R", "base"), ("T", "lora"))):
            (place / "outputs" / model).mkdir(parents=True, exist_ok=True)
            (place / "outputs" / "edits").mkdir(exist_ok=True)
            picture = place / f"data/photo_pairs/{name}_{end}.png"
            about = {"name": name, "run": "", "scale": k, "seed": 0, "prompt": "a photo"}
            chunk = PngInfo()
            chunk.add_itxt("image_edit", json.dumps(about))
            with Image.open(picture) as image:
                image.save(place / f"outputs/edits/{name}_scale{k}.png", pnginfo=chunk)
            shutil.copy(picture, place / f"outputs/{model}/{name}.png")
    train = "train_qwen_edit.py --config configs/demo_qwen_edit.yaml"
    quick = " --train.max_train_steps 2 --validation.steps null"
    run(*shlex.split(train + quick), cwd=place)
    shutil.copy(
        place / "outputs/demo/pytorch_lora_weights.safetensors", place / "lightning.safetensors"
    )
    train = f"train_pairedit.py --c demo_pairedit --preview false {FEW_STEPS}"
    run(*shlex.split(train), cwd=place)
    return place


FEW_STEPS = "--train_iteration 2"


def environment():
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}


def with_tiny_models(command, checkpoint, folder):
    """A command with the demo's base and LoRA, of Stable Diffusion with a tiny one, few steps."""
    if command.startswith("python generate.py"):
        command = command.replace("Qwen/Qwen-Image-Edit-2511", "demo/qwen_edit_base")
        command = command.replace("outputs/my_edit/", "outputs/demo/").replace("a.jpg", "a.png")
    command = command.replace("lora_ckpt/image_pairs/pytorch_lora_weights", "change")
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    if "generate.py" in command and base in command:
        command += " --num_inference_steps 5"
    if "interpolate_sd.py" in command:
        command += " --resolution 64 --fit_steps 2 --num_inference_steps 5"
    if "train_dreambooth_pairs.py" in command and "--help" not in command:
        command += f" --resolution 64 --max_train_steps 2 --calibrate false --output_dir {folder}"
    return command.replace(base, str(checkpoint))


SERVES = "tools/serve.py"


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({text for _, text in commands() if SERVES in text}))
def test_a_command_that_serves_ends_when_it_is_told_to(command, workplace):
    with socket.create_server(("127.0.0.1", 0)) as free:
        words = [sys.executable, *shlex.split(command)[1:], "--port", str(free.getsockname()[1])]
    how = {"stdout": subprocess.PIPE, "cwd": workplace, "env": environment()}
    with subprocess.Popen(words, **how) as server:
        lines = iter(server.stdout.readline, b"")
        address = next(line.split()[1].decode() for line in lines if line.startswith(b"page: "))
        with urllib.request.urlopen(address) as answer:
            assert b"<html" in answer.read()
        server.terminate()
    assert server.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), sorted({c for c in commands() if SERVES not in c[1]}))
def test_every_command_runs(page, command, workplace, checkpoints, tmp_path):
    if any(part in command for part in WHOLE):
        names = [w for w in shlex.split(command) if w.endswith((".py", ".txt"))]
        assert all((ROOT / name).exists() for name in names)
        return
    if command.startswith(("git clone", "python -m venv", "pip install", "cp ")):
        names = [w for w in shlex.split(command) if w.endswith((".txt", ".py", ".yaml"))]
        assert all((ROOT / name).exists() for name in names[:1]), command
        return
    if command.startswith("patch "):
        subprocess.run(shlex.split(command), cwd=workplace, check=True, capture_output=True)
        return
    qwen = "train_qwen_edit.py" in command or "my_experiment.py" in command
    if qwen and "--help" not in command:
        command += " --train.max_train_steps 2 --validation.steps null"
        if "resume" not in command and "--print_config" not in command:
            command += f" --logging.output_dir {tmp_path}"
    command = with_tiny_models(command, checkpoints["sd"], tmp_path)
    if "demo_pairedit" in command:
        command = re.sub(r" --train_iteration \d+", "", command) + f" {FEW_STEPS} --count_gen 1"
    if "train_pairedit.py" in command and not {"--help", "--plan"} & set(command.split()):
        command += " --preview false"
        if "resume" not in command:
            command += f" --output_folder {tmp_path}"
    if "configs/qwen_edit_pairs.yaml" in command:
        command += " --model.pretrained_model_name_or_path demo/qwen_edit_base"
        command += " --data.dataset_configs.0.resolution 64 --cache.cache_dir cache/pairs"
        command += " --data.reference_area target"  # 1 MP takes ten seconds here
    if "--input_dir" in command:  # 39 pictures: two are enough to see it run
        few = workplace / "data" / "few"
        few.mkdir(exist_ok=True)
        for name in ("coffee0_R.png", "hubble0_R.png"):
            shutil.copy(workplace / "data/photo_pairs" / name, few)
        command = command.replace("--input_dir data/photo_pairs", "--input_dir data/few")
    words = shlex.split(command)
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    several = bool({"--num_processes", "--config_file"} & set(words[:start]))
    how = {"processes": 2 if several else 1, "env": FSDP if "fsdp2.yaml" in command else {}}
    done = run(*words[start:], cwd=workplace, check=False, **how)
    assert done.returncode == 0, f"{page}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("script", load_tool("settings").PAGES)
def test_settings_pages_are_the_scripts(script):
    """After a change: python tools/settings.py docs."""
    tool = load_tool("settings")
    assert tool.page_file(script).read_text() == tool.page(script)
    for name in ("Annotated", "NoneType", "FieldInfo", "typing."):
        assert name not in tool.page(script)


@pytest.mark.parametrize("script", load_tool("settings").FIRST)
def test_help_begins_with_ten_settings_at_most(script):
    tool = load_tool("settings")
    place = next(place for place in tool.PAGES if Path(place).name == script)
    cls = getattr(load_script(ROOT / place), tool.PAGES[place][1].split()[0])
    shown = [line for line in tool.first(cls, script) if line.startswith("  --")]
    assert 0 < len(shown) <= 10 and len(tool.help_text(cls, "").splitlines()) < 60


@functools.cache
def functions():
    known = set()
    for file in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")):
        tree = ast.parse(file.read_text())
        known |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return known


@functools.cache
def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def headings(page):
    return re.findall(r"^(#+) (.+)$", prose(page), re.MULTILINE)


def anchors(page):
    """What GitHub makes of the headings of a page."""
    plain = [re.sub(r"[^\w\- ]", "", text.lower()) for _, text in headings(page)]
    return {text.replace(" ", "-") for text in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_function_file_and_anchor_a_page_names_exists(page):
    named = set(re.findall(r"`(\w+)\(\)`", page.read_text()))
    assert named <= functions(), f"{page.name} names {sorted(named - functions())}"
    for file, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", prose(page)):
        place = page.parent / file if file else page
        assert place.exists(), f"{page.name} links {file}"
        assert not anchor or anchor in anchors(place), f"{page.name} links {file}#{anchor}"
    known = {"docs/settings_*.md", "scripts/x.py"}
    for file in re.findall(
        r"`((?:tools|docs|configs|experiments|tests|benchmarks|demo)/[\w./*]+)`", prose(page)
    ):
        assert file in known or [*ROOT.glob(file)], f"{page.name} names {file}"


@functools.cache
def known_settings():
    """Every dotted setting, without its stars, every section, and every flag in the code."""
    tool, found = load_tool("settings"), set()
    for script, (_, names) in tool.PAGES.items():
        for name in names.split():
            for path, _ in settings(getattr(load_script(ROOT / script), name)):
                parts = [part for part in path.split(".") if part != "*"]
                found |= {".".join(parts[a:b]) for a in range(len(parts)) for b in range(99)}
    for file in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")):
        found |= set(re.findall(r"(?<=--)\w+", file.read_text()))
    return found


@pytest.mark.parametrize("page", PAGES[:-1], ids=lambda p: p.name)
def test_every_setting_a_page_names_exists(page):
    """Dotted ones of train_qwen_edit.py, and flags; pages on other programs name theirs."""
    if page.name in ("convert_config.md", "settings_pair_table.md", "troubleshooting.md"):
        return
    sections = "|".join(train_qwen_edit.Config.model_fields)
    text, theirs = prose(page), {"multi_gpu", "quiet", "num_processes", "runs", "steps"}
    named = re.findall(rf"`((?:{sections})(?:\.[\w*]+)+)\b", text)
    named = {re.sub(r"\.(\*|\d+)", "", name) for name in named if not name.endswith((".py", ".md"))}
    named |= set(re.findall(r"`--(\w+)", text)) - theirs
    assert named <= known_settings(), named - known_settings()


def test_words_are_spelt_as_they_should_be():
    """With codespell; words of the project that it takes for mistakes stand in words.txt."""
    files = [page for page in PAGES if page not in CHINESE] + [ROOT / "CHANGELOG.md"]
    files += [*ROOT.glob("*.py"), *ROOT.glob("tools/*.*"), *ROOT.glob("configs/*.yaml")]
    command = [sys.executable, "-m", "codespell_lib", "-I", ROOT / "tests/words.txt", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("page", CHINESE, ids=lambda p: p.name)
def test_a_chinese_page_keeps_step_with_the_english_one(page):
    """The same headings in number and order, commands, pictures, and links but for the language."""
    english = page.with_name(page.name.replace(".zh", ""))

    def blocks(file):
        return re.findall(r"^```bash\n.*?^```", file.read_text(), re.DOTALL | re.MULTILINE)

    assert [level for level, _ in headings(page)] == [level for level, _ in headings(english)]
    assert blocks(page) == blocks(english)
    names = [set(re.findall(r"`([\w./:*-]*[_./][\w./:*-]*)`", prose(p))) for p in (page, english)]
    assert names[0] == names[1], names[0] ^ names[1]
    rows = [len(re.findall(r"^\|", prose(p), re.MULTILINE)) for p in (page, english)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("page", PAGES[:-1], ids=lambda p: p.name)
def test_no_page_names_a_setting_that_went(page):
    """But pages of tools that take other programs' settings, and experiments/."""
    kept = {"pair_table.md", "convert_config.md", "interpolate_sd.md", "troubleshooting.md"}
    named = re.findall(r"`(?:--)?(?:\w+\.)*(\w+)(?:[:= ][^`]*)?`", page.read_text())
    kept |= {f"settings_{name}" for name in kept}
    assert page.name in kept or not set(named) & set(load_tool("settings").GONE)


def test_every_message_is_on_the_troubleshooting_page():
    """After a change: python tools/messages.py. The texts are read here in another way."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    assert page == load_tool("messages").page() and len(page.splitlines()) < 600
    plain = " ".join(re.sub("[`…]", " ", page).split())
    for file in {*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")} - {ROOT / "tools/messages.py"}:
        raised = [n.exc for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Raise)]
        for call in raised:
            if getattr(getattr(call, "func", None), "id", "") != "UserError" or not call.args:
                continue
            parts = getattr(call.args[0], "values", call.args[:1])  # of an f-string, or the text
            texts = [n.value for n in parts if isinstance(n, ast.Constant)]
            longest = max((str(text).strip("\n :;,`") for text in texts), key=len, default="")
            if len(longest) > 22 and not longest.startswith("usage"):
                words = " ".join(longest.replace("`", " ").split())
                assert words in plain, f"{file.name}:{call.lineno}: {words}"


SEEDS_WORDS = (  # under which the users' documents have their errors
    *("No matching image pairs found", "Before/After images root doesn't exist", "内存不足"),
    *(
        "Control tensor list length does not match batch size",
        "验证阶段显存不足",
        "`edit-v1` 下缓存不存在",
    ),
)


def test_troubleshooting_is_found_by_the_words_of_the_users_documents():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    assert [words for words in SEEDS_WORDS if words not in page] == []


def test_the_first_lora_is_short():
    assert len((ROOT / "docs/first_lora.md").read_text().split()) < 700


@pytest.mark.parametrize(
    "script",
    [
        *("train_qwen_edit", "train_pairedit", "train_dreambooth_pairs"),
        *("generate", "evaluate", "cache_embeddings"),
    ],
)
def test_every_script_names_its_page(script):
    assert f"docs/{script}.md" in (ROOT / f"{script}.py").read_text()[:400]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_loads_and_holds_only_what_differs(file):
    kinds = {"pairedit": train_pairedit, "dreambooth": train_dreambooth_pairs}
    script = next((kinds[kind] for kind in kinds if kind in file.stem), train_qwen_edit)
    config = load_config(script.Config, ["--config", str(file)])
    defaults = dict(settings(script.Config))

    def walk(value, path):
        if isinstance(value, dict) and f"{path}.*".lstrip(".") not in defaults:
            for key, item in value.items():
                yield from walk(item, f"{path}.{key}".lstrip("."))
        else:
            yield path, value

    for path, value in walk(yaml.safe_load(file.read_text()), ""):
        if path in defaults and not defaults[path].is_required():
            default = defaults[path].get_default(call_default_factory=True)
            # a recipe names its model; report_to and holdout stand in the template to be changed
            named = path.endswith(("name_or_path", "report_to", "holdout"))
            assert value != default or named, f"{path} = {value}"
    assert config


def test_the_seeds_yaml_runs_once_paths_and_devices_are_real(checkpoints, tmp_path):
    """The configuration example of the trainer's document, with data named by overrides."""
    file = tmp_path / "qwen_image_edit_config.yaml"
    file.write_text(SEED_YAML.replace("/path/to/cache", str(tmp_path / "cache")))
    overrides = [
        *("--config", str(file), "--model.pretrained_model_name_or_path", str(checkpoints["2511"])),
        *("--data.dataset_configs.0.train_data_dir", str(tmp_path)),
        *("--data.dataset_configs.0.target_dir", "after"),
        *("--data.dataset_configs.0.reference_dirs", "[before]"),
        *("--data.dataset_configs.0.on_missing", "skip"),
        *("--logging.output_dir", str(tmp_path / "out")),
    ]
    for place, role in (("after", "T"), ("before", "R")):
        (tmp_path / place).mkdir()
        for photo in (ROOT / "data/photo_pairs").glob(f"*_{role}.*"):
            shutil.copy(photo, tmp_path / place / photo.name.replace(f"_{role}", ""))
    with pytest.raises(UserError, match="vae_encoder_device: 'cuda:1'"):
        load_config(train_qwen_edit.Config, overrides, train_qwen_edit.audit)
    text = re.sub(r"cuda:\d", "cpu", file.read_text())
    file.write_text(text)
    config = load_config(train_qwen_edit.Config, overrides, train_qwen_edit.audit)
    assert config.train.gradient_checkpointing and config.predict.devices.transformer == "cpu"
    assert json.loads((tmp_path / "out/audit.json").read_text())["samples"] == 13


SEED_YAML = """
train:
  gradient_checkpointing: true    # 梯度检查点配置
  mixed_precision: "bf16"         # 混合精度训练
  max_grad_norm: 1.0              # 梯度裁剪

cache:
  vae_encoder_device: cuda:1      # VAE编码器设备
  text_encoder_device: cuda:2     # 文本编码器设备
  cache_dir: "/path/to/cache"     # 缓存目录
  use_cache: true                 # 是否使用缓存

predict:
  devices:
    vae: cuda:5                   # VAE设备
    text_encoder: cuda:6          # 文本编码器设备
    transformer: cuda:7           # Transformer设备
"""
