"""Checkpoint files of every container: read, mapped, refused, told apart from what is none."""

import os
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.standin import lightning
from tests.test_rename import checkpoint
from unifashion import UserError
from weights.containers import read_checkpoint, shards_of


def test_every_container_gives_the_same_tensors(tmp_path: Path):
    save_file(checkpoint(), tmp_path / "a.safetensors")
    torch.save(checkpoint(), tmp_path / "zip.pth")
    torch.save(checkpoint(), tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"model": checkpoint(), "epoch": 3}, tmp_path / "lavis.pth")
    for name in ("Blip2QformerCirCls", "Blip2QformerCirRerank"):
        torch.save({"epoch": 3, name: checkpoint()}, tmp_path / f"{name}.pt")
    torch.save(
        {"state_dict": checkpoint(), "optimizer_states": [{"m": torch.ones(9)}]}, tmp_path / "lightning.ckpt"
    )
    for path in sorted(tmp_path.iterdir()):
        read = read_checkpoint(path)
        assert read.keys() == checkpoint().keys(), path.name
        assert all(torch.equal(read[name], tensor) for name, tensor in checkpoint().items()), path.name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the kernel does not say what is mapped")
@pytest.mark.parametrize("name", ["zip.pth", "a.safetensors"])
def test_files_are_mapped_and_not_read(tmp_path: Path, name: str):
    (save_file if name.endswith("safetensors") else torch.save)(checkpoint(), tmp_path / name)
    read = read_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in Path("/proc/self/maps").read_text()
    read["stem.bias"].zero_()  # and what is done to the tensors does not reach the file
    assert torch.equal(read_checkpoint(tmp_path / name)["stem.bias"], checkpoint()["stem.bias"])


def test_a_lightning_checkpoint_is_read_without_lightning(tmp_path: Path):
    with lightning() as callback:  # the writer has Lightning, the reader has not
        callbacks = {callback: {"best_model_score": np.float64(0.25), "monitor": "loss"}}
        content = {"state_dict": checkpoint(), "callbacks": callbacks}
        torch.save(content, tmp_path / "new.ckpt")
        torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    written = (
        (tmp_path / "old.ckpt").read_bytes().replace(b"numpy._core", b"numpy.core")
    )  # as numpy 1 names it
    (tmp_path / "old.ckpt").write_bytes(written)
    for name in ("new.ckpt", "old.ckpt"):
        assert read_checkpoint(tmp_path / name).keys() == checkpoint().keys()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_asks_for_more_than_tensors_is_refused_and_not_run(tmp_path: Path, zipped: bool):
    path, trace = tmp_path / "evil.pth", tmp_path / "it_ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    torch.save({"state_dict": checkpoint(), "x": Evil()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"^{path}: refused, its pickle asks for (posix|nt)\.mkdir"):
        read_checkpoint(path)
    assert not trace.exists()
    torch.save({"state_dict": checkpoint(), "x": Harmless()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"asks for tests\.test_containers\.Harmless, no tensor needs it"):
        read_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [4, 5])
def test_a_pickle_of_a_later_protocol_is_refused_in_one_line(
    tmp_path: Path, zipped: bool, protocol: int, recwarn
):
    path, trace = tmp_path / "later.pth", tmp_path / "it_ran"
    how = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    torch.save(checkpoint(), path, **how)
    with pytest.raises(
        UserError, match="its pickle is of a protocol that is not read without running it: save it again"
    ):
        read_checkpoint(path)
    torch.save({"state_dict": checkpoint(), "x": Evil()}, path, **how)
    with pytest.raises(
        UserError, match=rf"^{path}: refused, its pickle is of a protocol .* asks for (posix|nt)\.mkdir"
    ):
        read_checkpoint(path)
    assert not trace.exists() and not recwarn


@pytest.mark.parametrize("packed", ["/data/0", "/data.pkl"])
def test_a_zip_file_that_was_packed_again_is_refused(tmp_path: Path, packed: str):
    """Mapped where its records are, their compressed bytes would be numbers; a program of 5 MB could be one of 10 GB."""
    torch.save(checkpoint(), tmp_path / "a.pth")
    script(tmp_path / "a.pt", Half())
    for path in [*tmp_path.iterdir()]:
        again = path.with_stem("b")
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(again, "w") as new:
            for name in old.namelist():
                new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED if name.endswith(packed) else None)
        with pytest.raises(UserError, match=f"{again}: its record .*{packed} is compressed"):
            read_checkpoint(again)


