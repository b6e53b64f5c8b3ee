"""Archives say what they hold; keys change exactly when what an image is made from changes."""

import hashlib
import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from cluster.builder import InputFile, compute_key, list_sources, parse_pip_settings
from cluster.oci import read_images, write_image, write_layer
from cluster.shell import ClusterError


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    program = tmp_path / "program"
    program.write_bytes(b"#!/bin/true\n")
    layer = tmp_path / "layer.tar"
    write_layer(layer, [(program, "/bin/program")])
    archive = tmp_path / "made" / "image.tar"
    write_image(archive, name="quire.local/program:1", layer=layer, config={"Entrypoint": ["/bin/program"]})
    return archive


def test_every_blob_of_an_archive_is_where_its_digest_says(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = [name for name in tar.getnames() if name.startswith("blobs/")]
        for name in names:
            content = tar.extractfile(name)
            assert content is not None
            assert name == f"blobs/sha256/{hashlib.sha256(content.read()).hexdigest()}"
    assert len(names) == 3


def test_an_archive_leads_from_its_name_to_its_layer(archive: Path) -> None:
    def read(tar: tarfile.TarFile, digest: str) -> bytes:
        content = tar.extractfile(f"blobs/{digest.replace(':', '/')}")
        assert content is not None
        return content.read()

    ((name, digest),) = read_images(archive).items()
    assert name == "quire.local/program:1"
    with tarfile.open(archive) as tar:
        manifest = json.loads(read(tar, digest))
        image = json.loads(read(tar, manifest["config"]["digest"]))
        (layer,) = manifest["layers"]
        assert image["rootfs"]["diff_ids"] == [layer["digest"]]
        assert len(image["history"]) == len(manifest["layers"])
        assert image["config"] == {"Entrypoint": ["/bin/program"]}
        assert len(read(tar, layer["digest"])) == layer["size"]


def test_what_is_no_archive_is_refused_by_its_name(tmp_path: Path) -> None:
    other = tmp_path / "other.tar"
    with tarfile.open(other, "w") as tar:
        tar.add(__file__, "file")
    for path in (tmp_path / "none.tar", Path(__file__), other):
        with pytest.raises(ClusterError, match=f"{path.name} is no OCI archive"):
            read_images(path)


def test_a_program_in_a_layer_may_be_run(tmp_path: Path, archive: Path) -> None:
    with tarfile.open(tmp_path / "layer.tar") as tar:
        (entry,) = tar.getmembers()
    assert (entry.name, entry.mode, entry.uid) == ("bin/program", 0o755, 0)


def test_a_key_depends_on_words_names_modes_and_content_and_on_no_place(tmp_path: Path) -> None:
    def make(folder: str, content: str = "x", mode: int = 0o644) -> Path:
        path = tmp_path / folder / "file"
        path.parent.mkdir()
        path.write_text(content)
        path.chmod(mode)
        return path

    def key(path: Path, word: str = "word", name: str = "name") -> str:
        return compute_key([word], [InputFile(name=name, path=path)])

    first = make("a")
    assert key(first) == key(make("b"))
    others = {key(make("c", content="y")), key(make("d", mode=0o755)), key(first, name="n"), key(first, word="w")}
    assert len(others | {key(first)}) == 5
    assert compute_key(["ab", "c"], []) != compute_key(["a", "bc"], [])


def test_sources_are_what_git_has_or_would_take(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "package").mkdir()
    for name in ("package/tracked.py", "package/new.py", "package/made.so", "other.py", "gone.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text("*.so\n")
    git("add", "package/tracked.py", "gone.py")
    (tmp_path / "gone.py").unlink()
    found = list_sources(tmp_path, ["package", "gone.py", "never.py"])
    assert [file.name for file in found] == ["package/new.py", "package/tracked.py"]
    assert all(file.path.is_file() for file in found)


def test_pip_settings_that_say_how_to_reach_packages_are_passed_on() -> None:
    listing = (
        ":env:.index-url='https://environment.example/simple'\n"
        ":env:.find-links='/opt/wheels'\n"
        ":env:.disable-pip-version-check='1'\n"
        "global.cert='/etc/ssl/certs/ca-certificates.crt'\n"
        "global.index-url='https://file.example/simple'\n"
        "install.trusted-host='a.example\\nb.example'\n"
    )
    assert parse_pip_settings(listing) == {
        "cert": "/etc/ssl/certs/ca-certificates.crt",
        "index-url": "https://environment.example/simple",
        "trusted-host": "a.example b.example",
    }
    assert parse_pip_settings("") == {}
