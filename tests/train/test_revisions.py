"""What is loaded from the Hub is recorded with its commit."""

from __future__ import annotations

import shutil

from train.engine import base_models
from train.runtime import sharding

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_commit_is_recorded(tiny, monkeypatch, tmp_path, capsys):
    calls = []

    def download(repository, **options):
        calls.append((repository, options["revision"]))
        return str(shutil.copytree(tiny, tmp_path / COMMIT, dirs_exist_ok=True))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1))
    notes: list[str] = []
    base_models.load_model("hub:owner/name", "none", mesh, revision="v1", notes=notes)
    base_models.load_model("owner/name@v2", "none", mesh)
    assert calls == [("owner/name", "v1"), ("owner/name", "v2")]
    assert notes == [f"model: hub:owner/name at commit {COMMIT}"]
    assert notes[0] in capsys.readouterr().err