def test_a_bare_pickle_of_a_later_protocol_is_refused_by_what_it_asks_for(tmp_path: Path):
    """Without the five that torch's own are."""
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Harmless(), protocol=4))
    with pytest.raises(UserError, match=r"asks for tests\.test_containers\.Harmless"):
        read_checkpoint(tmp_path / "bare.pth")


@pytest.mark.parametrize("kind", ["a.safetensors", "zip.pth", "legacy.pth"])
def test_a_file_cut_short_is_one_line_that_names_it(tmp_path: Path, kind: str):
    path = tmp_path / kind
    if path.suffix == ".safetensors":
        save_file(checkpoint(), path)
    else:
        torch.save(checkpoint(), path, _use_new_zipfile_serialization=kind == "zip.pth")
    content = path.read_bytes()
    for length in range(0, len(content) - 1, len(content) // 60):
        path.write_bytes(content[:length])
        one_line_naming(path)


def test_what_is_no_checkpoint_is_one_line_that_names_it(tmp_path: Path):
    (tmp_path / "page.pth").write_text("<!doctype html><title>404</title>")
    (tmp_path / "page.safetensors").write_text("<!doctype html><title>404</title>")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    torch.save({"state_dict": {"a": torch.ones(2), "lr": 0.1}}, tmp_path / "mixed.pth")
    torch.save({}, tmp_path / "empty.pth")
    (tmp_path / "folder").mkdir()
    for path in [*tmp_path.iterdir(), tmp_path / "missing.pth"]:
        one_line_naming(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty: the download did not begin"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "is a git-lfs pointer, not the file"),
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "is a web page, not a checkpoint"),
        (b"\n <html lang=en>", "is a web page, not a checkpoint"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page, not a checkpoint"),
        (b"Invalid username or password.", "is a server's answer, not a checkpoint"),
        (b'{"error":"Access to model is restricted"}', "is a server's answer, not a checkpoint"),
        (b"\0" * 1000, "is zeros, not a checkpoint"),
    ],
    ids=["empty", "git-lfs", "page", "page after a line", "xml", "login", "json", "zeros"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.bin"])
def test_a_download_that_went_wrong_is_told_as_what_it_is(
    tmp_path: Path, name: str, content: bytes, what: str
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^{tmp_path / name}: {what}"):
        read_checkpoint(tmp_path / name)


def test_a_safetensors_header_that_looks_like_a_page_is_none(tmp_path: Path):
    """Its first bytes are its length: 0x3c20 begins with a space and a <."""
    path = tmp_path / "a.safetensors"
    save_file(checkpoint(), path, metadata={"x": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    save_file(checkpoint(), path, metadata={"x": "x" * (0x3C20 - length)})
    assert path.read_bytes()[:2] == b" <"
    assert read_checkpoint(path).keys() == checkpoint().keys()


# TorchScript


def test_torchscript_gives_its_tensors_and_runs_nothing(tmp_path: Path):
    path = script(tmp_path / "a.pt", Half())
    theirs = torch.jit.load(path).state_dict()
    read = read_checkpoint(path)
    assert (
        read.keys()
        == theirs.keys()
        == {"layers.0.weight", "layers.1.weight", "layers.1.bias", "scale", "input_resolution"}
    )
    for name, x in theirs.items():
        assert read[name].dtype == x.dtype and torch.equal(read[name], x), name


def test_torchscript_is_mapped(tmp_path: Path):
    path = script(tmp_path / "a.pt", Half())
    read = read_checkpoint(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    read["scale"].zero_()
    assert read_checkpoint(path)["scale"] == 3


def test_torchscript_cut_short_is_one_line_that_names_it(tmp_path: Path):
    path = script(tmp_path / "a.pt", Half())
    content = path.read_bytes()
    for length in range(0, len(content) - 1, len(content) // 40):
        path.write_bytes(content[:length])
        one_line_naming(path)


def test_torchscript_whose_pickle_asks_for_more_is_refused_and_not_run(tmp_path: Path):
    path, evil, trace = script(tmp_path / "a.pt", Half()), tmp_path / "evil.pt", tmp_path / "it_ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    with zipfile.ZipFile(path) as good, zipfile.ZipFile(evil, "w") as bad:
        for name in good.namelist():
            bad.writestr(name, pickle.dumps(Evil()) if name.endswith("/data.pkl") else good.read(name))
    with pytest.raises(UserError, match=rf"^{evil}: refused, its pickle asks for (posix|nt)\.mkdir"):
        read_checkpoint(evil)
    assert not trace.exists()


def test_a_module_named_as_a_method_is_a_module(tmp_path: Path):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Module()
            self.part.tensors = nn.LayerNorm(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert read_checkpoint(script(tmp_path / "a.pt", Named())).keys() == {
        "part.tensors.weight",
        "part.tensors.bias",
    }


class Half(nn.Module):
    """As OpenAI's CLIP: modules with numbers for names, types mixed, a number beside the tensors, a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 2, bias=False).half(), nn.LayerNorm(2)])
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("input_resolution", torch.tensor(224))
        self.sizes = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x) * self.scale * self.sizes[0]


def script(path: Path, module: nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the writer is torch of 2021
        torch.jit.save(torch.jit.script(module), path)
    return path


def test_a_pickle_cannot_change_what_reads_it(tmp_path: Path):
    """The BUILD of a state, where there is none: on a function it would set its defaults, for every file that is read after."""
    path, evil = script(tmp_path / "a.pt", Half()), tmp_path / "evil.pt"
    code = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00}q\x01X\x01\x00\x00\x00aK\x07sb."
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(evil, "w") as bad:
        for name in good.namelist():
            bad.writestr(name, code if name.endswith("/data.pkl") else good.read(name))
    one_line_naming(evil)
    assert read_checkpoint(path)["scale"] == 3


def test_a_record_that_is_too_short_is_refused(tmp_path: Path):
    """What lies behind it in the file would be read as numbers."""
    path, cut = script(tmp_path / "a.pt", Half()), tmp_path / "cut.pt"
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(cut, "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            bad.writestr(name, content[: len(content) // 2] if name.endswith("/data/0") else content)
    one_line_naming(cut)


def test_what_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.pth"
    torch.save(checkpoint(), path)

    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(UserError, match=rf"^{path}: Permission denied$"):
        read_checkpoint(path)


def test_a_machine_that_is_too_small_is_not_told_that_the_file_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.pth"
    torch.save(checkpoint(), path)

    def full(*args, **kwargs):
        raise RuntimeError("unable to mmap 62 GB from file: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(UserError, match=rf"^{path}: there is too little memory to map its 0.0 GB$"):
        read_checkpoint(path)


# shards


def test_a_whole_set_of_shards_is_read_though_another_is_not_whole(tmp_path: Path):
    """As when the conversion of the second was stopped."""
    names = ["pytorch_model-00001-of-00002", "pytorch_model-00002-of-00002"]
    for name in names:
        torch.save(checkpoint(), tmp_path / f"{name}.bin")
    save_file(checkpoint(), tmp_path / f"{names[0]}.safetensors")
    assert [path.name for path in shards_of(tmp_path)] == [f"{name}.bin" for name in names]
    for path in (tmp_path / f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)):
        torch.save(checkpoint(), path)  # of two whole sets the one of more
    assert [path.name[-12:] for path in shards_of(tmp_path)] == ["of-00003.bin"] * 3
    path.unlink()
    assert [path.name for path in shards_of(tmp_path)] == [f"{name}.bin" for name in names]
    for path in tmp_path.glob("*-of-00003.bin"):
        path.unlink()
    (tmp_path / f"{names[1]}.bin").unlink()
    with pytest.raises(UserError, match=rf"^{tmp_path}/{names[1]}\.safetensors is missing$"):
        shards_of(tmp_path)
    with pytest.raises(UserError, match="none is missing, or not a folder$"):
        shards_of(tmp_path / "none")


# helpers


class Harmless:
    pass


def one_line_naming(path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
