"""Uploading a run to the Hub, against a local stand-in of its HTTP API."""

import base64
import json
import re
import shlex
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, quick_settings, run, write_config

import train_pairedit
from utils import UserError, check_setup, load_config


class Hub(ThreadingHTTPServer):
    """What the Hub would have: {path: bytes}, whether it is private; may break off once."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.stored, self.private, self.puts = {}, {}, None, []
        self.breaks = False  # refuse the next commit
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    """The requests of an upload."""

    def log_message(self, *args):
        """Print nothing."""

    def reply(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self):
        hub, data = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        hub.puts.append(len(data))
        hub.stored[self.path.rpartition("/")[2]] = data
        self.reply({})

    def do_GET(self):
        self.reply({"sha": "0" * 40, "siblings": [], "id": "me/lora", "name": "me"})

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            hub.private = asked.get("visibility", asked.get("private"))
            return self.reply({"url": f"{hub.url}/me/lora", "name": "me/lora"})
        if self.path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---")[1]
            base = re.search("^base_model: (.*)$", head, re.MULTILINE)
            if base and not re.fullmatch(r"[\w.-]+/[\w.-]+", base[1]):
                return self.reply({"errors": [{"message": "not a model id"}]}, 400)
        if "/preupload/" in self.path:
            large = {
                f["path"]: f["path"].endswith((".safetensors", ".png"))
                for f in json.loads(body)["files"]
            }
            modes = [
                {"path": p, "uploadMode": "lfs" if big else "regular", "shouldIgnore": False}
                for p, big in large.items()
            ]
            return self.reply({"files": modes})
        if self.path.endswith("/lfs/objects/batch"):
            found = []
            for each in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{hub.url}/store/{each['oid']}"}}
                found.append(each | ({} if each["oid"] in hub.stored else {"actions": upload}))
            return self.reply({"transfer": "basic", "objects": found})
        if "/commit/" in self.path:
            if hub.breaks:
                hub.breaks = False
                return self.reply({"error": "gone"}, 400)
            for line in body.splitlines():
                part = json.loads(line)
                if part["key"] == "lfsFile":
                    hub.files[part["value"]["path"]] = hub.stored[part["value"]["oid"]]
                elif part["key"] == "file":
                    hub.files[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
            return self.reply({"commitUrl": f"{hub.url}/me/lora/commit/1", "commitOid": "1" * 40})
        return self.reply({})


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()


def environment(hub):
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_x",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }


# {trainer: (flags of one step, where its first run lies, a sheet of it)}
QUICK = {
    "train_qwen_edit.py": (["--train.max_train_steps", 1], ".", "first_batch"),
    "train_pairedit.py": (
        ["--train_iteration", 1, "--train_count", 2],
        "age/age_vtrain_image_4.0eta_1.0ns_full_base_v1",
        "pairs",
    ),
    "train_dreambooth_pairs.py": (["--max_train_steps", 1], ".", "pairs"),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", QUICK)
def test_a_run_is_uploaded_and_goes_on_after_an_interruption(script, hub, checkpoints, tmp_path):
    """By the trainer, whose upload breaks off, then by hand; weights are sent once.

    Of several sliders each has a folder, and an upload that fails does not end the others.
    """
    file = write_config(tmp_path, quick_settings(script, checkpoints, tmp_path))
    flags, place, sheet = QUICK[script]
    flag = "--logging.push_to_hub" if "qwen" in script else "--push_to_hub"
    argv, several = [ROOT / script, "--config", file, *flags, flag, "me/lora"], place != "."
    hub.breaks = True
    done = run(*argv, env=environment(hub), check=False)
    assert done.returncode == (0 if several else 2), done.stderr
    assert hub.private in (True, "private")
    out, told = tmp_path / "out" / place, done.stdout if several else done.stderr
    second = f"{out.name[:-1]}2/" if several else "none"
    assert {name.partition("/")[0] + "/" for name in hub.files} == ({second} if several else set())
    words = shlex.split(re.search(r"(python tools/publish.py .*) goes on", told)[1])
    assert words[2:4] == [str(out), "me/lora"]
    sent = len(hub.puts)
    again = run(ROOT / "tools/publish.py", *words[2:], env=environment(hub))
    assert again.stdout.strip().endswith(f"{hub.url}/me/lora") and len(hub.puts) == sent > 0
    start = f"{out.name}/" if several else ""
    mine = {n.removeprefix(start): x for n, x in hub.files.items() if not n.startswith(second)}
    loras = {lora.name: lora.read_bytes() for lora in out.glob("*.safetensors")}
    pictures = {f"samples/{sheet.name}" for sheet in out.glob("samples/*.png")}
    assert f"samples/{sheet}.png" in pictures and loras
    assert mine.keys() == {"README.md", "config.yaml", *loras, *pictures}
    assert {name: mine[name] for name in loras} == loras
    assert mine["config.yaml"] == (out / "config.yaml").read_bytes()
    card = mine["README.md"].decode()
    assert "library_name: diffusers" in card and "base_model:" not in card  # a folder, here
    assert any(name in card for name in loras) and f" {out}/" not in card


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [("me/lora", None, "no token"), ("lora", "hf_x", "no USER/NAME"), ("a/b/c", "hf_x", "Repo id")],
)
def test_what_cannot_be_uploaded_is_said_before_a_model_loads(repo, token, said, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    problems = check_setup(hub=repo)
    assert any(said in line for line in problems) and all("push_to_hub" in p for p in problems)


def test_every_trainer_can_be_told_to_upload(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    argv = ["--pretrained_model_name_or_path", str(checkpoints["flux"]), "--push_to_hub", "me/x"]
    argv += ["--output_folder", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")]
    with pytest.raises(UserError, match="no token of the Hub"):
        load_config(train_pairedit.Config, argv, check=train_pairedit.audit)
