"""Uploading a run to the Hub, against a local stand-in of its HTTP API."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, run, small_config, write_config

import train_pairedit
import train_qwen_edit
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
    """The five requests of an upload."""

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
                    hub.files[part["value"]["path"]] = b""
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


def test_a_run_is_uploaded_and_goes_on_after_an_interruption(hub, checkpoints, tmp_path):
    """By the trainer, whose upload breaks off, then by hand; weights are sent once."""
    settings = small_config(checkpoints["2511"], tmp_path, **{"logging.push_to_hub": "me/lora"})
    settings["train"]["max_train_steps"] = 1
    file, hub.breaks = write_config(tmp_path, settings), True
    done = run("train_qwen_edit.py", "--config", file, env=environment(hub), check=False)
    out = tmp_path / "out"
    assert done.returncode == 2 and "python tools/publish.py" in done.stderr, done.stderr
    assert hub.private in (True, "private") and not hub.files and len(hub.puts) >= 1
    lora, sent = out / train_qwen_edit.LORA_FILE, len(hub.puts)
    again = run(ROOT / "tools/publish.py", out, "me/lora", env=environment(hub))
    assert again.stdout.strip().endswith(f"{hub.url}/me/lora") and len(hub.puts) == sent
    assert hub.files[lora.name] == lora.read_bytes()
    assert {"README.md", "config.yaml", "samples/first_batch.png"} <= set(hub.files)
    assert not [name for name in hub.files if "checkpoint" in name or "run.json" in name]
    stored = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert stored in hub.stored


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
